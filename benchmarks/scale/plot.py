"""Plots of the scale model: ``python -m benchmarks.scale.plot scale-*.json -o model.png``.

Time of every variant beside its limit; and, from one or several results, step time over L at one rate of the link for
each strategy and peer, and over the rate for one shape: medians as points, the distance of the quartiles as whiskers,
limits as lines.  Every panel says that it is a scale model, and of what.

Points are joined only where they are known to be comparable: measured on one machine over frames of one size, under one
congestion control.  A result that does not say its frames' size is joined with no other one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # writes files; needs no display

import matplotlib.pyplot as plt

from benchmarks.scale.report import describe

__all__ = ["Measured", "Panel", "Point", "draw", "measured_rows", "over_rate", "over_tokens"]

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
_MARKERS = "osD^v<>P"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row of one result.

    Attributes:
        origin: the machine, frames and congestion control, in words; rows of equal origins can be compared.
        part, row: of the result.
    """

    origin: str
    part: dict[str, Any]
    row: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Point:
    """``seconds`` with the distance of the quartiles, ``spread``, in seconds; measured at ``at``."""

    at: float
    seconds: float
    spread: float = 0.0


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines over one quantity, by (origin, name): what was measured, and for each strategy what limits it."""

    title: str
    label: str
    measured: dict[tuple[str, str], list[Point]]
    limits: dict[tuple[str, str], list[Point]]


def draw(document: dict[str, Any], path: Path, *others: dict[str, Any], bars: bool = True) -> None:
    """Writes a PNG of all rows of ``document`` and ``others``; without ``bars`` only lines over L and over the rate.

    Raises:
        ValueError: if a document is of another kind, or there is nothing to draw.
    """
    documents = (document, *others)
    found = [one for each in documents for one in measured_rows(each)]
    panels = [*over_tokens(found), *over_rate(found)]
    pairs = [(one.part, one.row) for one in found] if bars else []
    if not pairs and not panels:
        raise ValueError("expected rows of one shape at two rates, or of two lengths at one rate, for a line; got none")
    heights = [1.2 + 0.26 * len(row["entries"]) for _, row in pairs] + [_LINE_HEIGHT] * len(panels)
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(_WIDTH, sum(heights) + 1), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    places = [axis[0] for axis in axes]
    for axis, (part, row) in zip(places, pairs, strict=False):
        _draw_bars(axis, part, row)
    for axis, panel in zip(places[len(pairs) :], panels, strict=True):
        _draw_lines(axis, panel)
    kinds = sorted({f"{each['arguments']['dtype']}, {each['machine']['processor']}" for each in documents})
    figure.suptitle(
        f"Scale model: 2 hosts of one core each on one machine, {'; '.join(kinds)}",
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


def measured_rows(document: dict[str, Any]) -> list[Measured]:
    """Rows of one result.

    Raises:
        ValueError: if the result is of another kind, or has none.
    """
    if document.get("kind") != "scale" or not any(part["rows"] for part in document.get("parts", ())):
        raise ValueError(f'expected a result of kind "scale" with rows, got kind {document.get("kind")!r}')
    machine = document["machine"]
    place = f"{machine['processor']}, {machine.get('cores', '?')} cores, {document['arguments']['dtype']}"
    found = []
    for part in document["parts"]:
        frames = part.get("frame_bytes")
        size = f"frames of {frames:,} bytes" if frames else f"frames not recorded, run of {document.get('date', '?')}"
        control = part.get("congestion_control")
        size += f", {control}" if control else ""
        found += [Measured(f"{place}, {size}", part, row) for row in part["rows"]]
    return found


def over_tokens(found: list[Measured]) -> list[Panel]:
    """Step time over the length: a panel for each rate of the link and width that has several lengths."""
    groups: dict[tuple[str, float, int, int], list[tuple[float, Measured]]] = defaultdict(list)
    for one in found:
        if "variants" in one.row:
            key = (one.part["title"], one.part["bits_per_s"], one.row.get("layers", 1), one.row["hidden"])
            groups[key].append((one.row["tokens"], one))
    return [
        _panel(
            f"{title} ({rate / 1e6:.0f} Mb/s): {_depth(layers)}, d = {hidden}, step over the length", "tokens L", rows
        )
        for (title, rate, layers, hidden), rows in groups.items()
        if len({at for at, _ in rows}) > 1
    ]


def _depth(layers: int) -> str:
    return "one layer" if layers == 1 else f"{layers} layers"


def over_rate(found: list[Measured]) -> list[Panel]:
    """Step time over the link's rate: a panel for each shape that was measured at several rates."""
    groups: dict[str, list[tuple[float, Measured]]] = defaultdict(list)
    for one in found:
        groups[describe(one.row)].append((one.part["bits_per_s"] / 1e6, one))
    panels = []
    for what, rows in groups.items():
        if len({at for at, _ in rows}) > 1:
            labels = ", ".join(dict.fromkeys(f"{one.part['label']} at {at:.0f}" for at, one in _ordered(rows)))
            title = f"scale model, 2 hosts: {what}, over the link's rate\n({labels})"
            panels.append(_panel(title, "rate of the link, Mb/s", rows))
    return panels


