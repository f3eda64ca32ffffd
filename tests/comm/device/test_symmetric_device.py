"""The transport that drives GPUs, on simulated devices: random orders, NaN where nobody wrote, exact results."""

from __future__ import annotations

import ctypes
import dataclasses
import random
from typing import Any
from unittest import mock

import pytest
import torch
from simulated_group import CONFIG, WIDTH, Group
from torch import Tensor

from odysseus_kernels._ext import CONTROL_WORDS
from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.comm.schedules.steps import piece_bounds
from odysseus_kernels.comm.tiles import TileGather, TileScatter
from odysseus_kernels.comm.transport import Call, CapacityExceededError, Gather, Scatter
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.errors import CommunicationError, SignalTimeoutError

pytestmark = pytest.mark.without_ranks


@pytest.mark.parametrize("world", (2, 3, 4, 5, 8))
@pytest.mark.parametrize("pieces", ("auto", 1, 3, 64))
def test_calls_back_to_back(world: int, pieces: Any) -> None:
    """Every kind of call behind every other, with several batches, in random orders of everything that is allowed."""
    config = dataclasses.replace(CONFIG, chunks_per_rank=pieces)
    group = Group(world, seed=world)
    choose = random.Random(world)
    for round_ in range(6):
        for _ in range(choose.randint(1, 5)):
            batch, rows = choose.choice((1, 2)), choose.choice((1, 4, 7))
            program = choose.choice(("gather", "scatter", "both"))
            gathers = scatters = None
            if program != "scatter":
                gathers, check = group.gather_part(batch, rows)
                group.checks.append(check)
            if program != "gather":
                scatters, check = group.scatter_part(batch, rows)
                group.checks.append(check)
            group.enqueue(gathers, scatters, config)
        group.run(round_)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_sums_are_rounded_once_and_in_a_fixed_order(dtype: torch.dtype) -> None:
    group = Group(4)
    scatters, check = group.scatter_part(2, 5, dtype)
    group.enqueue(None, scatters, dataclasses.replace(CONFIG, chunks_per_rank=2))
    group.checks.append(check)
    group.run(0)


def test_wider_sums_than_a_device_makes_are_refused() -> None:
    group = Group(2)
    scatters, _ = group.scatter_part(1, 4, torch.float32)
    with pytest.raises(ValueError, match="expected reduce_dtype=torch.float32 for torch.float32"):
        group.enqueue(None, scatters, dataclasses.replace(CONFIG, reduce_dtype=torch.float64))
    scatters, check = group.scatter_part(1, 4)
    group.enqueue(None, scatters, dataclasses.replace(CONFIG, reduce_dtype=torch.float64))
    group.checks.append(check)
    group.run(0)


def test_slices_of_larger_outputs() -> None:
    """Rows of an output may be followed by others: only the rows themselves are written."""
    group = Group(3)
    scatters, _ = group.scatter_part(2, 4)
    outs = [torch.full((2, 9, WIDTH), 7.0, dtype=torch.float64) for _ in range(3)]
    scatters = [dataclasses.replace(s, out=outs[rank][:, 2:6]) for rank, s in enumerate(scatters)]
    group.enqueue(None, scatters, dataclasses.replace(CONFIG, chunks_per_rank=2))
    group.run(1)
    for out in outs:
        assert not out.isnan().any() and not (out[:, 2:6] == 7).any()
        assert (out[:, :2] == 7).all() and (out[:, 6:] == 7).all()


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("batch", (1, 2))
def test_unfused_twins_move_whole_tensors_in_place(world: int, batch: int) -> None:
    group = Group(world)
    for seed in range(3):
        gathers, _ = group.gather_part(batch, 5)
        wholes = [torch.full((world, batch, 5, WIDTH), torch.nan, dtype=torch.float64) for _ in range(world)]
        for rank, transport in enumerate(group.transports):
            transport.all_gather(Call("operator", "forward", CONFIG, gathers[rank]), wholes[rank])
        scatters, _ = group.scatter_part(batch, 5)
        fulls = [group.random(world, batch, 5, WIDTH) for _ in range(world)]
        for rank, transport in enumerate(group.transports):
            config = dataclasses.replace(CONFIG, chunks_per_rank=2)
            transport.reduce_scatter(Call("operator", "backward", config, None, scatters[rank]), fulls[rank])
        group.machine.run(seed)
        for rank in range(world):
            assert torch.equal(wholes[rank], torch.stack([gather.shard for gather in gathers]))
            torch.testing.assert_close(scatters[rank].out, torch.stack(fulls).sum(0)[rank])
    assert group.machine.devices[0].most_scratch == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_shard_sent_ahead_serves_the_next_call_or_none(seed: int) -> None:
    group = Group(3, seed)
    first = [group.random(1, 6, WIDTH) for _ in range(3)]
    second = [group.random(1, 4, WIDTH) for _ in range(3)]
    gathers, check = group.gather_of(first)
    group.enqueue(gathers, None, CONFIG, second)
    group.checks.append(check)
    if seed % 2:
        group.run(seed)
    gathers, check = group.gather_of(second)  # the shard that was sent ahead
    group.enqueue(gathers, None, CONFIG, first)
    group.checks.append(check)
    gathers, check = group.gather_part(1, 4)  # another one: what was sent ahead is dropped
    group.enqueue(gathers, None, CONFIG)
    group.checks.append(check)
    scatters, check = group.scatter_part(1, 4)
    group.enqueue(None, scatters, CONFIG)
    group.checks.append(check)
    group.run(seed)
    for index in range(20):  # all windows once more
        gathers, check = group.gather_part(1, 3 + index % 3)
        group.enqueue(gathers, None, CONFIG)
        group.checks.append(check)
    group.run(seed)


