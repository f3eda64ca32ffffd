"""The comparison of predicted and measured steps: errors that were put in are found, and what else it says."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from benchmarks.scale import predictions as compared
from benchmarks.scale.predictions import LIMITS, Prediction, judge, predictions
from odysseus_kernels.planner.formulas import PIPELINED, STRATEGIES

STORED = Path(__file__).parents[3] / "benchmarks" / "results" / "cpu-2cores" / "predictions"


def one(strategy: str, predicted: float, measured: float, mode: str = "fused", rate: float = 8e7) -> Prediction:
    return Prediction(rate, "2048x256", strategy, mode, predicted, measured)


def test_a_case_is_the_fastest_variant_as_measured_and_as_predicted() -> None:
    found = judge([one("tp", 1.0, 2.0, "unfused"), one("tp", 1.2, 1.5), one("tp", 9.0, 1.0, rate=1.6e8)])
    assert [(case.predicted, case.measured) for case in found.cases] == [(1.0, 1.5), (9.0, 1.0)]
    assert found.worst == pytest.approx(8.0)
    assert found.median == pytest.approx((1 / 3 + 8.0) / 2)
    assert not found.reached


def test_order_matters_where_steps_differ_by_more_than_a_tenth() -> None:
    close = judge([one("tp", 1.02, 1.0), one("tp_sp", 1.0, 1.05)])
    assert (close.pairs, close.swapped) == (0, ())
    assert close.reached
    far = judge([one("tp", 1.3, 1.0), one("tp_sp", 1.2, 1.3), one("tsp", 1.6, 1.6)])
    assert far.pairs == 3
    assert far.swapped == ("2048x256 at 80 Mb/s: tp before tp_sp",)
    assert far.worst < LIMITS["worst"] and not far.reached
    with pytest.raises(ValueError, match="at least one prediction"):
        judge([])


def test_other_files_are_refused(tmp_path: Path) -> None:
    machine = compared.machine_for(compared.MACHINE)
    with pytest.raises(ValueError, match="kind \"scale\", got kind 'overlap'"):
        predictions({"kind": "overlap"}, machine, 1e7)
    with pytest.raises(ValueError, match="rows of layers, got operators"):
        predictions({"kind": "scale", "parts": [{"bits_per_s": 1e8, "rows": [{"entries": []}]}]}, machine, 1e7)
    with pytest.raises(SystemExit):
        compared.main([str(tmp_path / "absent.json"), str(tmp_path / "absent.json")])
    with pytest.raises(SystemExit):
        compared.main([str(tmp_path / "one.json")])


def test_stored_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured and is kept covers what it should; judged again, it gives the figures that stand beside it."""
    stored = json.loads((STORED / "predictions.json").read_text())
    files = [STORED / name for name in stored["files"]]
    status = compared.main([*map(str, files), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    again = json.loads((tmp_path / "predictions.json").read_text())
    for name in ("median", "worst"):
        assert again[name] == pytest.approx(stored[name])
    assert again["swapped"] == stored["swapped"]
    assert status == (0 if judge([Prediction(**kept) for kept in again["variants"]]).reached else 1)
    assert f"median error {again['median']:.1%}" in printed
    assert (tmp_path / "predictions.png").stat().st_size > 10_000

    found = [Prediction(**kept) for kept in again["variants"]]
    assert len({(p.rate, p.shape, p.strategy) for p in found}) >= 24 and len({p.rate for p in found}) == 3
    shapes = {p.shape for p in found}
    calibration = json.loads(files[0].read_text())
    calibrated = {f"{row['tokens']}x{row['hidden']}" for part in calibration["parts"] for row in part["rows"]}
    assert not shapes & calibrated
    # Ulysses had no groups of heads when it was measured.
    expected = {
        (strategy, mode)
        for strategy, mode in itertools.product(STRATEGIES, ("unfused", "fused", "pipelined"))
        if mode != "pipelined" or strategy in PIPELINED
    }
    for rate, shape in {(p.rate, p.shape) for p in found}:
        assert {(p.strategy, p.mode) for p in found if (p.rate, p.shape) == (rate, shape)} == expected


@pytest.mark.parametrize("name", ("scale-20261129-174728.json", "scale-20261129-173854.json"))
def test_ulysses_in_groups_of_heads_as_it_was_measured(name: str) -> None:
    """Two rates of the link, each with the compute and the unfused transfers of the same file: all within a tenth."""
    path = STORED.parent / name
    machine, rate, _ = compared.calibrated(path)
    found = {one.mode: one for one in predictions(json.loads(path.read_text()), machine, rate)}
    assert {(one.strategy, mode) for mode, one in found.items()} == {
        ("ulysses", mode) for mode in ("unfused", "fused", "pipelined")
    }
    for one in found.values():
        assert abs(one.error) < 0.1, one
    assert found["pipelined"].predicted < found["fused"].predicted < found["unfused"].predicted


def test_a_link_that_is_set_faster_is_reached_by_the_same_share() -> None:
    machine = compared.machine_for(compared.MACHINE)
    slow = dataclasses.replace(machine, network_bytes_per_s=machine.device.link_bytes_per_s)
    fast = compared._faster_link(slow, 2.0)
    assert fast.link(2, 2)[0] == pytest.approx(2 * slow.link(2, 2)[0])
