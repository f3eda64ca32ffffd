"""What tracing costs: ``python -m benchmarks.timeline.cost``.

Two ranks take steps in turn with a trace and without one.  Printed are the median of the ratios within the rounds, with
its quartiles; and, because such a ratio moves by more than tracing costs, the events of a step times what one event
takes, over the step.  Both leave out what writing the file takes after the step, which stands beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import odysseus_kernels as ody
from benchmarks.common.measure import slowest_rank
from benchmarks.layers.cases import Variant, make_layer_cases
from benchmarks.layers.workload import LayerWorkload
from benchmarks.operators.cases import Case
from benchmarks.operators.workload import Workload
from odysseus_kernels.comm.schedules.steps import symmetric_schedule
from odysseus_kernels.comm.trace import timed
from odysseus_kernels.testing.spawn import RankPool

__all__ = ["CostSettings", "measure_cost"]

_RUN_LIMIT_S = 1800.0
_EVENTS = 20_000


@dataclasses.dataclass(frozen=True)
class CostSettings:
    """What all ranks must agree on.

    Attributes:
        rounds: steps with a trace, and as many without.
        tokens: L of the operator.
        shape: (L, d) of the layer.
        events: over how many one event's time is taken.
    """

    rounds: int
    tokens: int = 2048
    shape: tuple[int, int] = (1024, 256)
    events: int = _EVENTS


def measure_cost(rank: int, world_size: int, settings: CostSettings) -> list[dict[str, Any]]:
    """A row for each operator or layer and transport, the same on all ranks."""
    with tempfile.TemporaryDirectory(prefix="odysseus-trace-") as folder:
        path = Path(folder) / "step.json"
        event_s = _seconds_of_an_event(path, settings.events)
        return [
            _row(name, step, path, settings.rounds, event_s, world_size)
            for name, step in _steps(world_size, settings).items()
        ]


def _steps(world_size: int, settings: CostSettings) -> dict[str, Callable[[], Any]]:
    case = Case("cost", "all_gather_linear", settings.tokens, 512, (768,), True)
    work = Workload(case, dtype=torch.float32, device=torch.device("cpu"), transports=(), seed=1)
    layer_case = make_layer_cases("layer", world_size, shapes=[settings.shape])[0]
    layer = LayerWorkload(layer_case, dtype=torch.float32, seed=1)
    steps: dict[str, Callable[[], Any]] = {}
    for transport in ("symmetric", "collective"):
        steps[f"{case.operator} {case.shape}, fused {transport}"] = lambda transport=transport: work.operate(
            "fused", transport
        )
        variant = Variant(f"fused {transport}", "ours", "odysseus", 1, "fused", transport)
        steps[f"odysseus layer {layer_case.sizes}, fused {transport}"] = layer.make(variant).step
    return steps


def _row(
    name: str, step: Callable[[], Any], path: Path, rounds: int, event_s: float, world_size: int
) -> dict[str, Any]:
    samples: dict[str, list[float]] = {"without": [], "with": [], "write": []}
    events = 0

    def plain() -> None:
        dist.barrier()
        begin = time.perf_counter()
        step()
        samples["without"].append(time.perf_counter() - begin)

    def traced() -> None:
        nonlocal events
        dist.barrier()
        with ody.trace(path) as trace:
            begin = time.perf_counter()
            step()
            end = time.perf_counter()
        samples["with"].append(end - begin)
        samples["write"].append(time.perf_counter() - end)
        events = sum(event["ph"] == "X" for event in json.loads(trace.path.read_text())["traceEvents"])

    step()
    for index in range(rounds):  # nobody always follows the other
        for one in (plain, traced) if index % 2 == 0 else (traced, plain):
            one()
    samples = slowest_rank(samples, world_size)
    ratios = [a / b for a, b in zip(samples["with"], samples["without"], strict=True)]
    seconds = statistics.median(samples["without"])
    return {
        "name": name,
        "step_s": seconds,
        "ratio": statistics.quantiles(ratios, n=4, method="inclusive"),
        "events": events,
        "events_share": events * event_s / seconds,
        "write_s": statistics.median(samples["write"]),
    }


def _seconds_of_an_event(path: Path, events: int) -> float:
    """What the loop over a schedule's steps takes longer for each step with a trace than without."""
    steps = list(itertools.islice(itertools.cycle(symmetric_schedule("gather", 2, 0).steps), events))

    def loop() -> float:
        begin = time.perf_counter()
        for _ in timed(steps, "cost", "forward", "symmetric", 0):
            pass
        return time.perf_counter() - begin

    without = loop()
    with ody.trace(path):
        return max(loop() - without, 0.0) / events


def main() -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="steps with a trace, and as many without")
    rounds = parser.parse_args().rounds
    if rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {rounds}")
    with RankPool(2, timeout=_RUN_LIMIT_S) as pool:
        rows = pool.run(measure_cost, CostSettings(rounds))[0]
    table = Table(title=f"Cost of a trace; 2 ranks of one thread, {rounds} rounds", title_justify="left")
    for column in ("step", "ms", "with / without (quartiles)", "events", "events' share", "writing, ms"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows:
        first, middle, third = row["ratio"]
        table.add_row(
            row["name"],
            f"{row['step_s'] * 1e3:.1f}",
            f"{middle:.3f} ({first:.3f}-{third:.3f})",
            str(row["events"]),
            f"{100 * row['events_share']:.2f} %",
            f"{row['write_s'] * 1e3:.1f}",
        )
    Console(width=120, highlight=False).print(table)


if __name__ == "__main__":
    main()
