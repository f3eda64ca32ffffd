"""What the tests of virtual ranks run: several ranks of one process, one after another on one GPU, exact results.

Sums are exact because parts are small whole numbers, so the order of additions does not matter here.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.schedules.steps import SHARD
from odysseus_kernels.comm.transport import Call, Gather, Scatter
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.errors import CommunicationError
from odysseus_kernels.testing.virtual_devices import virtual_transports

WIDTH = 24
MOST_ROWS = 64
CONFIG = OverlapConfig(mode="fused", timeout_s=5.0)
Check = Callable[[], None]


class Group:
    """Virtual ranks on the first GPU; every rank computes on a stream of its own."""

    def __init__(self, world: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.world, self.dtype = world, dtype
        self.device = torch.device("cuda", 0)
        # Two sets of parts from all others, in the largest type, and room for the alignment of pieces.
        reserve = 2 * world * (MOST_ROWS * WIDTH * 8 + 64 * 256)
        self.transports = virtual_transports([self.device] * world, reserve)
        self.streams = [torch.cuda.Stream(self.device) for _ in range(world)]
        self.generator = torch.Generator().manual_seed(seed)

    def numbers(self, *shape: int) -> Tensor:
        drawn = torch.randint(-8, 9, shape, generator=self.generator)
        return drawn.to(self.device, self.dtype)

    def nan(self, *shape: int) -> Tensor:
        return torch.full(shape, torch.nan, device=self.device, dtype=self.dtype)

    def gather(self, rows: int, shards: list[Tensor] | None = None) -> tuple[list[Gather], Check]:
        shards = shards or [self.numbers(1, rows, WIDTH) for _ in range(self.world)]
        seen = [self.nan(self.world, *shards[0].shape) for _ in shards]

        def consume(rank: int) -> Any:
            def run(source: int, start: int, stop: int, block: Tensor) -> None:
                seen[rank][source, :, start:stop].copy_(block)

            return run

        def check() -> None:
            for found in seen:
                assert torch.equal(found, torch.stack(shards))
                found.fill_(torch.nan)

        return [Gather(shards[rank], consume(rank)) for rank in range(self.world)], check

    def scatter(self, rows: int) -> tuple[list[Scatter], Check]:
        parts = [self.numbers(self.world, 1, rows, WIDTH) for _ in range(self.world)]
        outs = [self.nan(1, rows, WIDTH) for _ in range(self.world)]

        def produce(rank: int) -> Any:
            def run(target: int, start: int, stop: int, block: Tensor) -> None:
                block.copy_(parts[rank][target, :, start:stop])

            return run

        def check() -> None:
            for rank, out in enumerate(outs):
                assert torch.equal(out, torch.stack(parts).sum(0)[rank])
                out.fill_(torch.nan)

        return [Scatter(outs[rank], produce(rank)) for rank in range(self.world)], check

    def enqueue(
        self,
        gathers: Any,
        scatters: Any,
        config: OverlapConfig = CONFIG,
        absent: int | None = None,
        prefetch: list[Tensor] | None = None,
    ) -> None:
        for rank, transport in enumerate(self.transports):
            if rank != absent:
                gather = gathers[rank] if gathers else None
                scatter = scatters[rank] if scatters else None
                with torch.cuda.stream(self.streams[rank]):
                    ahead = None if prefetch is None else Prefetch.of_gather(prefetch[rank])
                    transport.execute(Call("operator", "forward", config, gather, scatter, prefetch=ahead))

    def synchronize(self) -> None:
        for transport in self.transports:
            transport.synchronize()

    def close(self) -> None:
        for transport in self.transports:
            transport.close()


def back_to_back(rank: int, processes: int, world: int, dtype: str, seed: int) -> int:
    """Calls of every kind and size one behind another, with nothing between them; returns how many."""
    group = Group(world, getattr(torch, dtype), seed)
    choose = random.Random(seed)
    made = 0
    for _ in range(4):
        calls, checks = [], []
        for _ in range(12):
            program, rows = choose.choice(("gather", "scatter", "both")), choose.choice((1, 7, 32, MOST_ROWS))
            config = dataclasses.replace(CONFIG, chunks_per_rank=choose.choice(("auto", 1, 3, 8)))
            gathers = scatters = None
            if program != "scatter":
                gathers, check = group.gather(rows)
                checks.append(check)
            if program != "gather":
                scatters, check = group.scatter(rows)
                checks.append(check)
            calls.append((gathers, scatters, config))
        torch.cuda.synchronize()  # inputs are there; from here on only the transports order anything
        for gathers, scatters, config in calls:
            group.enqueue(gathers, scatters, config)
        group.synchronize()
        for check in checks:
            check()
        made += len(calls)
    group.close()
    return made


def sent_ahead(rank: int, processes: int, world: int) -> None:
    """A shard that a gather or a scatter sent ahead serves the next call; one that nobody wants is dropped."""
    group = Group(world)
    first = [group.numbers(1, 16, WIDTH) for _ in range(world)]
    second = [group.numbers(1, 16, WIDTH) for _ in range(world)]
    begin, check_begin = group.gather(16, first)
    follow, check_follow = group.gather(16, second)
    other, check_other = group.gather(9)
    scatters, check_scatters = group.scatter(9)
    torch.cuda.synchronize()
    for _ in range(10):
        group.enqueue(None, scatters, prefetch=first)
        group.enqueue(begin, None, prefetch=second)
        group.enqueue(follow, None, prefetch=first)
        group.enqueue(other, None)  # not what was sent ahead
        group.synchronize()
        check_scatters()
        check_begin()
        check_follow()
        check_other()
        torch.cuda.synchronize()
    group.close()


def whole_tensors(rank: int, processes: int, world: int) -> None:
    """The unfused twins: one collective for all rows, in place."""
    group = Group(world)
    for rows in (1, 7, MOST_ROWS):
        gathers, _ = group.gather(rows)
        wholes = [group.nan(world, 1, rows, WIDTH) for _ in range(world)]
        scatters, _ = group.scatter(rows)
        fulls = [group.numbers(world, 1, rows, WIDTH) for _ in range(world)]
        torch.cuda.synchronize()
        for index, transport in enumerate(group.transports):
            with torch.cuda.stream(group.streams[index]):
                transport.all_gather(Call("operator", "forward", CONFIG, gathers[index]), wholes[index])
        for index, transport in enumerate(group.transports):
            with torch.cuda.stream(group.streams[index]):
                call = Call("operator", "backward", CONFIG, None, scatters[index])
                transport.reduce_scatter(call, fulls[index])
        group.synchronize()
        for index in range(world):
            assert torch.equal(wholes[index], torch.stack([gather.shard for gather in gathers]))
            assert torch.equal(scatters[index].out, torch.stack(fulls).sum(0)[index])
    group.close()


def captured(rank: int, processes: int, world: int) -> None:
    """Each rank's call as a graph: replays between eager calls, with new inputs, give what eager calls give."""
    group = Group(world)
    gathers, check_gather = group.gather(16)
    scatters, check_scatter = group.scatter(16)
    others, check_others = group.gather(16)
    torch.cuda.synchronize()
    for _ in range(2):  # all windows of the rotation have their plans
        group.enqueue(gathers, scatters)
        group.synchronize()
    check_gather()
    check_scatter()
    graphs = []
    for index, transport in enumerate(group.transports):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=group.streams[index], capture_error_mode="thread_local"):
            transport.execute(Call("operator", "forward", CONFIG, gathers[index], scatters[index]))
        graphs.append(graph)
    torch.cuda.synchronize()
    for replay in range(5):
        for gather in gathers:
            gather.shard.copy_(group.numbers(*gather.shard.shape))
        torch.cuda.synchronize()
        for index, graph in enumerate(graphs):
            with torch.cuda.stream(group.streams[index]):
                graph.replay()
        group.synchronize()
        check_gather()
        check_scatter()
        torch.cuda.synchronize()
        for _ in range(replay % 3):
            group.enqueue(others, None)
        group.synchronize()
        if replay % 3:
            check_others()
    group.close()


