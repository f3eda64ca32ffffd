"""Case tables, verdicts and documents of runs with emulated links; nothing is measured here."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import machine
from benchmarks.device import emulated, kernels
from benchmarks.device import report as emulated_report
from benchmarks.device.cases import TARGETS, WORLD, EmulatedCase, make_emulated_cases
from benchmarks.device.predictions import PREDICTED, predicted_seconds
from odysseus_kernels.planner.hardware import hardware_for
from odysseus_kernels.testing.virtual_devices import link_of

_ROOT = Path(__file__).resolve().parents[3]


def _row(
    times: dict[str, float],
    operator: str = "all_gather_linear",
    phase: str = "forward",
    tokens: int = 32768,
    link: str = "paced:400",
    wrong: tuple[str, ...] = (),
) -> dict[str, Any]:
    case = EmulatedCase("model", operator, phase, tokens, 128, 64, link)  # type: ignore[arg-type]
    return {
        "operator": case.operator,
        "phase": case.phase,
        "label": case.label,
        "shape": case.shape,
        "link": case.link,
        "judged": case.judged,
        "link_bytes": 1_520_000_000_000,
        "pieces": {"fused": "4"},
        "host_s": {"fused": 5e-3, "fused/4": 7e-3},
        "errors": {"serial": {"output": 1e-3}, "fused": {"output": math.nan if wrong else 2e-3}},
        "wrong": list(wrong),
        "impossible": {"tiles": "a reason"},
        "samples_s": {name: [value, value * 1.1, value * 0.9] for name, value in times.items() if name not in wrong},
    }


def test_links() -> None:
    assert link_of("pcie") == ("pinned", 0.0)
    assert link_of("paced:450") == ("device", 450e9)
    assert link_of("paced:0.5") == ("device", 5e8)
    for name in ("paced", "paced:", "paced:0", "paced:-1", "paced:nan", "paced:inf", "nvlink", "pcie:5", ""):
        with pytest.raises(ValueError, match="link: expected"):
            link_of(name)


def test_cases_are_the_ones_that_limits_are_for() -> None:
    cases = make_emulated_cases()
    assert len({case.name for case in cases}) == len(cases) == 3 * 3 * 2 * 5
    assert {case.link for case in cases} == {"paced:80", "paced:450", "pcie"}
    assert list(dict.fromkeys(case.link for case in cases)) == ["paced:80", "pcie", "paced:450"], "surest first"
    assert {case.tokens for case in cases if case.judged} == {32768, 65536}
    assert {(c.inner, c.outer) for c in cases if c.operator == "all_gather_linear"} == {
        (4096, 1536),
        (4096, 768),
        (8192, 1280),
    }
    assert {(c.inner, c.outer) for c in cases if c.operator == "linear_reduce_scatter"} == {(512, 4096), (1024, 8192)}
    first = cases[: len(cases) // 3]
    assert {(case.operator, case.phase, case.link) for case in first} == {
        (case.operator, case.phase, case.link) for case in cases
    }, "whatever is cut off for lack of time, every operator, phase and link was there"
    assert all(case.judged for case in make_emulated_cases(quick=True))
    assert make_emulated_cases(("pcie",), "70B.*L65536")[0].label == "Llama-3-70B qkv"
    for pattern in ("nothing", "("):
        with pytest.raises(ValueError, match="--cases"):
            make_emulated_cases(pattern=pattern)


def test_figures() -> None:
    row = emulated_report.summarize(_row({"gemm": 2.0, "link": 4.0, "serial": 6.0, "fused": 4.2}, link="paced:450"))
    assert row["limit_s"] == 4.0
    assert row["figures"]["fused / limit"] == pytest.approx(1.05)
    assert row["figures"]["hidden"] == pytest.approx(0.9)
    assert row["figures"]["tiles / limit"] is None
    assert row["spreads"]["gemm"] == pytest.approx(0.1)
    assert row["link_bytes_per_s"] == pytest.approx(380e9)
    assert row["link_slow"]
    assert not emulated_report.summarize(_row({"gemm": 2.0, "link": 3.7}))["link_slow"]
    assert not emulated_report.summarize(_row({"gemm": 2.0, "link": 40.0}, link="pcie"))["link_slow"]
    assert emulated_report.summarize(_row({"gemm": 2.0}))["link_bytes_per_s"] is None
    wrong = emulated_report.summarize(_row({"gemm": 2.0, "link": 4.0, "serial": 6.0, "fused": 1.0}, wrong=("fused",)))
    assert set(wrong["figures"].values()) == {None}
    assert row["figures"]["host / fused"] == pytest.approx(7e-3 / 4.2)  # of the number of pieces that was chosen


def test_verdicts_are_those_of_the_worst_judged_row() -> None:
    good = {"gemm": 2.0, "link": 4.0, "serial": 6.0, "fused": 4.0}
    bad = {**good, "fused": 4.4}
    rows = [
        _row(good),
        _row(bad, link="pcie"),
        _row({**bad, "fused": 40.0}, tokens=8192),  # chunks of 1024 rows are not judged
        _row({**bad, "fused": 40.0}, link="paced:450"),  # nor is a link that was slower than it says
        _row(good, operator="linear_reduce_scatter", phase="backward"),
    ]
    verdicts = emulated_report.judge([emulated_report.summarize(row) for row in rows])
    assert [(v["what"], v["reached"], v["rows"], v["rows_missed"]) for v in verdicts] == [
        ("all_gather_linear forward: fused / limit", False, 2, 1),
        ("all_gather_linear forward: hidden", False, 2, 1),
        ("linear_reduce_scatter backward: fused / limit", True, 1, 0),
        ("all_gather_linear forward: host / fused", True, 2, 0),
        ("linear_reduce_scatter backward: host / fused", True, 1, 0),
    ]
    assert verdicts[0]["measured"] == pytest.approx(1.1)
    assert verdicts[1]["measured"] == pytest.approx(0.8)
    assert "pcie" in verdicts[0]["shape"]
    assert {(t.operator, t.phase) for t in TARGETS} == {
        (operator, phase)
        for operator in ("all_gather_linear", "linear_reduce_scatter")
        for phase in ("forward", "backward")
    }


def test_a_host_that_is_slower_than_the_device_misses_its_target() -> None:
    row = _row({"gemm": 2e-3, "link": 4e-3, "serial": 6e-3, "fused": 5e-3})  # the host takes 7 ms
    verdicts = {v["what"]: v for v in emulated_report.judge([emulated_report.summarize(row)])}
    missed = verdicts["all_gather_linear forward: host / fused"]
    assert (missed["reached"], missed["relation"], missed["limit"]) == (False, "<=", 1.0)
    assert missed["measured"] == pytest.approx(7 / 5)


def test_every_row_has_a_prediction_of_what_it_measures() -> None:
    for case in make_emulated_cases():
        found = predicted_seconds(case, "NVIDIA H200", {"fused": "2", "tiles": "auto"})
        assert tuple(found) == PREDICTED
        assert found["gemm"] == pytest.approx(case.flops / 791.2e12)  # 0.8 of the data sheet's rate
        rate = 51.2e9 if case.link == "pcie" else link_of(case.link)[1]
        assert found["link"] == pytest.approx(case.link_bytes / rate)
        assert found["serial"] > found["gemm"] + found["link"]
        assert min(found["fused"], found["tiles"]) > max(found["gemm"], found["link"])
        cut = predicted_seconds(case, "NVIDIA H200", {"fused": "8"})
        assert {name for name in PREDICTED if cut[name] != found[name]} == {"fused"}
        assert predicted_seconds(case, "NVIDIA A100-SXM4-80GB", {})["gemm"] > found["gemm"]


_UNTIMED: dict[str, Any] = {"host / kernel": None}


def test_every_kernel_has_a_prediction_and_a_host_that_keeps_ahead() -> None:
    """As a run measures them, with a stand-in for the kernels and for the clock."""
    hardware = hardware_for("NVIDIA H200")
    predicted = kernels.predicted_product(hardware, 989e12)
    assert predicted == {"kernel": pytest.approx(1.35), "library": pytest.approx(1.25)}  # 0.8 of the rate, 8 % more
    assert kernels.predicted_sum(hardware, 4.32e12) == {"kernel": pytest.approx(1.0), "library": pytest.approx(1.0)}
    times = {"kernel": 0.5, "library": 0.25}

    def named(name: str) -> Callable[[], str]:
        return lambda: name

    def row(error: float) -> dict[str, Any]:
        calls = {name: named(name) for name in times}
        problem = kernels.Problem("reduce", "b", calls, lambda: error, 1.0, 8.0, 8.0, ("TB/s", 1.0), predicted)
        return kernels.measure_problem(problem, lambda call: (times[call()], None), 3, lambda: None)

    right, wrong = row(0.5), row(2.0)
    assert right["predicted_s"] == predicted and right["medians_s"] == times
    assert 0 < right["host / kernel"] == right["host_s"]["kernel"] / 0.5 < 1
    assert wrong["medians_s"] == {"library": 0.25} and wrong["host / kernel"] is None
    late = {**right, "shape": "c", "host / kernel": 1.5}
    share, host = emulated_report.judge_kernels([right, wrong, late])
    assert (host["what"], host["measured"], host["limit"]) == ("kernels: host / kernel", 1.5, 1.0)
    assert (host["rows"], host["rows_missed"], host["reached"], host["shape"]) == (2, 1, False, "reduce c")
    assert share["rows"] == 3


def test_a_wrong_result_reaches_nothing() -> None:
    row = emulated_report.summarize(_row({"gemm": 2.0, "link": 4.0, "serial": 6.0, "fused": 4.0}, wrong=("fused",)))
    for verdict in emulated_report.judge([row]):
        assert not verdict["reached"]
        assert verdict["measured"] is None
        assert verdict["rows_missed"] == 1
    (verdict,) = emulated_report.judge_kernels([{"kernel": "reduce", "shape": "8 x 1", "share": None, **_UNTIMED}])
    assert not verdict["reached"]
    (verdict,) = emulated_report.judge_kernels(
        [
            {"kernel": "reduce", "shape": "a", "share": 0.9, **_UNTIMED},
            {"kernel": "reduce", "shape": "b", "share": 0.86, **_UNTIMED},
        ]
    )
    assert (verdict["reached"], verdict["measured"], verdict["shape"]) == (True, 0.86, "b")


def _document(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any]) -> dict[str, Any]:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    arguments = argparse.Namespace(link=["paced:450"], cases="", quick=False, measure=["kernels", "links"])
    done = emulated._Run(torch.device("cuda", 0), 15, math.inf)
    done.rows = [emulated_report.summarize(row) for row in rows]
    done.failed = [{"name": "some row", "failed": "RuntimeError: out of memory"}]
    kernel = {"kernel": "reduce", "shape": "8 x 64", "speed": "4 TB/s", "library": "4.2 TB/s", "share": 0.95}
    kernel["host_s"] = {"kernel": 0.125e-3, "library": 1.0}
    kernel["predicted_s"], kernel["medians_s"] = {"kernel": 0.2e-3, "library": 0.1e-3}, {"library": 0.15e-3}
    kernel["tried_s"] = {"128x256x64": 2.0, "128x128x64 pingpong": 1.0}
    measured = kernels.Measured([kernel], [], ["another row"], ["multimem_reduce: not measured."])
    return emulated.make_document(arguments, done, measured)


@pytest.mark.parametrize("git", ("", "echo dubious ownership >&2; exit 128"))
def test_a_commit_that_git_does_not_tell_is_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, git: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if git:
        program = tmp_path / "git"
        program.write_text(f"#!/bin/sh\n{git}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit() == "unknown"
    assert capfd.readouterr() == ("", "")


def test_documents_label_links_as_emulated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"gemm": 2.0, "link": 4.0, "serial": 6.0, "fused": 4.0}
    rows = [_row(times), _row(times, wrong=("fused",), link="paced:450")]
    for row in rows:
        row["predicted_s"] = {"gemm": 1.6, "link": 4.0, "serial": 5.0, "fused": 3.2, "tiles": 3.5}
    document = _document(monkeypatch, *rows)
    paths = emulated_report.write(document, tmp_path / "new")
    read = json.loads(paths[0].read_text())
    assert (read["kind"], read["schema"]) == ("emulated", 1)
    assert read["rows"][1]["errors"]["fused"]["output"] == "nan"
    assert {"python", "torch", "triton", "cuda"} <= set(read["versions"])
    text = paths[1].read_text()
    assert "EMULATED" in text
    assert "| emulated link |" in text
    assert "| 0.125 | 128x128x64 pingpong |" in text
    for part in (
        "NVIDIA H200",
        "WRONG",
        "1.000",
        "out of memory",
        "another row",
        "tiles -: a reason",
        "reached in all 1",
        "| paced:450 reached 380 |",
        "Not judged: 1 rows whose link was slower than it says.",
        "| 7.000 |",  # the host's milliseconds for the call with the pieces that were chosen
        "| 0.125 |",
        "| fused predicted ms | measured |",
        "| 1600.000 | 2000.000 (1.25) | 4000.000 | 4000.000 (1.00) | 5000.000 | 6000.000 (1.20) | 3200.000 | WRONG |",
        "| 3200.000 | 4000.000 (1.25) | 3500.000 | - |",  # tiles are impossible
        "## Kernels: predicted by the cost model beside measured",
        "| reduce | 8 x 64 | 0.200 | WRONG | 0.100 | 0.150 (1.50) |",
    ):
        assert part in text, text
    emulated_report.print_document(document)
    printed = capsys.readouterr().out
    assert "EMULATED" in printed
    assert emulated_report.PREDICTIONS in printed and "2000.000 (1.25)" in printed
    assert "WRONG" in printed
    if len(paths) == 3:
        assert paths[2].stat().st_size > 1000


def test_without_rich_tables_are_markdown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(emulated_report.importlib.util, "find_spec", lambda name: None)
    document = _document(monkeypatch, _row({"gemm": 2.0, "link": 4.0, "serial": 6.0, "fused": 4.0}))
    emulated_report.print_document(document)
    assert capsys.readouterr().out == emulated_report.markdown(document) + "\n"
    assert not emulated_report.draw(document, "/nonexistent/folder/file.png")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("command", "said"),
    (
        (["benchmarks/overlap.py", "--device", "cuda"], "no GPU: torch.cuda.is_available() is false"),
        (["benchmarks/overlap.py", "--device", "cuda", "--link", "wire"], "link: expected"),
        (["-m", "benchmarks.device.kernels"], "no GPU: torch.cuda.is_available() is false"),
    ),
)
def test_programs_without_a_gpu_say_so_in_one_line(command: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=_ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_world_of_the_cases() -> None:
    assert {case.world for case in make_emulated_cases()} == {WORLD}
