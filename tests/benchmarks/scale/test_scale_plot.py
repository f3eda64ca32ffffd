"""Lines of the scale model's plots: what is drawn is what is stored, and what cannot be compared is not joined."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.container import ErrorbarContainer

from benchmarks.scale import plot

pytestmark = pytest.mark.without_ranks

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "cpu-2cores"
TESTED = RESULTS / "predictions" / "scale-20261129-043107.json"  # three shapes at three rates
CALIBRATED = RESULTS / "predictions" / "scale-20261129-041957.json"
MODE = "tp_sp pipelined collective"


def stored(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def entries(document: dict[str, Any], name: str, **row_is: Any) -> dict[tuple[float, int], dict[str, Any]]:
    """Entries of one variant by (rate in Mb/s, tokens)."""
    return {
        (part["bits_per_s"] / 1e6, row["tokens"]): entry
        for part in document["parts"]
        for row in part["rows"]
        if all(row[key] == value for key, value in row_is.items())
        for entry in row["entries"]
        if entry["name"] == name
    }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that were drawn; nobody looks at their files, which take seconds each (``test_command`` writes one)."""
    figures: list[Any] = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    for rendering in ("tight_layout", "savefig"):
        monkeypatch.setattr(plot.plt.Figure, rendering, lambda *_, **__: None)
    return figures


def points(axis: Any, label: str) -> list[list[tuple[float, float, float]]]:
    """(place, seconds, whisker from end to end) of each line with whiskers that has this label."""
    found = []
    for container in axis.containers:
        if isinstance(container, ErrorbarContainer) and container.get_label().endswith(label):
            line, _, (bars,) = container.lines
            ends = [float(segment[1][1] - segment[0][1]) for segment in bars.get_segments()]
            found.append([(*map(float, point), end) for point, end in zip(line.get_xydata(), ends, strict=True)])
    return found


def test_lines_are_the_stored_numbers(tmp_path: Path, drawn: list[Any]) -> None:
    document = stored(TESTED)
    plot.draw(document, tmp_path / "lines.png", bars=False)
    axes = {(axis.get_xlabel(), axis.get_title()): axis for axis in drawn[0].axes}
    # d = 256 has two lengths at each of three rates; each of three shapes has three rates.
    over_tokens = [axis for (label, _), axis in axes.items() if label == "tokens L"]
    over_rate = [axis for (label, _), axis in axes.items() if label == "rate of the link, Mb/s"]
    assert (len(over_tokens), len(over_rate)) == (3, 3)
    for rate in (80, 160, 320):
        (axis,) = (axis for axis in over_tokens if f"({rate} Mb/s)" in axis.get_title())
        expected = entries(document, MODE, hidden=256)
        ((*found,),) = points(axis, MODE)
        assert [point[0] for point in found] == [2048, 3072]
        for tokens, seconds, whisker in found:
            entry = expected[rate, int(tokens)]
            assert seconds == entry["median_s"]
            assert whisker == pytest.approx(entry["median_s"] * entry["spread"], rel=1e-9)
    (axis,) = (axis for axis in over_rate if "L2048 d256" in axis.get_title())
    expected = entries(document, MODE, tokens=2048)
    ((*found,),) = points(axis, MODE)
    assert [(at, seconds) for at, seconds, _ in found] == [
        (rate, expected[rate, 2048]["median_s"]) for rate in (80, 160, 320)
    ]
    # Its limit: of all modes of the strategy, the lowest.
    modes = [f"tp_sp {mode} collective" for mode in ("unfused", "fused", "pipelined")]
    limits = [
        (rate, min(entries(document, mode, tokens=2048)[rate, 2048]["limit_s"] for mode in modes))
        for rate in (80, 160, 320)
    ]
    lines = [[tuple(map(float, point)) for point in line.get_xydata()] for line in axis.lines]
    assert limits in lines


def test_every_variant_has_its_line() -> None:
    document = stored(TESTED)
    (panel, *_) = plot.over_rate(plot.measured_rows(document))
    names = {entry["name"] for entry in document["parts"][0]["rows"][0]["entries"]}
    assert {name for _, name in panel.measured} == {name for name in names if not name.endswith("alone")}
    assert {name for _, name in panel.limits} == {"tp", "tp_sp", "ulysses", "odysseus", "tsp"}


def test_other_frames_and_machines_are_not_joined(tmp_path: Path, drawn: list[Any]) -> None:
    first, second = stored(TESTED), stored(CALIBRATED)

    def lines(*documents: dict[str, Any]) -> tuple[list[list[float]], str]:
        drawn.clear()
        plot.draw(documents[0], tmp_path / "lines.png", *documents[1:], bars=False)
        (axis,) = (
            axis
            for axis in drawn[0].axes
            if axis.get_xlabel() == "tokens L" and "(160 Mb/s)" in axis.get_title() and "d = 256" in axis.get_title()
        )
        return sorted([at for at, _, _ in line] for line in points(axis, MODE)), axis.get_title()

    apart = [[512, 4096], [2048, 3072]]
    found, title = lines(first, second)
    assert found == [[512, 2048, 3072, 4096]]
    assert "not joined" not in title

    older, old = copy.deepcopy(first), copy.deepcopy(second)
    for part in [*older["parts"], *old["parts"]]:
        del part["frame_bytes"]
    found, title = lines(older, old)
    assert found == apart
    assert "not joined" in title and title.count("frames not recorded, run of 2026-11-29") == 2

    smaller = copy.deepcopy(second)
    smaller["parts"][0]["frame_bytes"] = 1500
    found, title = lines(first, smaller)
    assert found == apart and "frames of 1,500 bytes" in title and "frames of 9,000 bytes" in title

    controlled = copy.deepcopy(second)
    controlled["parts"][0]["congestion_control"] = "reno"
    found, title = lines(first, controlled)
    assert found == apart and "frames of 9,000 bytes, reno" in title

    elsewhere = copy.deepcopy(second)
    elsewhere["machine"]["processor"] = "another processor"
    found, title = lines(first, elsewhere)
    assert found == apart and "another processor" in title


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    image, predicted = tmp_path / "lines.png", RESULTS / "predictions" / "predictions.json"

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["plot", *map(str, arguments)])
        return plot.main()

    assert run(TESTED, CALIBRATED, predicted, "--lines", "-o", image) == 0
    assert image.stat().st_size > 10_000
    assert "predictions.json: left out, because predictions are not measured rows" in capsys.readouterr().err
    assert run(predicted, "-o", tmp_path / "none.png") == 1
    assert "got predictions only" in capsys.readouterr().err
    assert run(RESULTS / "scale-20261128-190617.json", "--lines", "-o", tmp_path / "none.png") == 1
    assert "two rates, or of two lengths" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()
