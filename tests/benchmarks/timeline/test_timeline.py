"""``overlap.py --timeline``: what is drawn is what was traced."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot as plt
from trace_format import problems_of

from benchmarks import overlap
from benchmarks.layers.cases import make_layer_cases, make_variants
from benchmarks.operators import workload
from benchmarks.operators.cases import Case
from benchmarks.scale.hosts import HostsError, check_machine
from benchmarks.timeline import run as timeline_run
from benchmarks.timeline.cost import CostSettings, measure_cost
from benchmarks.timeline.intervals import KINDS, Interval, intervals_of, merge_events, totals_ms
from benchmarks.timeline.plot import draw, make_figure, panels_of
from benchmarks.timeline.ranks import TimelineSettings, run_timeline
from odysseus_kernels.testing.spawn import RankPool, RankPools

Panel = dict[str, Any]


def _settings(transport: str) -> TimelineSettings:
    variants = make_variants(["odysseus"], [transport], pipeline=2)
    return TimelineSettings(
        operator=Case("small", "all_gather_linear", 64, 32, (24,), False),
        layer=make_layer_cases("layer", 2, shapes=[(64, 128)])[0],
        variants=tuple(variant for variant in variants if variant.kind == "ours"),
        transport=transport,
        dtype="float32",
        repeats=3,
    )


def test_variants_are_picked() -> None:
    def names(*options: str) -> list[str]:
        return [
            variant.name for variant in timeline_run.make_settings(overlap.parse(["--timeline", *options]), 2).variants
        ]

    assert len(names()) == 3
    assert names("--variants", "pipelined") == ["odysseus pipelined symmetric"]
    with pytest.raises(ValueError, match="is found in no name"):
        names("--variants", "nothing")


def _document(panels: list[Panel], transport: str = "symmetric", link: dict[str, Any] | None = None) -> dict[str, Any]:
    return timeline_run.make_document(overlap.describe_run(overlap.parse(["--timeline"]), 2), panels, link, transport)


def _event(category: str, begin: float, end: float, rank: int = 0, tid: int = 1, **args: Any) -> dict[str, Any]:
    place = {"pid": rank, "tid": tid, "ts": begin, "dur": end - begin}
    return {"name": category, "cat": category, "ph": "X", **place, "args": args}


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_what_is_drawn_is_what_was_traced(ranks: RankPools, transport: str) -> None:
    panels, again = ranks(2).run(run_timeline, _settings(transport))
    assert panels == again
    assert [(panel["level"], panel["name"]) for panel in panels] == [
        ("operator", "unfused"),
        ("operator", "fused"),
        ("layer", f"odysseus unfused {transport}"),
        ("layer", f"odysseus fused {transport}"),
        ("layer", f"odysseus pipelined {transport}"),
    ]
    document = json.loads(json.dumps(_document(panels, transport), allow_nan=False))
    assert problems_of(document) == []
    figure = make_figure(document)
    try:
        for panel, axis in zip(panels_of(document), figure.axes, strict=True):
            _check_panel(panel, axis, transport)
    finally:
        plt.close(figure)


def _check_panel(panel: Panel, axis: Any, transport: str) -> None:
    """Every event of the step has its interval, thread lanes have no gaps, and bars are at the intervals' places."""
    intervals = intervals_of(panel)
    origin = min(begin for begin, _ in panel["spans"])
    for rank, (begin, end) in enumerate(panel["spans"]):
        mine = [one for one in intervals if one.rank == rank]
        work = [one for one in mine if one.lane == "works"]
        assert work[0].begin * 1e3 + origin == pytest.approx(begin, abs=1)
        assert work[-1].end * 1e3 + origin == pytest.approx(end, abs=1)
        assert all(one.end == after.begin for one, after in itertools.pairwise(work))
        traced = [e for e in panel["events"] if e["pid"] == rank and e["dur"] > 0 and begin <= e["ts"] < end]
        leaving = [e for e in panel["events"] if e["cat"] == "receive" and e["args"]["peer"] == rank]
        events = {kind: [e for e in traced if e["cat"] == kind] for kind in ("wait", "copy", "receive")}
        for kind, those in {**events, "send": leaving}.items():
            # What the kernel has taken may arrive after this rank's step.
            times = [(max(e["ts"], begin), min(e["ts"] + e["dur"], end)) for e in those]
            expected = [((first - origin) / 1e3, (last - first) / 1e3) for first, last in times if last > first]
            found = [(one.begin, one.end - one.begin) for one in mine if one.kind == kind]
            assert found == [pytest.approx(pair, abs=1e-3) for pair in sorted(expected)]
        computed = [event for event in traced if event["cat"] == "compute"]
        assert len(computed) == sum(one.kind in ("own", "peer") for one in work)
        assert {event["cat"] for event in traced} & {"send", "receive"} == (
            {"send", "receive"} if transport == "collective" else set()
        )
    bars = {kind: [] for kind in KINDS}
    for collection in axis.collections:
        edges = [path.get_extents() for path in collection.get_paths()]
        bars[collection.get_label()] += [(box.x0, box.x1) for box in edges]
    for kind in KINDS:
        expected = sorted((one.begin, one.end) for one in intervals if one.kind == kind)
        assert sorted(bars[kind]) == [pytest.approx(pair) for pair in expected]


