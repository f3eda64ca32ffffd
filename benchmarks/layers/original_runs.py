"""The original's measured runs beside the planner's predictions: ``python -m benchmarks.layers.original_runs``.

Llama-2-7B on 8 x A100 80 GB with NVLink, without activation checkpointing, as published: seconds, and two figures of
memory in GB, which its text does not explain; the first is compared.  How many steps a figure of seconds holds is not
said either, so that ratios between lengths and strategies mean more than the quotient of seconds.  What the predictions
leave out is the original's own way: unfused collectives, synchronous ZeRO-3, one FSDP unit around its Ring and Ulysses
baselines, gathered inputs that are kept.
"""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from odysseus_kernels.planner.planning.plan import SplitPlan, plan

__all__ = ["RUNS", "OriginalRun", "predicted_run", "print_runs"]

_RANKS = 8
_LENGTHS = {"16K": 1 << 14, "32K": 1 << 15, "64K": 1 << 16, "96K": 3 << 15}


@dataclasses.dataclass(frozen=True)
class OriginalRun:
    """One cell of the published table.

    Attributes:
        method: what the table calls it.
        strategy: what it is nearest to here.
        length: tokens, as the table writes them.
        seconds: as published; None where it ran out of memory.
        gigabytes: both figures of memory.
    """

    method: str
    strategy: str
    length: str
    seconds: float | None = None
    gigabytes: tuple[float, float] | None = None


def _runs(method: str, strategy: str, *cells: tuple[float, float, float]) -> list[OriginalRun]:
    found = []
    for place, length in enumerate(_LENGTHS):
        cell = cells[place] if place < len(cells) else None
        seconds, memory = (None, None) if cell is None else (cell[0], (cell[1], cell[2]))
        found.append(OriginalRun(method, strategy, length, seconds, memory))
    return found


RUNS: tuple[OriginalRun, ...] = (
    *_runs("Ring", "tsp", (10.37, 29.06, 53.46), (20.17, 40.78, 63.42)),
    *_runs("Ulysses", "ulysses", (6.62, 29.56, 53.46), (13.76, 41.78, 65.18)),
    *_runs("Odysseus (ZeRO-3 FFN)", "odysseus", (7.1, 18.46, 20.84), (14.99, 31.43, 34.97), (38.11, 65.6, 68.31)),
    *_runs("TP-SP", "tp_sp", (6.86, 18.39, 21.2), (15.2, 31.43, 35.3), (39.43, 57.56, 65.29)),
)
"""The published runs; its Odysseus with an FSDP feed-forward network is none of this project's strategies."""


def predicted_run(run: OriginalRun) -> SplitPlan:
    """The planner's prediction of a run's strategy on one host, all ranks along seq."""
    found = plan("llama-2-7b", _RANKS, _LENGTHS[run.length], "a100-nvlink", strategies=(run.strategy,))
    return next(one for one in found.splits if one.split.ring == 1)


def print_runs(console: Console | None = None) -> None:
    """Prints both, with quotients as they are."""
    table = Table(title="Llama-2-7B, 8 x A100 80 GB: published, and predicted for one step", title_justify="left")
    table.add_column("method", no_wrap=True)
    for name in ("tokens", "s published", "s unfused", "s fused", "published / unfused", "of its 16K", "predicted"):
        table.add_column(name, justify="right")
    for name in ("GB published", "GB predicted", "predicted / published", "fits"):
        table.add_column(name, justify="right")
    first: dict[str, tuple[float, float]] = {}
    for run in RUNS:
        one = predicted_run(run)
        unfused = one.seconds.compute + one.seconds.exposed_unfused
        memory = one.memory.total / 1e9
        cells = [f"{unfused:.3f}", f"{one.seconds.step:.3f}"]
        if run.seconds is None or run.gigabytes is None:
            published, ratios, gigabytes = "out of memory", ["", "", ""], ["", f"{memory:.1f}", ""]
        else:
            published = f"{run.seconds:g}"
            start = first.setdefault(run.method, (run.seconds, unfused))
            ratios = [f"{value:.2f}" for value in (run.seconds / unfused, run.seconds / start[0], unfused / start[1])]
            gigabytes = [f"{run.gigabytes[0]:g}", f"{memory:.1f}", f"{memory / run.gigabytes[0]:.2f}"]
        fits = "yes" if one.fits else "no"
        table.add_row(run.method, run.length, published, *cells, *ratios, *gigabytes, fits)
    (console or Console()).print(table)


if __name__ == "__main__":
    print_runs()
