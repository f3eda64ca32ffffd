"""A plan as a table in the terminal."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING

from odysseus_kernels.planner.planning.plan import Plan, SplitPlan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["print_plan"]

_TOP = 10
_WIDTH = 110
_PARTS = ("weights", "gradients", "optimizer", "saved", "transients")


def print_plan(found: Plan, console: Console | None = None, *, everything: bool = False) -> None:
    """Prints a plan.

    Args:
        found: what :func:`odysseus_kernels.plan` returned.
        console: where to; None: the terminal.
        everything: all splits instead of the first ten, and every split that was refused.
    """
    from rich.console import Console

    # A pipe has 80 columns for rich, which are too few.
    console = console or Console(width=max(_WIDTH, shutil.get_terminal_size().columns))
    device = found.machine.device.memory_bytes
    room = f"{device / 1e9:g} GB each" if math.isfinite(device) else "memory not known"
    how = ", checkpointing" * found.checkpointing + ", offload" * found.offload
    console.print(
        f"{found.model.name} ({found.model.parameters / 1e9:.3g} B weights), {found.world_size} x {found.machine.name} "
        f"({room}), {found.batch} x {found.seq_len:,} tokens, {found.dtype}{how}",
        soft_wrap=True,
    )
    shown = found.splits if everything else found.splits[:_TOP]
    times = _table("tokens/s", "step s", "compute s", "unfused s", "fused s", "piped s", "sent GB", "binds")
    memory = _table("GB in all", *_PARTS)
    for one in shown:
        style = None if one.fits else "dim"
        times.add_row(*_mesh(one), *_times(one), style=style)
        memory.add_row(*_mesh(one), *(f"{count / 1e9:.3g}" for count in _bytes(one)), style=style)
    console.print(times)
    console.print(memory)
    console.print("unfused, fused, piped: communication that stays exposed in a step; GB: of each rank, 10^9 bytes")
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


def _table(*names: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("strategy", no_wrap=True)
    for name in ("seq", "ring", "dp", *names):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _mesh(one: SplitPlan) -> list[str]:
    split = one.split
    return [split.strategy, str(split.seq), str(split.ring), str(split.dp)]


def _times(one: SplitPlan) -> list[str]:
    seconds = one.seconds
    exposed = (seconds.exposed_unfused, seconds.exposed_fused, seconds.exposed_pipelined)
    return [
        f"{one.tokens_per_s:,.0f}",
        *(f"{value:.3g}" for value in (seconds.step, seconds.compute, *exposed)),
        f"{one.traffic.total / 1e9:.3g}",
        one.binds,
    ]


def _bytes(one: SplitPlan) -> list[int]:
    return [one.memory.total, *(getattr(one.memory, part) for part in _PARTS)]