@pytest.mark.parametrize("seed", range(4))
def test_a_shard_that_a_scatter_sends_ahead(seed: int) -> None:
    group = Group(3, seed)
    for rows in (4, 6, 5, 4):
        shards = [group.random(1, rows, WIDTH) for _ in range(3)]
        scatters, check = group.scatter_part(2, 7)
        with CommRecorder() as record:
            group.enqueue(None, scatters, CONFIG, shards)
            group.checks.append(check)
            gathers, check = group.gather_of(shards)
            group.enqueue(gathers, None, CONFIG)
            group.checks.append(check)
        assert record.ahead() == {"served": 3, "open": 0, "dropped": 0}
        if seed % 2:
            group.run(seed)
    group.run(seed)


@pytest.mark.parametrize("between", ("unfused", "scatter", "tiles"))
def test_any_other_call_drops_what_was_sent_ahead(between: str) -> None:
    """An optimizer may change the shard after it, without a trace in the tensor that was sent."""
    group = Group(3)
    first, second = ([group.random(1, 4, WIDTH) for _ in range(3)] for _ in range(2))
    gathers, check = group.gather_of(first)
    group.enqueue(gathers, None, CONFIG, second)
    group.checks.append(check)
    if between == "scatter":
        scatters, check = group.scatter_part(1, 4)
        group.enqueue(None, scatters, CONFIG)
        group.checks.append(check)
    for rank, transport in enumerate(group.transports if between != "scatter" else ()):
        if between == "unfused":
            whole = group.machine.keep(torch.empty(3, 1, 4, WIDTH, dtype=torch.float64))
            transport.all_gather(Call("operator", "forward", CONFIG, Gather(first[rank], lambda *_: None)), whole)
        else:
            gather = Gather(first[rank], lambda *_: None, tiles=lambda found: None)
            transport.execute(Call("operator", "forward", OverlapConfig(mode="tiles"), gather))
    group.run(0)
    for shard in second:
        shard.detach().numpy()[:] *= 2  # the version does not change
    gathers, check = group.gather_of(second)
    group.enqueue(gathers, None, CONFIG)
    group.checks.append(check)
    group.run(1)


@pytest.mark.parametrize("error", (MemoryError("no memory for the product"), ValueError("bad block")))
def test_an_error_in_the_middle_of_a_call_ends_the_transport(error: Exception) -> None:
    """Peers are told instead of waiting; a ValueError would promise that nothing was sent."""
    group = Group(2)
    gathers, _ = group.gather_part(1, 4)

    device = group.machine.devices[0]
    call = Call("operator", "forward", CONFIG, gathers[0])
    with mock.patch.object(device, "call", side_effect=error), mock.patch.object(device, "give_up") as told:
        expected = CommunicationError if isinstance(error, ValueError) else MemoryError
        with pytest.raises(expected, match=str(error)):
            group.transports[0].execute(call)
    told.assert_called_once_with(error)
    with pytest.raises(CommunicationError, match="cannot be used any more"):
        group.transports[0].execute(call)


