"""Plots of the scale model: ``python -m benchmarks.scale.plot scale-*.json -o model.png``.

Time of every variant beside its limit; and, from one or several results, step time over L for each strategy and peer,
and over the link's rate.  Every panel says that it is a scale model, and of what.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # writes files; needs no display

import matplotlib.pyplot as plt

from benchmarks.scale.report import describe

__all__ = ["draw"]

_WIDTH = 9.0
_LINE_HEIGHT = 5.0
_COLORS = {
    "odysseus": "#1f4e79",
    "tp_sp": "#c55a11",
    "tp": "#7f6000",
    "ulysses": "#548235",
    "torch SP-TP": "#f4b183",
    "torch TP": "#bfa15a",
    "FSDP2 + Ulysses": "#a9d18e",
    "unfused": "#9dc3e6",
    "fused": "#1f4e79",
    "torch": "#7f7f7f",
    "communication": "#d0cece",
}
_STYLES = {"unfused": "--", "fused": "-", "pipelined": ":"}
Point = tuple[float, float]


def draw(document: dict[str, Any], path: Path, *others: dict[str, Any]) -> None:
    """Writes a PNG; ``others`` are further results whose points go into the same lines.

    Raises:
        ValueError: if a document is of another kind, or has no rows.
    """
    pairs = []
    for each in (document, *others):
        if each.get("kind") != "scale" or not any(part["rows"] for part in each.get("parts", ())):
            raise ValueError(f'expected a result of kind "scale" with rows, got kind {each.get("kind")!r}')
        pairs += [(part, row) for part in each["parts"] for row in part["rows"]]
    lines = [*_over_tokens(pairs), *_over_rate(pairs)]
    heights = [1.2 + 0.26 * len(row["entries"]) for _, row in pairs] + [_LINE_HEIGHT] * len(lines)
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(_WIDTH, sum(heights) + 1), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    places = [axis[0] for axis in axes]
    for axis, (part, row) in zip(places, pairs, strict=False):
        _draw_bars(axis, part, row)
    for axis, (title, label, series) in zip(places[len(pairs) :], lines, strict=True):
        _draw_lines(axis, title, label, series)
    machine = document["machine"]
    figure.suptitle(
        f"Scale model: 2 hosts of one core each on one machine, {document['arguments']['dtype']}, "
        f"{machine['processor']}",
        fontsize=9,
        y=1 - 0.12 / (sum(heights) + 1),
        va="top",
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / (sum(heights) + 1)))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _color(name: str) -> str:
    return _COLORS.get(name) or _COLORS.get(name.split(" ")[0], "#404040")


def _draw_bars(axis: Any, part: dict[str, Any], row: dict[str, Any]) -> None:
    entries = row["entries"]
    for place, entry in enumerate(entries):
        whisker = entry["median_s"] * entry["spread"] / 2
        axis.barh(place, entry["median_s"], 0.75, xerr=whisker, color=_color(entry["name"]), ecolor="#404040")
        if "limit_s" in entry:
            label = None if place else "limit = max(compute alone, wire)"
            style = {"color": "black", "marker": "|", "markersize": 12, "linestyle": "none"}
            axis.plot([entry["limit_s"]], [place], label=label, **style)
    axis.set_yticks(range(len(entries)), [entry["name"] for entry in entries], fontsize=7)
    axis.invert_yaxis()
    axis.set_title(f"{part['title']} ({part['bits_per_s'] / 1e6:.0f} Mb/s)\n{describe(row)}", fontsize=8)
    axis.set_xlabel("seconds", fontsize=8)
    axis.legend(fontsize=7, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)


def _series(rows: list[tuple[float, dict[str, Any]]]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = defaultdict(list)
    for at, row in rows:
        for entry in row["entries"]:
            if not entry["name"].endswith("alone"):
                found[entry["name"]].append((at, entry["median_s"]))
    return {name: sorted(points) for name, points in found.items()}


def _over_tokens(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[str, str, dict[str, list[Point]]]]:
    groups: dict[tuple[str, int], list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for part, row in pairs:
        if "variants" in row:
            groups[part["title"], row["hidden"]].append((row["tokens"], row))
    return [
        (f"{title}: one layer, d = {hidden}, step over the length", "tokens L", _series(rows))
        for (title, hidden), rows in groups.items()
        if len({at for at, _ in rows}) > 1
    ]


def _over_rate(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[str, str, dict[str, list[Point]]]]:
    groups: dict[str, list[tuple[float, dict[str, Any], str]]] = defaultdict(list)
    for part, row in pairs:
        groups[describe(row)].append((part["bits_per_s"] / 1e6, row, part["label"]))
    found = []
    for what, rows in groups.items():
        if len({at for at, _, _ in rows}) > 1:
            labels = ", ".join(f"{label} at {at:.0f}" for at, _, label in sorted(rows, key=lambda r: r[0]))
            title = f"scale model, 2 hosts: {what}, over the link's rate\n({labels})"
            found.append((title, "rate of the link, Mb/s", _series([(at, row) for at, row, _ in rows])))
    return found


def _draw_lines(axis: Any, title: str, label: str, series: dict[str, list[Point]]) -> None:
    for name, points in series.items():
        style = next((line for mode, line in _STYLES.items() if f"{mode} " in name), "-.")
        axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=_color(name), label=name)
    axis.set_xscale("log", base=2)
    places = sorted({at for points in series.values() for at, _ in points})
    axis.set_xticks(places, [f"{at:.0f}" for at in places])
    axis.set_yscale("log")
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(label, fontsize=8)
    axis.set_ylabel("seconds for a step", fontsize=8)
    axis.legend(fontsize=6, ncols=2)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> int:
    """Reads JSON files, writes a PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of overlap.py --hosts")
    parser.add_argument("-o", "--output", type=Path, help="PNG to write (default: beside the first file)")
    arguments = parser.parse_args()
    output = arguments.output or arguments.results[0].with_suffix(".png")
    try:
        first, *others = (json.loads(path.read_text()) for path in arguments.results)
        draw(first, output, *others)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