def dropped_rank(rank: int, processes: int, world: int, program: str) -> list[tuple[str, str, float]]:
    """One rank never calls; (error, message, seconds) of each other, and whether a later call is refused."""
    group = Group(world)
    gathers, check = group.gather(8)
    scatters, _ = group.scatter(8)
    torch.cuda.synchronize()
    group.enqueue(gathers, scatters)
    group.synchronize()
    check()
    config = dataclasses.replace(CONFIG, timeout_s=1.0)
    parts = (gathers, None) if program == "gather" else (None, scatters)
    begin = time.perf_counter()
    group.enqueue(*parts, config, absent=world - 1)
    told = []
    for transport in group.transports[:-1]:
        try:
            transport.synchronize()
        except CommunicationError as error:
            told.append((type(error).__name__, str(error), time.perf_counter() - begin))
        else:
            told.append(("", "", 0.0))
        try:
            transport.execute(Call("operator", "forward", config, gathers[0]))
        except CommunicationError:
            assert transport.broken
        else:
            raise AssertionError("a transport that gave up took another call")
    group.close()
    return told


def memory_is_poisoned(rank: int, processes: int, world: int) -> None:
    """What nobody wrote is NaN: otherwise the tests above would show less than they say."""
    group = Group(world)
    for transport in group.transports:
        memory = transport._device._memory  # type: ignore[attr-defined]
        assert memory._peers.memory(0, (SHARD, 0)).view(torch.float32).isnan().all()
    group.close()