def _ordered(rows: list[tuple[float, Measured]]) -> list[tuple[float, Measured]]:
    return sorted(rows, key=lambda pair: pair[0])


def _panel(title: str, label: str, rows: list[tuple[float, Measured]]) -> Panel:
    measured: dict[tuple[str, str], list[Point]] = defaultdict(list)
    limits: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for at, one in _ordered(rows):
        lowest: dict[str, float] = {}
        for entry in one.row["entries"]:
            name = entry["name"]
            if name.endswith("alone"):
                continue
            measured[one.origin, name].append(Point(at, entry["median_s"], entry["spread"] * entry["median_s"]))
            if "limit_s" in entry:
                strategy = _limited(one.row, name)
                lowest[strategy] = min(entry["limit_s"], lowest.get(strategy, entry["limit_s"]))
        for strategy, seconds in lowest.items():
            limits[one.origin, strategy].append(Point(at, seconds))
    return Panel(title, label, dict(measured), dict(limits))


def _limited(row: dict[str, Any], name: str) -> str:
    """What shares a limit: all modes of a strategy, whose bytes and compute are equal; else the variant alone."""
    variant = row.get("variants", {}).get(name, {})
    return str(variant["strategy"]) if variant.get("kind") == "ours" else name


def _draw_lines(axis: Any, panel: Panel) -> None:
    origins = sorted({origin for origin, _ in panel.measured})
    for (origin, name), points in panel.measured.items():
        marker = _MARKERS[origins.index(origin) % len(_MARKERS)]
        axis.errorbar(
            [point.at for point in points],
            [point.seconds for point in points],
            yerr=[point.spread / 2 for point in points],
            linestyle=next((line for mode, line in _STYLES.items() if f"{mode} " in name), "-."),
            marker=marker,
            markersize=4,
            capsize=2,
            color=_color(name),
            label=name if len(origins) == 1 else f"{marker} {name}",
        )
    for number, ((_, strategy), points) in enumerate(panel.limits.items()):
        axis.plot(
            [point.at for point in points],
            [point.seconds for point in points],
            linewidth=0.8,
            alpha=0.6,
            color=_color(strategy),
            label="_limit" if number else "thin: limit = max(compute alone, wire)",
        )
    axis.set_xscale("log", base=2)
    places = sorted({point.at for points in panel.measured.values() for point in points})
    axis.set_xticks(places, [f"{at:.0f}" for at in places])
    axis.set_yscale("log")
    notes = [f"{_MARKERS[n % len(_MARKERS)]} {origin}" for n, origin in enumerate(origins)]
    note = "" if len(origins) == 1 else "\nnot joined, because not known to be comparable: " + "; ".join(notes)
    axis.set_title(panel.title + note, fontsize=8, wrap=True)
    axis.set_xlabel(panel.label, fontsize=8)
    axis.set_ylabel("seconds for a step", fontsize=8)
    axis.legend(fontsize=6, ncols=2)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> int:
    """Reads JSON files, writes a PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of overlap.py --hosts")
    parser.add_argument("-o", "--output", type=Path, help="PNG to write (default: beside the first file)")
    parser.add_argument("--lines", action="store_true", help="only step time over L and over the link's rate")
    arguments = parser.parse_args()
    output = arguments.output or arguments.results[0].with_suffix(".png")
    try:
        documents = {path: json.loads(path.read_text()) for path in arguments.results}
        for path in [path for path, document in documents.items() if document.get("kind") == "predictions"]:
            print(f"{path}: left out, because predictions are not measured rows", file=sys.stderr)
            del documents[path]
        if not documents:
            raise ValueError("expected a result of overlap.py --hosts, got predictions only")
        first, *others = documents.values()
        draw(first, output, *others, bars=not arguments.lines)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