@pytest.mark.parametrize("what", ("operations", "addresses"))
def test_an_error_before_a_call_is_enqueued_is_told_to_peers_that_count_on_it(what: str) -> None:
    """They have read that this rank makes the call, and would wait for it until their time is over."""
    group = Group(2)
    scatter = Scatter(group.random(1, 4, WIDTH), None, tiles=lambda found: None)  # type: ignore[arg-type]
    call = Call("operator", "forward", OverlapConfig(mode="tiles"), None, scatter)
    device = group.machine.devices[0]
    fails = mock.patch.object(device, what, side_effect=torch.OutOfMemoryError("no memory for the program"))
    with fails, mock.patch.object(device, "give_up") as told, pytest.raises(torch.OutOfMemoryError):
        group.transports[0].execute(call)
    assert "no memory for the program" in str(told.call_args.args[0])
    with pytest.raises(CommunicationError, match="cannot be used any more .*no memory for the program"):
        group.transports[0].execute(call)


def test_a_call_that_does_not_fit_leaves_everything_as_it_was() -> None:
    group = Group(2)
    small, second = ([group.random(1, 2, WIDTH) for _ in range(2)] for _ in range(2))
    gathers, check = group.gather_of(small)
    group.enqueue(gathers, None, CONFIG, second)
    group.checks.append(check)
    for _ in range(12):  # more often than there are windows
        large, _ = group.gather_part(1, 50)
        for rank, transport in enumerate(group.transports):
            grow = mock.patch.object(
                group.machine.devices[rank], "grow", side_effect=CapacityExceededError("too large")
            )
            with grow, pytest.raises(CapacityExceededError):
                transport.execute(Call("operator", "forward", CONFIG, large[rank]))
    group.run(0)
    for _ in range(10):
        gathers, check = group.gather_part(1, 2)
        group.enqueue(gathers, None, CONFIG)
        group.checks.append(check)
    group.run(1)


def test_a_captured_call_can_be_replayed() -> None:
    """No count of the host is baked in: replays go between other calls, in any number."""
    group = Group(3)
    gathers, gather_check = group.gather_part(1, 4)
    scatters, scatter_check = group.scatter_part(1, 4)
    group.enqueue(gathers, scatters, CONFIG)  # windows exist before the capture
    group.run(0)
    replay = group.machine.capture(lambda: group.enqueue(gathers, scatters, CONFIG))
    for seed in range(6):
        for gather, scatter in zip(gathers, scatters, strict=True):
            gather.shard.copy_(group.random(*gather.shard.shape))
            scatter.out.fill_(torch.nan)
        for _ in range(1 + seed % 3):
            replay()
        group.checks += [gather_check, scatter_check]
        for _ in range(seed % 2):
            others, check = group.gather_part(1, 4)
            group.enqueue(others, None, CONFIG)
            group.checks.append(check)
        group.run(seed)


def test_a_peer_that_never_comes_is_an_error_that_names_it() -> None:
    group = Group(3)
    gathers, _ = group.gather_part(1, 4)
    for rank in (0, 1):
        group.transports[rank].execute(Call("operator", "forward", CONFIG, gathers[rank]))
    group.machine.run(0, give_up=True)
    for rank in (0, 1):
        expected = rf"operator \(forward\): rank {rank} waited for rank 2 to publish"
        with pytest.raises(SignalTimeoutError, match=expected):
            group.transports[rank].synchronize()
        assert group.transports[rank].broken
        with pytest.raises(CommunicationError):
            group.transports[rank].execute(Call("operator", "forward", CONFIG, gathers[rank]))


def test_memory_of_a_call_stays_within_two_chunks() -> None:
    """Slots, stages and what is received, with as many pieces as ranks."""
    world, rows = 4, 4096
    group = Group(world)
    scatters, check = group.scatter_part(1, rows)
    group.enqueue(None, scatters, CONFIG)
    group.checks.append(check)
    group.run(0)
    chunk = rows * WIDTH * 8
    device = group.machine.devices[0]
    assert device.most_scratch + group.transports[0].reserved_bytes <= 2 * chunk
    gathers, check = group.gather_part(1, rows)
    group.enqueue(gathers, None, CONFIG)
    group.run(0)
    assert device.most_scratch <= 2 * chunk


# ---- one kernel that waits and signals -------------------------------------------------------------------------------