def test_intervals_of_given_events() -> None:
    """Times before and after the step are left out, gaps are computed in, and origin is the first rank's begin."""
    events = [
        _event("call", 1_000.0, 9_000.0, operator="x", phase="forward"),
        _event("wait", 500.0, 2_000.0, peer=1, phase="forward"),
        _event("compute", 3_000.0, 4_000.0, piece=0, phase="forward"),
        _event("compute", 4_000.0, 5_000.0, piece=0, peer=1, phase="backward"),
        _event("signal", 5_000.0, 5_500.0, peer=1),
        _event("send", 8_000.0, 8_001.0, tid=2, peer=1),
        _event("receive", 8_500.0, 12_000.0, rank=1, tid=2, peer=0),
        _event("receive", 500.0, 2_000.0, rank=1, tid=2, peer=0),
        _event("wait", 2_000.0, 3_000.0, rank=1, peer=0),
    ]
    intervals = intervals_of({"spans": [[1_000.0, 10_000.0], [0.0, 4_000.0]], "events": events})
    assert intervals == [
        Interval(0, "works", "wait", 1.0, 2.0, 1, "forward"),
        Interval(0, "works", "other", 2.0, 3.0),
        Interval(0, "works", "own", 3.0, 4.0, None, "forward"),
        Interval(0, "works", "peer", 4.0, 5.0, 1, "backward"),
        Interval(0, "works", "other", 5.0, 10.0),
        Interval(0, "sends", "send", 1.0, 2.0, 1),
        Interval(0, "sends", "send", 8.5, 10.0, 1),
        Interval(1, "works", "other", 0.0, 2.0),
        Interval(1, "works", "wait", 2.0, 3.0, 0),
        Interval(1, "works", "other", 3.0, 4.0),
        Interval(1, "receives", "receive", 0.5, 2.0, 0),
    ]
    expected = {"own": 1.0, "peer": 1.0, "other": 6.0, "wait": 1.0, "copy": 0.0, "send": 2.5, "receive": 0.0}
    assert totals_ms(intervals, 2)[0] == expected


def test_arrows_with_one_end_are_left_out() -> None:
    def arrow(kind: str, name: str) -> dict[str, Any]:
        return {"ph": kind, "id": name}

    documents = [
        {"traceEvents": [arrow("s", "a"), arrow("s", "b")]},
        {"traceEvents": [arrow("f", "b"), arrow("f", "c")]},
    ]
    assert merge_events(documents) == [arrow("s", "b"), arrow("f", "b")]


def _run_with_a_wrong_operator(rank: int, world_size: int, settings: TimelineSettings) -> list[Panel]:
    right = workload.ops.all_gather_linear

    def wrong(*arguments: Any, config: Any, **others: Any) -> Any:
        y = right(*arguments, config=config, **others)
        if config.mode != "fused" or isinstance(y, tuple):  # of several weights: a layer's, which stays right
            return y
        return y + torch.eye(*y.shape) * (rank == 1)

    workload.ops.all_gather_linear = wrong
    try:
        return run_timeline(rank, world_size, settings)
    finally:
        workload.ops.all_gather_linear = right


def test_a_wrong_result_has_no_timeline() -> None:
    with RankPool(2) as pool:
        panels, again = pool.run(_run_with_a_wrong_operator, _settings("symmetric"))
    assert panels == again
    found = {panel["name"]: panel for panel in panels if panel["level"] == "operator"}
    assert "spans" in found["unfused"] and "spans" not in found["fused"]
    assert found["fused"]["wrong"].startswith("errors {'output': ")
    with pytest.raises(ValueError, match="timeline of at least one variant"):
        panels_of(_document([found["fused"]]))


def test_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["overlap.py", "--timeline", str(tmp_path / "a.png"), "--quick", "--repeats", "1"])
    assert overlap.main() == 0
    text = capsys.readouterr().out
    assert "2 ranks of 1 thread over shared memory" in text and "waits" in text
    assert (tmp_path / "a.png").stat().st_size > 10_000
    document = json.loads((tmp_path / "a.json").read_text())
    assert problems_of(document) == []
    draw(document, tmp_path / "b.png")  # from the file, as benchmarks.timeline.plot does
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.slow
@pytest.mark.without_ranks
def test_program_on_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        check_machine()
    except HostsError as error:
        pytest.skip(str(error))
    options = [
        "--timeline",
        "--hosts",
        "2",
        "--link",
        "400mbit",
        "--quick",
        "--repeats",
        "1",
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["overlap.py", *options])
    assert overlap.main() == 0
    assert "Scale model of 400 Mb/s, 2 hosts (400 Mb/s each way)" in " ".join(capsys.readouterr().out.split())
    (path,) = tmp_path.glob("timeline-*.json")
    assert path.with_suffix(".png").stat().st_size > 10_000
    document = json.loads(path.read_text())
    assert problems_of(document) == []
    for panel in panels_of(document):
        for total in totals_ms(intervals_of(panel), 2):
            assert total["send"] > 0 and total["receive"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (["step.svg"], "expected a path that ends in .png, got step.svg"),
        (["--memory"], "expected it without --memory"),
        (["--full"], "expected it without --full"),
        (["--gathered", "save"], "expected it without --gathered"),
        (["--auto"], "expected it without --auto"),
        (["--level", "model"], "expected it without --level model"),
        (["--shapes", "64x64", "128x64"], "expected one of --shapes, got 64x64 128x64"),
        (["--hosts", "2", "--link", "100", "200"], "expected one of --link, got 100 200"),
    ),
)
def test_usage(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        overlap.parse(["--timeline", *options])
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_cost_is_counted_in_events(ranks: RankPools) -> None:
    rows, again = ranks(2).run(measure_cost, CostSettings(rounds=2, tokens=64, shape=(64, 128), events=1000))
    assert [row["name"] for row in rows] == [row["name"] for row in again]
    assert len(rows) == 4
    for row in rows:
        assert row["ratio"] == sorted(row["ratio"]) and row["ratio"][0] > 0
        assert row["events"] > 5 and row["events_share"] > 0 and row["write_s"] > 0
