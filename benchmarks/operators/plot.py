"""Bars from a result of overlap.py: ``python -m benchmarks.operators.plot results.json -o out.png``.

Every row's times over its matrix products alone, so that 1 is the line that hidden communication approaches.
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

__all__ = ["draw"]

_BARS = (
    ("torch", "torch.distributed + mm", "#bdbdbd"),
    ("unfused collective", "unfused, collective", "#f4b183"),
    ("fused collective", "fused, collective", "#c55a11"),
    ("unfused symmetric", "unfused, symmetric", "#9dc3e6"),
    ("fused symmetric", "fused, symmetric", "#1f4e79"),
)


def draw(document: dict[str, Any], path: Path) -> None:
    """Writes a PNG of the times of ``document`` (kind ``"overlap"``), one panel each for forward and with backward.

    Variants whose result was wrong have no bar.

    Raises:
        ValueError: if ``document`` is of another kind, or has no rows.
    """
    if document.get("kind") != "overlap" or not document.get("rows"):
        raise ValueError(f'expected a result of kind "overlap" with rows, got kind {document.get("kind")!r}')
    parts = [part for part in ("forward", "forward+backward") if any(r["part"] == part for r in document["rows"])]
    panels = [[row for row in document["rows"] if row["part"] == part] for part in parts]
    height = 1.8 + 0.85 * max(len(rows) for rows in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(8 * len(panels), height), squeeze=False)
    for axis, part, rows in zip(axes[0], parts, panels, strict=True):
        _draw_panel(axis, part, rows)
    given, machine = document["arguments"], document["machine"]
    figure.suptitle(
        f"Time over matrix products alone (lower is better, 1 = all communication hidden)\n"
        f"{given['ranks']} ranks × {given['threads']} thread(s), {given['dtype']}, {machine['processor']}, "
        f"{machine['cores']} cores; median of {given['repeats']} rounds, whiskers: quartile distance",
        fontsize=10,
    )
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(_BARS), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.6 / height, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_panel(axis: Any, part: str, rows: list[dict[str, Any]]) -> None:
    thickness = 0.8 / len(_BARS)
    for index, (name, label, color) in enumerate(_BARS):
        places, ratios, spreads = [], [], []
        for place, row in enumerate(rows):
            ratio = row["ratios"].get(f"{name} / gemm")
            if ratio is not None:
                places.append(place + (index - (len(_BARS) - 1) / 2) * thickness)
                ratios.append(ratio["paired"])
                spreads.append(ratio["paired"] * row["spreads"][name] / 2)
        style = {"elinewidth": 0.6, "ecolor": "#404040"}
        axis.barh(places, ratios, thickness * 0.95, xerr=spreads, label=label, color=color, error_kw=style)
    axis.axvline(1.0, color="black", linewidth=1, linestyle="--")
    names = [f"{row['operator']}\n{row['label']}  {row['shape']}" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_title(part, fontsize=10)
    axis.set_xlabel("time / GEMM alone")
    axis.spines[["top", "right"]].set_visible(False)


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
