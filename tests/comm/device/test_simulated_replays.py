"""Graphs replayed on simulated devices in another order than they were captured in, and copies that never end."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from schedule_edits import only_begin
from simulated_group import CONFIG, WIDTH, Group

from odysseus_kernels.comm.device import transport as device_transport
from odysseus_kernels.comm.schedules.device import device_schedule, tile_schedule
from odysseus_kernels.comm.schedules.steps import Schedule
from odysseus_kernels.comm.tiles import TileGather
from odysseus_kernels.comm.transport import Call, Gather
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.errors import CommunicationError, SignalTimeoutError

pytestmark = pytest.mark.without_ranks

PIECES = dataclasses.replace(CONFIG, chunks_per_rank=3)


def captured(group: Group, program: str) -> tuple[Any, Any]:
    """A graph of two calls of ``program``, and a function that draws new inputs and checks the next results."""
    gathers, gathered = group.gather_part(2, 6) if program != "scatter" else (None, None)
    scatters, scattered = group.scatter_part(2, 6) if program != "gather" else (None, None)

    def calls() -> None:
        for _ in range(2):
            group.enqueue(gathers, scatters, PIECES)

    for seed in range(2):  # windows exist before the capture
        calls()
        group.run(seed)

    def renew() -> None:
        for gather in gathers or ():
            gather.shard.copy_(group.random(*gather.shard.shape))
        for scatter in scatters or ():
            scatter.out.fill_(torch.nan)
        group.checks += [check for check in (gathered, scattered) if check is not None]

    return group.machine.capture(calls), renew


@pytest.mark.parametrize("world", (2, 3, 5))
@pytest.mark.parametrize("program", ("gather", "scatter", "both"))
def test_a_graph_may_be_run_one_node_at_a_time_in_another_order(world: int, program: str) -> None:
    group = Group(world)
    replay, renew = captured(group, program)
    for seed, reverse in enumerate((True, False, True)):
        renew()
        replay(reverse=reverse)
        group.run(seed)


@pytest.mark.parametrize(
    ("program", "stream", "on"),
    (("gather", "waits", "local"), ("scatter", "local", "signals"), ("both", "waits", "local")),
)
def test_without_an_edge_such_a_replay_hangs(program: str, stream: str, on: str) -> None:
    """It is found where it happens, and not before: in the order of the capture everything goes well."""
    edit = only_begin(stream, on)

    def edited(kind: Any, world: int, rank: int, **options: Any) -> Schedule:
        schedule = device_schedule(kind, world, rank, **options)
        return dataclasses.replace(schedule, steps=tuple(edit(list(schedule.steps), rank)))

    with mock.patch.object(device_transport, "device_schedule", edited):
        group = Group(3)
        replay, renew = captured(group, program)
        renew()
        replay()
        group.run(0)
        replay(reverse=True)
        with pytest.raises(AssertionError, match="deadlock: .*wait"):
            group.run(1)


def tiles_in_a_graph() -> tuple[Group, Any, list[TileGather], list[torch.Tensor]]:
    group, config, seen = Group(3), OverlapConfig(mode="tiles", chunks_per_rank=2), []
    shards = [group.random(1, 4, WIDTH) for _ in range(3)]

    def kernel(found: TileGather) -> None:
        assert (found.words - int(found.epoch) * 256 >= found.pieces).all(), "it would spin for ever"
        seen.append(dataclasses.replace(found, gathered=found.gathered.clone()))

    def call(tiles: Any = kernel) -> None:
        for rank, transport in enumerate(group.transports):
            gather = Gather(shards[rank], consume=None, tiles=tiles)  # type: ignore[arg-type]
            transport.execute(Call("operator", "forward", config, gather))

    for seed in range(3):  # windows exist before the capture
        call(lambda found: None)
        group.machine.run(seed)
    return group, group.machine.capture(call), seen, shards


def test_a_tile_kernel_in_a_graph_finds_everything() -> None:
    group, replay, seen, shards = tiles_in_a_graph()
    for seed, reverse in enumerate((True, False)):
        replay(reverse=reverse)
        group.machine.run(seed)
    assert len(seen) == 6
    for found in seen:
        assert torch.equal(found.gathered, torch.stack([shards[(found.rank + hop) % 3][0] for hop in (1, 2)]))

    def eager(*arguments: Any, **options: Any) -> Schedule:
        return tile_schedule(*arguments, **{**options, "captured": False})

    with mock.patch.object(device_transport, "tile_schedule", eager):
        group, replay, _, _ = tiles_in_a_graph()
    replay(reverse=True)
    with pytest.raises(AssertionError, match="spin for ever"):
        group.machine.run(0)


@pytest.mark.parametrize(
    ("program", "stream", "expected"),
    (
        ("gather", "local", r"rank {} waited for rank 1 to publish chunk 1, piece 0 of its shard"),
        ("scatter", "copy 0", r"rank {} waited for rank 1 to send its part of chunk {}, piece [01]"),
    ),
)
def test_a_copy_that_never_ends_is_an_error_on_its_peers(program: str, stream: str, expected: str) -> None:
    """Operator, peer and chunk are named, although no rank knows of the copy itself."""
    group = Group(3)
    gathers, _ = group.gather_part(1, 6) if program == "gather" else (None, None)
    scatters, _ = group.scatter_part(1, 6) if program == "scatter" else (None, None)
    group.enqueue(gathers, scatters, PIECES)
    group.machine.hang(1, stream)
    group.machine.run(0, give_up=True)
    failed = [rank for rank in (0, 2) if group.machine.devices[rank].failure() is not None]
    assert failed
    for rank in failed:
        with pytest.raises(SignalTimeoutError, match=r"operator \(forward\): " + expected.format(rank, rank)):
            group.transports[rank].synchronize()
        with pytest.raises(CommunicationError, match="operator"):
            group.enqueue(gathers, scatters, PIECES)
