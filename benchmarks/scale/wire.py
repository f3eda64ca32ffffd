#!/usr/bin/env python
"""How near collectives and fused operators of CPU ranks come to the time that a link of known rate takes.

One process on each host, as torchrun starts them, all with the same arguments; ``--rate`` is what the link sends each
way::

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-endpoint HOST:29500 benchmarks/scale/wire.py --rate 1gbit

Every size is sent by the package's collectives and by the process group's own, in rounds that take turns, so that what
else the machines do meets both; a time is the slowest rank's.  ``x wire`` is the median over the bytes that a rank
sends divided by the rate.  ``--operators`` adds the fused operators: their time over the longer of the product alone
and the wire.  A wrong result is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # runs from a checkout, installed or not

import odysseus_kernels as ody
from odysseus_kernels.comm import functional
from odysseus_kernels.comm.meeting.backend import all_gather_single, reduce_scatter_single

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
Run = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class Row:
    """What is timed beside one another, and the seconds that none of it can undercut."""

    name: str
    floor_s: float
    wire_s: float
    runs: dict[str, Run]


def bits_per_second(text: str) -> float:
    """Of ``"120mbit"`` or ``"1gbit"``, as ``tc`` writes rates."""
    found = re.fullmatch(r"([0-9.]+)([kmg]bit)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a rate such as 120mbit or 1gbit, got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def collectives(mebibytes: float, rate: float, config: ody.OverlapConfig) -> list[Row]:
    """All-gather, all-to-all and reduce-scatter in which a rank's shard or part has ``mebibytes``."""
    rank, world = dist.get_rank(), dist.get_world_size()
    count = int(mebibytes * (1 << 20)) // 4
    wire_s = (world - 1) * count * 4 * 8 / rate
    shard = torch.full((count,), float(rank))
    parts = torch.arange(world, dtype=torch.float32).repeat_interleave(count).view(world, count) + 10.0 * rank
    gathered, exchanged, summed = torch.empty(world * count), torch.empty(world, count), torch.empty(count)

    def gloo_gather() -> Tensor:
        all_gather_single(gathered, shard)
        return gathered

    def gloo_exchange() -> Tensor:
        dist.all_to_all_single(exchanged, parts)
        return exchanged

    def gloo_scatter() -> Tensor:
        reduce_scatter_single(summed, parts.view(-1))
        return summed

    size = f"{mebibytes:g} MiB"
    return [
        Row(f"all-gather {size}", wire_s, wire_s, {
            "package": lambda: functional.all_gather(shard, config=config), "Gloo": gloo_gather}),
        Row(f"all-to-all {size}", wire_s, wire_s, {
            "package": lambda: functional.all_to_all(parts, config=config), "Gloo": gloo_exchange}),
        Row(f"reduce-scatter {size}", wire_s, wire_s, {
            "package": lambda: functional.reduce_scatter(parts.view(-1), config=config), "Gloo": gloo_scatter}),
    ]  # fmt: skip


def operators(product_s: float, rate: float, config: ody.OverlapConfig) -> list[Row]:
    """Fused operators whose product alone takes about ``product_s`` seconds, and the link as long."""
    world = dist.get_world_size()
    width = 1024
    rows = max(int(product_s * rate / 8 / 4 / width) // (world - 1), 1)  # of a shard: as long on the wire
    speed = _products_per_second(width)
    features = max(int(product_s * speed / (rows * world * width)), 1)
    wire_s = (world - 1) * rows * width * 4 * 8 / rate
    full, shard, weight = torch.randn(rows * world, width), torch.randn(rows, width), torch.randn(features, width)
    inner, wide = torch.randn(rows * world, features), torch.randn(width, features)
    batch, slices = torch.randn(features, width), torch.randn(rows, width)
    whole = torch.randn(rows * world, width)
    fused = dataclasses.replace(config, mode="fused")
    unfused = dataclasses.replace(config, mode="unfused")

    def row(name: str, product: Callable[[], Tensor], call: Callable[[ody.OverlapConfig], Tensor]) -> Row:
        alone = statistics.median(_seconds(product) for _ in range(5))
        slowest = torch.tensor([alone])
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        runs: dict[str, Run] = {"fused": lambda: call(fused), "unfused": lambda: call(unfused), "product": product}
        title = f"{name} (product {slowest.item():.3f} s, wire {wire_s:.3f} s)"
        return Row(title, max(slowest.item(), wire_s), wire_s, runs)

    group = dist.group.WORLD
    return [
        row("all_gather_linear", lambda: full @ weight.T,
            lambda c: ody.all_gather_linear(shard, weight, group=group, config=c)),
        row("linear_reduce_scatter", lambda: inner @ wide.T,
            lambda c: ody.linear_reduce_scatter(inner, wide, group=group, config=c)),
        row("zero3_linear", lambda: batch @ whole.T,
            lambda c: ody.zero3_linear(batch, slices, group=group, config=c)),
    ]  # fmt: skip


def _products_per_second(width: int) -> float:
    """Multiplications and additions of a second, of the slowest rank."""
    a, b = torch.randn(1024, width), torch.randn(width, 1024)
    seconds = torch.tensor([min(_seconds(lambda: a @ b) for _ in range(5))])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return 1024 * width * 1024 / seconds.item()


def _seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(row: Row, rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round after a first one, in which results are compared; of the slowest rank."""
    results = {name: run() for name, run in row.runs.items()}
    if "Gloo" in results:
        expected, got = results["Gloo"], results["package"]
        assert isinstance(expected, Tensor) and isinstance(got, Tensor)
        if not torch.equal(got.view(-1), expected.view(-1)):
            raise SystemExit(f"{row.name}: the package's result is not Gloo's")
    times: dict[str, list[float]] = {name: [] for name in row.runs}
    for _ in range(rounds):
        for name, run in row.runs.items():
            dist.barrier()
            seconds = torch.tensor([_seconds(run)], dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            times[name].append(seconds.item())
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description="Collectives and fused operators against the time of the wire.")
    parser.add_argument("--rate", type=bits_per_second, required=True, help="of the link, each way: 120mbit, 1gbit")
    parser.add_argument("--mib", type=float, nargs="*", default=[1, 8, 16], help="sizes of a rank's shard or part")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--operators", type=float, nargs="*", default=[], help="seconds of their products")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dist.init_process_group("gloo")
    config = ody.OverlapConfig(transport="collective", timeout_s=120)
    rows = [row for size in given.mib for row in collectives(size, given.rate, config)]
    rows += [row for seconds in given.operators for row in operators(seconds, given.rate, config)]
    for row in rows:
        times = measure(row, given.rounds)
        if dist.get_rank() == 0:
            figures = []
            for name, samples in times.items():
                ratio, least = statistics.median(samples) / row.floor_s, min(samples) / row.floor_s
                figures.append(f"{name} {ratio:.2f} (least {least:.2f})")
            unit = "x wire" if row.floor_s == row.wire_s and "Gloo" in times else "x max(product, wire)"
            print(f"{row.name:28s} {unit}: {', '.join(figures)}", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
