"""Draws timelines: ``python -m benchmarks.timeline.plot timeline-*.json -o timeline.png``.

A panel for each variant, in it each rank's lanes below one another: what its thread does, what its links send and
receive.  White lines part the chunks.  Panels of one level share their axis.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # writes files; needs no display

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.timeline.intervals import KINDS, LANES, Interval, Kind, Lane, intervals_of, totals_ms

__all__ = ["draw", "make_figure", "panels_of"]

_COLORS: dict[Kind, str] = {
    "own": "#1f4e79",
    "peer": "#5b9bd5",
    "other": "#bdd7ee",
    "wait": "#d7301f",
    "copy": "#7f6000",
    "send": "#f4a63a",
    "receive": "#6aa84f",
}
_WIDTH = 9.0
_LANE = 0.13
_AROUND_PANEL, _AROUND_LEVEL, _AROUND_ALL = 0.25, 0.55, 1.0
_HEIGHTS: dict[Lane, float] = {"works": 0.92, "sends": 0.66, "receives": 0.66}
_PARTED = 0.004  # share of the axis from which a chunk is wide enough for a line beside it
_BACKWARD: dict[str, Any] = {"color": "black", "linewidth": 0.9, "linestyle": ":"}
Panel = dict[str, Any]


def panels_of(document: dict[str, Any]) -> list[Panel]:
    """The panels that have a timeline, with the trace events of each.

    Raises:
        ValueError: the document is no timeline, or no variant of it has one.
    """
    described = document.get("timeline", {})
    panels = [panel for panel in described.get("panels", ()) if "spans" in panel]
    if not panels:
        raise ValueError("expected a file of overlap.py --timeline, with the timeline of at least one variant")
    events = document["traceEvents"]
    found = []
    for panel in panels:
        first, last = min(begin for begin, _ in panel["spans"]), max(end for _, end in panel["spans"])
        mine = [e for e in events if e["ph"] == "X" and e["ts"] < last and e["ts"] + e["dur"] > first]
        found.append({**panel, "events": mine})
    return found


def draw(document: dict[str, Any], path: Path) -> None:
    """Writes a PNG.

    Raises:
        ValueError: as :func:`panels_of`.
    """
    figure = make_figure(document)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def make_figure(document: dict[str, Any]) -> Figure:
    """The figure; its bars carry the name of what they show as their label.

    Raises:
        ValueError: as :func:`panels_of`.
    """
    panels = panels_of(document)
    drawn = [intervals_of(panel) for panel in panels]
    lanes = [_lanes(intervals) for intervals in drawn]
    levels = [panel["level"] for panel in panels]
    ends = [index + 1 == len(levels) or levels[index + 1] != level for index, level in enumerate(levels)]
    begins = [True, *ends[:-1]]
    heights = [_LANE * len(rows) for rows in lanes]
    space = [_AROUND_PANEL + _AROUND_LEVEL * begin for begin in begins]
    total = sum(heights) + sum(space) + _AROUND_ALL
    figure = plt.figure(figsize=(_WIDTH, total))
    top = total - _AROUND_ALL + _AROUND_LEVEL * 0.6
    for index, (panel, intervals, rows) in enumerate(zip(panels, drawn, lanes, strict=True)):
        top -= space[index]
        axis = figure.add_axes((0.09, (top - heights[index]) / total, 0.895, heights[index] / total))
        longest = max(
            o.end for other, p in zip(drawn, panels, strict=True) if p["level"] == panel["level"] for o in other
        )
        _draw_panel(axis, panel, intervals, rows, longest)
        if begins[index]:
            axis.text(0, 1 + 0.30 / heights[index], panel["what"], transform=axis.transAxes, fontsize=9, weight="bold")
        if ends[index]:
            axis.set_xlabel("ms", fontsize=8, labelpad=1)
        else:
            axis.tick_params(labelbottom=False)
        top -= heights[index]
    figure.text(0.012, 1 - 0.08 / total, document["timeline"]["title"], fontsize=9.5, va="top")
    shown = {one.kind for intervals in drawn for one in intervals}
    patches = [Patch(color=_COLORS[kind], label=label) for kind, label in KINDS.items() if kind in shown]
    handles: list[Any] = [*patches]
    if any(one.phase == "backward" for intervals in drawn for one in intervals):
        handles.append(Line2D([], [], label="backward begins", **_BACKWARD))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.24 / total),
        ncols=3,
        frameon=False,
        fontsize=8,
        handlelength=1.2,
        columnspacing=1.2,
        labelspacing=0.3,
    )
    return figure


def _lanes(intervals: Sequence[Interval]) -> list[tuple[int, Lane]]:
    """Every lane in which something happens on some rank, for each rank."""
    used = {one.lane for one in intervals}
    ranks = sorted({one.rank for one in intervals})
    return [(rank, lane) for rank in ranks for lane in LANES if lane in used]


def _draw_panel(
    axis: Any, panel: Panel, intervals: Sequence[Interval], lanes: Sequence[tuple[int, Lane]], longest: float
) -> None:
    for place, (rank, lane) in enumerate(lanes):
        height = _HEIGHTS[lane]
        for kind in KINDS:
            mine = [one for one in intervals if (one.rank, one.lane, one.kind) == (rank, lane, kind)]
            if mine:
                widths = [one.end - one.begin for one in mine]
                axis.broken_barh(
                    [(one.begin, width) for one, width in zip(mine, widths, strict=True)],
                    (place - height / 2, height),
                    facecolors=_COLORS[kind],
                    edgecolors="white",
                    linewidths=[0.4 if width > _PARTED * longest else 0.0 for width in widths],
                    label=kind,
                )
    axis.set_xlim(0, longest)
    axis.set_ylim(len(lanes) - 0.45, -0.55)
    names = [f"rank {rank}" if lane == "works" else lane for rank, lane in lanes]
    axis.set_yticks(range(len(lanes)), names, fontsize=7)
    axis.tick_params(axis="y", length=0, pad=2)
    axis.tick_params(axis="x", labelsize=7, length=2, pad=1)
    axis.spines[["top", "right", "left"]].set_visible(False)
    backward = [one.begin for one in intervals if one.phase == "backward"]
    if backward:
        axis.axvline(min(backward), **_BACKWARD)
    axis.set_title(_summary(panel, intervals), fontsize=8, loc="left", pad=2)


def _summary(panel: Panel, intervals: Sequence[Interval]) -> str:
    totals = totals_ms(intervals, len(panel["spans"]))
    shares = [
        100 * total["wait"] * 1e3 / (end - begin) for total, (begin, end) in zip(totals, panel["spans"], strict=True)
    ]
    waits = " and ".join(f"{share:.0f} %" for share in shares)
    rounds = len(panel["samples_s"])
    of = f", median of {rounds}" if rounds > 1 else ""
    return f"{panel['name']}: {panel['samples_s'][panel['drawn']] * 1e3:.0f} ms{of}; ranks wait {waits} of it"


def main() -> int:
    """Reads a JSON file, writes a PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON file of overlap.py --timeline")
    parser.add_argument("-o", "--output", type=Path, help="PNG to write (default: beside the JSON file)")
    arguments = parser.parse_args()
    output = arguments.output or arguments.result.with_suffix(".png")
    try:
        draw(json.loads(arguments.result.read_text()), output)
    except (OSError, ValueError) as error:
        print(f"{arguments.result}: {error}", file=sys.stderr)
        return 1
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