def test_tile_gather_gets_chunks_in_the_order_of_visits() -> None:
    world, rows, pieces = 4, 6, 3
    group = Group(world)
    config = OverlapConfig(mode="tiles", chunks_per_rank=pieces)
    shards = [group.random(1, rows, WIDTH) for _ in range(world)]
    for seed in range(3):
        seen: list[TileGather] = []
        for rank, transport in enumerate(group.transports):
            gather = Gather(shards[rank], consume=None, tiles=seen.append)  # type: ignore[arg-type]
            transport.execute(Call("operator", "forward", config, gather))
        group.machine.run(seed)
        for found in seen:
            assert found.pieces == pieces and found.local.shape == (rows, WIDTH)
            expected = [shards[(found.rank + visit) % world][0] for visit in range(1, world)]
            assert torch.equal(found.gathered, torch.stack(expected))
            # The kernel runs before the epoch advances; here everything has happened.
            assert (found.words - (int(found.epoch) - 1) * 256 >= pieces).all()
            names = group.machine.devices[found.rank].waits[found.limit.tag :][: (world - 1) * pieces]
            mine = f"operator (forward): rank {found.rank} waited for chunk"
            assert names == [
                f"{mine} {source}, piece {piece}, to be copied here from rank {source}"
                for source in ((found.rank + visit) % world for visit in range(1, world))
                for piece in range(pieces)
            ]
            assert found.limit.timeout_s == config.timeout_s
    assert piece_bounds(rows, pieces, pieces - 1)[1] == rows


def test_tile_scatter_addresses_are_the_owners() -> None:
    """A stand-in for the kernel stores and signals through the tables it is given."""
    world, rows = 3, 5
    group = Group(world)
    config = OverlapConfig(mode="tiles")
    for seed in range(4):
        parts = [group.random(world, rows, WIDTH) for _ in range(world)]
        outs = [torch.full((1, rows, WIDTH), torch.nan, dtype=torch.float64) for _ in range(world)]

        def store(found: TileScatter, parts: list[Tensor] = parts) -> None:
            word = ctypes.c_int32.from_address

            found.own.copy_(parts[found.rank][found.rank])
            for target in range(found.world):
                if target == found.rank:
                    continue
                base = int(found.epoch) * 256
                assert word(int(found.credits[target])).value >= base + found.credit_value
                name = group.machine.devices[found.rank].waits[found.limit.tag + (target - found.rank) % world - 1]
                assert f"rank {found.rank} waited for rank {target} to add up what it was sent before" in name
                part = parts[found.rank][target].contiguous()
                ctypes.memmove(int(found.slots[target]), part.data_ptr(), part.numel() * 8)
                word(int(found.arrived[target])).value = base + found.arrived_value

        for rank, transport in enumerate(group.transports):
            scatter = Scatter(outs[rank], produce=None, tiles=store)  # type: ignore[arg-type]
            transport.execute(Call("operator", "forward", config, None, scatter))
        group.machine.run(seed)
        for rank in range(world):
            torch.testing.assert_close(outs[rank][0], torch.stack(parts).sum(0)[rank])


def test_a_kernel_that_gave_up_is_an_error_with_names() -> None:
    """A stand-in for the kernel writes what a real one does into the block that the host reads."""
    group = Group(3)
    config = OverlapConfig(mode="tiles", chunks_per_rank=2, timeout_s=2.0)

    def give_up(found: TileGather) -> None:
        control = group.machine.devices[found.rank].control
        assert found.limit.control is control.address
        if found.rank == 1:
            control.words[CONTROL_WORDS["code"]] = 1
            control.words[CONTROL_WORDS["tag"]] = found.limit.tag + 3
            control.words[CONTROL_WORDS["recorded"]] = 1

    for transport in group.transports:
        transport.execute(
            Call("operator", "forward", config, Gather(group.random(1, 4, WIDTH), None, tiles=give_up))  # type: ignore[arg-type]
        )
    group.machine.run(0)
    wanted = r"operator \(forward\): rank 1 waited for chunk 0, piece 1, to be copied here from rank 0"
    with pytest.raises(SignalTimeoutError, match=wanted):
        group.transports[1].synchronize()
    group.transports[0].synchronize()


def test_tiles_refuse_what_they_cannot_serve() -> None:
    group = Group(2)
    gathers, _ = group.gather_part(1, 4)
    transport = group.transports[0]
    with pytest.raises(ValueError, match='mode "fused" or "unfused"'):
        transport.execute(Call("operator", "forward", OverlapConfig(mode="tiles"), gathers[0]))
    absent = mock.patch("odysseus_kernels.comm.choice.preparation.importlib.util.find_spec", return_value=None)
    with absent, pytest.raises(ValueError, match="expected the package triton"):
        transport.execute(Call("operator", "forward", OverlapConfig(mode="tiles"), gathers[0]))
    gather = dataclasses.replace(gathers[0], tiles=lambda found: None)
    with pytest.raises(ValueError, match="tile_bytes=95 "):
        transport.execute(Call("operator", "forward", OverlapConfig(mode="tiles", tile_bytes=95), gather))
