"""Plots of a result of ``overlap.py --level layer`` or ``model``: ``python -m benchmarks.layers.plot results.json``.

For each case, time over the same compute without communication, bytes that a rank sends beside the formula and beside
what the original's table claims, and memory beside the formula.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # writes files; needs no display

import matplotlib.pyplot as plt

from benchmarks.layers.original import ORIGINAL

__all__ = ["draw"]

_COLORS = {
    ("unfused", "collective"): "#f4b183",
    ("fused", "collective"): "#c55a11",
    ("unfused", "symmetric"): "#9dc3e6",
    ("fused", "symmetric"): "#1f4e79",
}
_PEER = "#7f7f7f"
_MARK = {"color": "black", "marker": "|", "markersize": 11, "linestyle": "none"}
_CLAIM = {"color": "#c00000", "marker": "x", "markersize": 5, "linestyle": "none"}


def draw(document: dict[str, Any], path: Path) -> None:
    """Writes a PNG with a row of three panels for each case.  Variants whose result was wrong have no bar.

    Raises:
        ValueError: if ``document`` is of another kind, or has no rows.
    """
    if document.get("kind") not in ("layer", "model") or not document.get("rows"):
        raise ValueError(f'expected a result of kind "layer" or "model" with rows, got kind {document.get("kind")!r}')
    rows = document["rows"]
    heights = [1.2 + 0.24 * len(row["variants"]) for row in rows]
    figure, axes = plt.subplots(
        len(rows), 3, figsize=(20, sum(heights) + 1.4), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for (times, sent, memory), row in zip(axes, rows, strict=True):
        _draw_times(times, row)
        _draw_bytes(sent, row)
        _draw_memory(memory, row)
    given, machine = document["arguments"], document["machine"]
    figure.suptitle(
        f"{given['ranks']} ranks × {given['threads']} thread(s), {given['dtype']}, {machine['processor']}, "
        f"{machine['cores']} cores; median of {given['repeats']} rounds, whiskers: quartile distance",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / (sum(heights) + 1.4)))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _color(variant: dict[str, Any]) -> str:
    return _COLORS.get((variant["mode"], variant["transport"]), _PEER)


def _finish(axis: Any, names: list[str], title: str, label: str) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(label, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_times(axis: Any, row: dict[str, Any]) -> None:
    names = [name for name, found in row["figures"].items() if "over_alone" in found]
    for place, name in enumerate(names):
        found = row["figures"][name]
        whisker = found["over_alone"] * found["spread"] / 2
        axis.barh(place, found["over_alone"], 0.75, xerr=whisker, color=_color(row["variants"][name]), ecolor="#404040")
    axis.axvline(1.0, color="black", linewidth=1, linestyle="--")
    _finish(axis, names, f"{row['label']} {row['sizes']}: time over compute alone", "1 = all communication is hidden")


def _draw_bytes(axis: Any, row: dict[str, Any]) -> None:
    names = list(row["bytes"])
    size = {"float64": 8, "float32": 4}.get(row["dtype"], 2)
    share = (row["world"] - 1) / row["world"]
    claims = {published.strategy: published for published in ORIGINAL}
    labelled = set()
    for place, name in enumerate(names):
        entry, variant = row["bytes"][name], row["variants"][name]
        axis.barh(place, sum(entry["recorded"].values()) / 2**20, 0.75, color=_color(variant))
        marks = [(sum(entry["formula"].values()) / 2**20, "formula", _MARK)]
        claim = claims.get(variant["strategy"])
        if claim is not None and variant["ring"] == 1 and row["level"] == "layer":
            sizes = (row["tokens"], row["hidden"], row["intermediate"])
            claimed = share * size * (claim.activations(*sizes) + claim.weights(*sizes))
            marks.append((claimed / 2**20, "the original's table, × (N−1)/N", _CLAIM))
        for value, label, style in marks:
            axis.plot([value], [place], label=None if label in labelled else label, **style)
            labelled.add(label)
    _finish(axis, names, "bytes that a rank sends in a step (bars: recorded)", "MiB")
    if labelled:
        axis.legend(fontsize=7, loc="lower right")


def _draw_memory(axis: Any, row: dict[str, Any]) -> None:
    names = list(row["memory"])
    labelled = set()
    for place, name in enumerate(names):
        entry = row["memory"][name]
        axis.barh(place, entry["peak"] / 2**20, 0.75, color="#e0e0e0")
        axis.barh(place, entry["saved"] / 2**20, 0.45, color=_color(row["variants"][name]))
        if "formula" in entry:
            label = None if labelled else "formula"
            axis.plot([sum(entry["formula"].values()) / 2**20], [place], label=label, **_MARK)
            labelled.add("formula")
    _finish(axis, names, "memory: saved for backward, and peak of a step (grey)", "MiB")
    if labelled:
        axis.legend(fontsize=7, loc="lower right")


def main() -> int:
    """Reads a JSON file, writes a PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON file of overlap.py")
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
