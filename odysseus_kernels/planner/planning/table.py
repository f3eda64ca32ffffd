"""A plan as a table in the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from odysseus_kernels.planner.planning.plan import Plan, SplitPlan

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_plan"]

_TOP = 10
_PARTS = ("weights", "gradients", "optimizer", "saved", "transients")


def print_plan(found: Plan, console: Console | None = None, *, everything: bool = False) -> None:
    """Prints a plan.

    Args:
        found: what :func:`odysseus_kernels.plan` returned.
        console: where to; None: the terminal.
        everything: all splits instead of the first ten, and every split that was refused.
    """
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    device = found.machine.device.memory_bytes
    room = f"{device / 1e9:g} GB each" if math.isfinite(device) else "memory not known"
    how = ", checkpointing" * found.checkpointing + ", offload" * found.offload
    title = (
        f"{found.model.name} ({found.model.parameters / 1e9:.3g} B weights), {found.world_size} x {found.machine.name} "
        f"({room}), {found.batch} x {found.seq_len:,} tokens, {found.dtype}{how}"
    )
    table = Table(title=title, caption=None, title_justify="left")
    table.add_column("strategy", no_wrap=True)
    for name in ("seq", "ring", "dp", "tokens/s", "step s", "compute", "unfused", "fused", "piped", "sent GB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("GB", *_PARTS):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("binds", no_wrap=True)
    shown = found.splits if everything else found.splits[:_TOP]
    for one in shown:
        table.add_row(*_cells(one), style=None if one.fits else "dim")
    console.print(table, soft_wrap=True)
    console.print("s: seconds of a step; unfused, fused, piped: communication that stays exposed; GB: of each rank")
    if len(shown) < len(found.splits):
        console.print(f"{len(found.splits) - len(shown)} more splits: --all")
    console.print(found.why, soft_wrap=True)
    best = found.splits[0]
    sent = ", ".join(f"{name} {count / 1e9:.3g} GB" for name, count in best.traffic.by_collective().items())
    console.print(f"{best.split.name} sends on each rank: {sent or 'nothing'}", soft_wrap=True)
    for strategy, reasons in found.refused.items():
        for reason in reasons if everything else reasons[:1]:
            console.print(f"left out ({strategy}): {reason}", soft_wrap=True)
        if not everything and len(reasons) > 1:
            console.print(f"left out ({strategy}): {len(reasons) - 1} more: --all")
    for note in (*found.notes, f"{found.machine.name}: {found.machine.source}"):
        console.print(note, soft_wrap=True)


def _cells(one: SplitPlan) -> list[str]:
    split, seconds, memory = one.split, one.seconds, one.memory
    exposed = (seconds.exposed_unfused, seconds.exposed_fused, seconds.exposed_pipelined)
    return [
        split.strategy,
        *(str(size) for size in (split.seq, split.ring, split.dp)),
        f"{one.tokens_per_s:,.0f}",
        *(f"{value:.3g}" for value in (seconds.step, seconds.compute, *exposed)),
        f"{one.traffic.total / 1e9:.3g}",
        *(f"{value / 1e9:.3g}" for value in (memory.total, *(getattr(memory, part) for part in _PARTS))),
        one.binds,
    ]
