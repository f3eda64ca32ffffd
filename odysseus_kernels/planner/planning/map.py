"""Which strategy is best, by sequence length and number of ranks, as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from odysseus_kernels.planner.formulas import STRATEGIES
from odysseus_kernels.planner.planning.plan import Plan, SplitPlan, plan

__all__ = ["MapCell", "best_by_size", "draw_map"]

_COLORS = {"tp": "#a6a6a6", "tp_sp": "#1f4e79", "ulysses": "#c55a11", "odysseus": "#548235", "tsp": "#7030a0"}
_NONE = "#ffffff"
_LONGEST = 1 << 24
_LEAST_LENGTH = 1 << 12


@dataclasses.dataclass(frozen=True)
class MapCell:
    """One length on one number of ranks.

    Attributes:
        world_size, seq_len: which.
        first: the first split of the plan, or None where none is possible.
    """

    world_size: int
    seq_len: int
    first: SplitPlan | None


def best_by_size(world_sizes: Sequence[int], lengths: Sequence[int], **arguments: Any) -> list[MapCell]:
    """The first split at each size; ``arguments`` are those of :func:`odysseus_kernels.plan` beside the two.

    Raises:
        ValueError: no size has a split.
    """
    cells, refusal = [], ""
    for world_size in world_sizes:
        for seq_len in lengths:
            first: SplitPlan | None = None
            try:
                first = plan(world_size=world_size, seq_len=seq_len, **arguments).splits[0]
            except ValueError as error:
                refusal = str(error)
            cells.append(MapCell(world_size, seq_len, first))
    if all(cell.first is None for cell in cells):
        raise ValueError(refusal)
    return cells


def draw_map(found: Plan, path: str | Path, **arguments: Any) -> list[MapCell]:
    """Writes a PNG of the best strategy around a plan: 1 to 8 times its ranks and less, lengths from 4,096 on.

    Colours are strategies; what does not fit, or has no split, is hatched.

    Args:
        found: gives ranks and length, which are marked.
        path: of the picture.
        **arguments: those of :func:`odysseus_kernels.plan` but ``world_size`` and ``seq_len``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = _doubled(1, max(8, 8 * found.world_size), found.world_size)
    lengths = _doubled(min(_LEAST_LENGTH, found.seq_len), max(_LONGEST // 16, 4 * found.seq_len), found.seq_len)
    cells = best_by_size(ranks, lengths, **arguments)
    figure = Figure(figsize=(2 + 0.62 * len(lengths), 1.8 + 0.42 * len(ranks)))
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for cell in cells:
        x, y = lengths.index(cell.seq_len), ranks.index(cell.world_size)
        here = {"xy": (x - 0.5, y - 0.5), "width": 1, "height": 1, "edgecolor": "white", "linewidth": 0.5}
        if cell.first is not None and cell.first.fits:
            axis.add_patch(_rectangle(facecolor=_COLORS[cell.first.split.strategy], **here))
            split = cell.first.split
            label = f"{split.seq}" if split.ring == 1 else f"{split.seq}x{split.ring}"
            axis.text(x, y, label, ha="center", va="center", fontsize=6, color="white")
        else:
            axis.add_patch(_rectangle(facecolor=_NONE, **{**here, "edgecolor": "#999999"}, hatch="////"))
    mark = {"xy": (lengths.index(found.seq_len) - 0.5, ranks.index(found.world_size) - 0.5), "width": 1, "height": 1}
    axis.add_patch(_rectangle(fill=False, edgecolor="black", linewidth=2, **mark))
    axis.set_xlim(-0.5, len(lengths) - 0.5)
    axis.set_ylim(-0.5, len(ranks) - 0.5)
    axis.set_xticks(range(len(lengths)), [_short(n) for n in lengths], fontsize=7)
    axis.set_yticks(range(len(ranks)), [f"{n:,}" for n in ranks], fontsize=7)
    axis.set_xlabel("tokens of a sequence", fontsize=8)
    axis.set_ylabel("ranks", fontsize=8)
    axis.set_title(f"{found.model.name} on {found.machine.name}: fastest that fits (seq x ring)", fontsize=9)
    fitting = {cell.first.split.strategy for cell in cells if cell.first is not None and cell.first.fits}
    used = [name for name in STRATEGIES if name in fitting]
    handles = [Patch(facecolor=_COLORS[name], label=name) for name in used]
    handles.append(Patch(facecolor=_NONE, edgecolor="#999999", hatch="////", label="does not fit, or no split"))
    figure.legend(handles=handles, loc="lower center", ncols=6, fontsize=7)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130)
    return cells


def _rectangle(**arguments: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(**arguments)


def _doubled(first: int, last: int, included: int) -> list[int]:
    """Powers of two times ``first`` up to ``last``, and ``included``."""
    sizes = {included}
    while first <= last:
        sizes.add(first)
        first *= 2
    return sorted(sizes)


def _short(number: int) -> str:
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if number % size == 0:
            return f"{number // size}{unit}"
    return f"{number:,}"
