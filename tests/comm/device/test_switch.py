"""Sums and copies of a switch on simulated devices: any order of events and of additions, NaN where nobody wrote."""

from __future__ import annotations

import dataclasses
import random
from typing import Any
from unittest import mock

import pytest
import torch
from simulated_group import CONFIG, Group
from torch import Tensor

from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.comm.switch import switch_error_bound
from odysseus_kernels.comm.transport import Call, CapacityExceededError, Gather, Scatter
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.errors import SignalTimeoutError
from odysseus_kernels.ops import _all_reduce

pytestmark = pytest.mark.without_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NVLS = dataclasses.replace(CONFIG, reduce="nvls")


def check_sum(found: Tensor, parts: Tensor) -> None:
    """Against fp64; ``parts`` [ranks, ...]."""
    assert not found.isnan().any()
    error = (found.double() - parts.double().sum(0)).abs()
    bound = switch_error_bound(parts)
    assert (error <= bound).all(), float((error / bound).max())


def scatter_part(group: Group, batch: int, rows: int, width: int, dtype: torch.dtype) -> tuple[list[Scatter], Any]:
    parts = torch.stack([group.random(group.world, batch, rows, width, dtype=dtype) for _ in range(group.world)])
    outs = [torch.full((batch, rows, width), torch.nan, dtype=dtype) for _ in range(group.world)]

    def produce(rank: int) -> Any:
        return lambda target, start, stop, block: block.copy_(parts[rank, target, :, start:stop])

    def check() -> None:
        for rank in range(group.world):
            check_sum(outs[rank], parts[:, rank])

    return [Scatter(outs[rank], produce(rank)) for rank in range(group.world)], check


def gather_part(group: Group, batch: int, rows: int, width: int, dtype: torch.dtype) -> tuple[list[Gather], Any]:
    shards = [group.random(batch, rows, width, dtype=dtype) for _ in range(group.world)]
    seen = [torch.full((group.world, batch, rows, width), torch.nan, dtype=dtype) for _ in shards]

    def consume(rank: int) -> Any:
        return lambda source, start, stop, block: seen[rank][source, :, start:stop].copy_(block)

    def check() -> None:
        for rank in range(group.world):
            assert torch.equal(seen[rank], torch.stack(shards))

    return [Gather(shard, consume(rank)) for rank, shard in enumerate(shards)], check


@pytest.mark.parametrize("world", (2, 3, 4, 5, 8))
@pytest.mark.parametrize("pieces", ("auto", 1, 3, 64))
def test_calls_back_to_back(world: int, pieces: Any) -> None:
    """Through the switch and from rank to rank in turns, several batches and types, in any order that is allowed."""
    group = Group(world, seed=world)
    choose = random.Random(world)
    for round_ in range(6):
        for _ in range(choose.randint(1, 5)):
            batch, rows, dtype = choose.choice((1, 2)), choose.choice((1, 4, 7)), choose.choice(DTYPES)
            width, switched = choose.choice((8, 24)), choose.random() < 0.7
            program = choose.choice(("gather", "scatter", "both"))
            gathers = scatters = None
            if program != "scatter":
                gathers, check = gather_part(group, batch, rows, width, dtype)
                group.checks.append(check)
            if program != "gather":
                scatters, check = scatter_part(group, batch, rows, width, dtype)
                group.checks.append(check)
            group.enqueue(gathers, scatters, dataclasses.replace(CONFIG, chunks_per_rank=pieces), switched=switched)
        group.run(round_)


def test_the_order_of_the_switch_is_another_each_time() -> None:
    """What the simulation adds in is not the order of ranks: bits differ from run to run, within the bound."""
    group, found = Group(8), set()
    parts = torch.stack([group.random(8, 1, 64, 8, dtype=torch.float32) for _ in range(8)])
    for seed in range(4):
        outs = [torch.full((1, 64, 8), torch.nan) for _ in range(8)]
        scatters = [
            Scatter(out, lambda target, start, stop, block, rank=rank: block.copy_(parts[rank, target, :, start:stop]))
            for rank, out in enumerate(outs)
        ]
        group.enqueue(None, scatters, CONFIG, switched=True)
        group.run(seed)
        for rank in range(8):
            check_sum(outs[rank], parts[:, rank])
        found.add(tuple(outs[0].flatten().tolist()))
    assert len(found) > 1


def test_a_sum_reads_what_it_writes_and_holds_few_multiprocessors() -> None:
    group = Group(8)
    for device in group.machine.devices:
        device.link_bytes_per_s = 450e9
    scatters, check = scatter_part(group, 2, 6, 8, torch.bfloat16)
    group.enqueue(None, scatters, dataclasses.replace(NVLS, chunks_per_rank=3), switched=True)
    group.checks.append(check)
    group.run(0)
    for device in group.machine.devices:
        assert [one.beside for one in device.sums] == [4, 4, 0]
        assert sum(one.elements for one in device.sums) == 2 * 6 * 8
        assert device.most_scratch == 0, "products write into windows: there are no stages"


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("batch", (1, 2))
def test_unfused_twins(world: int, batch: int) -> None:
    group = Group(world)
    for seed in range(3):
        parts = torch.stack([group.random(world, batch, 5, 8, dtype=torch.float32) for _ in range(world)])
        scatters, _ = scatter_part(group, batch, 5, 8, torch.float32)
        gathers, _ = gather_part(group, batch, 5, 8, torch.float32)
        wholes = [torch.full((world, batch, 5, 8), torch.nan) for _ in range(world)]
        for rank, transport in enumerate(group.transports):
            config = dataclasses.replace(NVLS, mode="unfused", chunks_per_rank=2)
            call = Call("operator", "forward", config, None, scatters[rank], switched=True)
            transport.reduce_scatter(call, parts[rank].contiguous())
            transport.all_gather(Call("operator", "forward", config, gathers[rank], switched=True), wholes[rank])
        group.machine.run(seed)
        for rank in range(world):
            check_sum(scatters[rank].out, parts[:, rank])
            assert torch.equal(wholes[rank], torch.stack([gather.shard for gather in gathers]))


def test_rows_of_a_larger_output() -> None:
    group = Group(3)
    scatters, _ = scatter_part(group, 2, 4, 8, torch.float32)
    outs = [torch.full((2, 9, 8), 7.0) for _ in range(3)]
    scatters = [dataclasses.replace(s, out=outs[rank][:, 2:6]) for rank, s in enumerate(scatters)]
    group.enqueue(None, scatters, dataclasses.replace(NVLS, chunks_per_rank=2), switched=True)
    group.run(1)
    for out in outs:
        assert not out.isnan().any() and not (out[:, 2:6] == 7).any()
        assert (out[:, :2] == 7).all() and (out[:, 6:] == 7).all()


@pytest.mark.parametrize("world", (2, 3, 8))
@pytest.mark.parametrize("blocks", (1, 3))
@pytest.mark.parametrize("mode", ("fused", "unfused"))
def test_all_reduce(world: int, blocks: int, mode: Any) -> None:
    """The operator's own sum: lines that ranks do not divide, a bias once, the same bits on all ranks."""
    group, lines, width = Group(world), 6 * world - 1, 8
    parts = torch.stack([group.random(lines, width, dtype=torch.bfloat16) for _ in range(world)])
    bias = group.random(width, dtype=torch.bfloat16) if mode == "fused" else None
    config, found, sent = OverlapConfig(mode=mode, reduce="nvls", chunks_per_rank=2), list[Tensor](), list[int]()
    for rank, transport in enumerate(group.transports):

        def dispatch(of: Any, settled: Any, device: Any, run: Any, phase: Any, transport: Any = transport) -> None:
            assert phase.switched
            run(transport, settled)

        def produce(start: int, stop: int, block: Tensor, bias: Tensor | None, rank: int = rank) -> None:
            part = parts[rank, start:stop]
            block.copy_(part if bias is None else part + bias)

        ranks: Any = mock.Mock(size=lambda: world, rank=lambda rank=rank: rank)
        cut = mock.patch.object(_all_reduce, "_blocks", lambda transport, config, whole: (blocks, config))
        with mock.patch.object(_all_reduce, "dispatch", dispatch), cut, CommRecorder() as record:
            options = {"flops": 1, "shapes": "", "bias": bias, "switched": True}
            like = parts.new_empty(0)
            found.append(
                _all_reduce.sum_rows(
                    "operator",
                    "forward",
                    like,
                    lines,
                    width,
                    produce,
                    ranks,
                    config,
                    **options,  # type: ignore[arg-type]
                )
            )
        sent.append(record.bytes())
    group.machine.run(blocks)
    made = parts.clone()
    for line, owner in enumerate(owners(world, blocks)[:lines] if bias is not None else []):
        assert bias is not None
        made[owner, line] += bias
    for one in found:
        check_sum(one, made)
        assert torch.equal(one, found[0])
    chunk = 6 * width * 2
    assert sent == [(world + 1) * chunk] * world


def owners(world: int, blocks: int) -> list[int]:
    """Which rank adds each of 6 * world lines: in each block they have equal shares."""
    shares = [6 * (block + 1) // blocks - 6 * block // blocks for block in range(blocks)]
    return [rank for share in shares for rank in range(world) for _ in range(share)]


def test_captured_calls_are_replayed() -> None:
    group = Group(3)
    gathers, gather_check = gather_part(group, 1, 4, 8, torch.float32)
    scatters, scatter_check = scatter_part(group, 1, 4, 8, torch.float32)

    def enqueue() -> None:
        group.enqueue(gathers, scatters, NVLS, switched=True)

    enqueue()
    group.run(0)
    replay = group.machine.capture(enqueue)
    for seed in range(6):
        for scatter in scatters:
            scatter.out.fill_(torch.nan)
        for _ in range(1 + seed % 3):
            replay(reverse=seed % 2 == 1)
        group.checks += [gather_check, scatter_check]
        others, check = gather_part(group, 1, 4, 8, torch.float32)
        group.enqueue(others, None, NVLS, switched=True)
        group.checks.append(check)
        group.run(seed)


def test_bytes_are_those_of_the_link() -> None:
    """Every rank's part crosses its link for every owner, its own included; what is stored leaves once."""
    group = Group(4)
    scatters, _ = scatter_part(group, 1, 4, 8, torch.bfloat16)
    gathers, _ = gather_part(group, 1, 4, 8, torch.bfloat16)
    chunk = 4 * 8 * 2
    for parts, expected in (((None, scatters), 4 * chunk), ((gathers, None), chunk), ((gathers, scatters), 5 * chunk)):
        with CommRecorder() as record:
            group.enqueue(*parts, NVLS, switched=True)
        assert record.bytes() == 4 * expected
        group.run(0)


def test_memory_stays_within_two_chunks() -> None:
    world, rows = 4, 4096
    for gathers in (False, True):
        group = Group(world)
        parts = gather_part if gathers else scatter_part
        part, check = parts(group, 1, rows, 8, torch.float32)
        group.enqueue(part if gathers else None, None if gathers else part, NVLS, switched=True)
        group.checks.append(check)
        group.run(0)
        assert group.machine.devices[0].most_scratch == 0
        assert group.transports[0].reserved_bytes <= 2 * rows * 8 * 4


@pytest.mark.parametrize("switched", (False, True))
def test_no_rows(switched: bool) -> None:
    group = Group(3)
    for _ in range(3):
        gathers, gather_check = gather_part(group, 2, 0, 8, torch.float32)
        scatters, scatter_check = scatter_part(group, 2, 0, 8, torch.float32)
        for parts in ((gathers, None), (None, scatters), (gathers, scatters)):
            group.enqueue(*parts, CONFIG, switched=switched)
        group.checks += [gather_check, scatter_check]
        group.run(0)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_sent_ahead_beside_it(seed: int) -> None:
    """What the next call gathers is published by that call; what was sent ahead before is dropped."""
    group = Group(3, seed)
    shards = [group.random(1, 4, 8) for _ in range(3)]
    if seed % 2:
        gathers, check = gather_part(group, 1, 4, 8, torch.float32)
        group.enqueue(gathers, None, CONFIG, shards)
        group.checks.append(check)
    scatters, check = scatter_part(group, 1, 4, 8, torch.float32)
    with CommRecorder() as record:
        group.enqueue(None, scatters, NVLS, shards, switched=True)
        group.checks.append(check)
        seen = [torch.full((3, 1, 4, 8), torch.nan, dtype=torch.float64) for _ in range(3)]
        gathers = [
            Gather(shard, lambda source, start, stop, block, to=to: to[source, :, start:stop].copy_(block))
            for shard, to in zip(shards, seen, strict=True)
        ]
        group.enqueue(gathers, None, CONFIG)
    assert record.ahead() == {"served": 0, "open": 3, "dropped": 3 * (seed % 2)}
    group.run(seed)
    assert all(torch.equal(to, torch.stack(shards)) for to in seen)


# ---- what is refused, on all ranks and before anything is sent -------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "width", "mode", "said"),
    (
        (
            torch.float64,
            8,
            "fused",
            r"expected float32, bfloat16 or float16 .* got torch.float64, which no switch adds",
        ),
        (torch.bfloat16, 7, "fused", r"rows of a multiple of 16 bytes .* got 7 of torch.bfloat16, which are 14 bytes"),
        (torch.float32, 5, "unfused", r"multiple of 16 bytes .* got 5 of torch.float32, which are 20 bytes; pad"),
        (torch.float32, 8, "tiles", r'expected mode "auto", "fused" or "unfused" with reduce="nvls", got "tiles"'),
    ),
)
def test_what_no_switch_serves(dtype: torch.dtype, width: int, mode: Any, said: str) -> None:
    group = Group(2)
    scatters, _ = scatter_part(group, 1, 4, width, dtype)
    for rank, transport in enumerate(group.transports):
        call = Call("operator", "forward", OverlapConfig(mode=mode), None, scatters[rank], switched=True)
        with pytest.raises(ValueError, match=said + '.*use reduce="ranks"'):
            transport.execute(call)
        if mode == "unfused":
            with pytest.raises(ValueError, match=said):
                transport.reduce_scatter(call, torch.zeros(2, 1, 4, width, dtype=dtype))
    assert group.machine.calls == [[], []], "no rank said that it makes a call"


def test_what_is_stored_is_checked_by_its_own_setting() -> None:
    group = Group(2)
    gathers, _ = gather_part(group, 1, 4, 6, torch.bfloat16)
    call = Call("operator", "forward", CONFIG, gathers[0], switched=True)
    with pytest.raises(ValueError, match=r'for gather="nvls", got 6 of torch.bfloat16.*use gather="ranks"'):
        group.transports[0].execute(call)
    with pytest.raises(ValueError, match=r'for reduce="nvls", got 6 of torch.bfloat16'):
        group.transports[0].execute(dataclasses.replace(call, collective="all_reduce"))
    wide, check = gather_part(group, 1, 4, 8, torch.float64)  # nothing is added
    group.enqueue(wide, None, CONFIG, switched=True)
    group.checks.append(check)
    group.run(0)


def test_devices_without_a_switch() -> None:
    group = Group(2)
    scatters, _ = scatter_part(group, 1, 4, 8, torch.float32)
    for rank, transport in enumerate(group.transports):
        transport.no_switch = "the GPU or driver of rank 1 knows no multicast addresses"
        with pytest.raises(ValueError, match=r"one NVLink switch .* got ranks without: the GPU or driver of rank 1"):
            transport.execute(Call("operator", "forward", NVLS, None, scatters[rank], switched=True))


def test_a_driver_that_runs_out_of_multicast_addresses_leaves_everything_as_it_was() -> None:
    group = Group(2)
    for _ in range(12):  # more often than there are windows
        scatters, check = scatter_part(group, 1, 50, 8, torch.float32)
        for rank, transport in enumerate(group.transports):
            call = Call("operator", "forward", NVLS, None, scatters[rank], switched=True)
            for error in (ValueError("no multicast address"), CapacityExceededError("too large")):
                grow = mock.patch.object(group.machine.devices[rank], "grow", side_effect=error)
                with grow, pytest.raises(type(error), match=str(error)):
                    transport.execute(call)
    for _ in range(10):
        scatters, check = scatter_part(group, 1, 4, 8, torch.float32)
        group.enqueue(None, scatters, NVLS, switched=True)
        group.checks.append(check)
    group.run(0)


@pytest.mark.parametrize(
    ("program", "said"),
    (
        ("scatter", "rank 0 waited for rank 2 to make its part of chunk 0, piece 0"),
        ("gather", "rank 0 waited for rank 2 to store chunk 2, piece 0, to all ranks"),
    ),
)
def test_a_peer_that_never_comes_is_named(program: str, said: str) -> None:
    group = Group(3)
    scatters, _ = scatter_part(group, 1, 4, 8, torch.float32)
    gathers, _ = gather_part(group, 1, 4, 8, torch.float32)
    for rank in (0, 1):
        parts = (None, scatters[rank]) if program == "scatter" else (gathers[rank], None)
        group.transports[rank].execute(Call("operator", "forward", NVLS, *parts, switched=True))
    group.machine.run(0, give_up=True)
    with pytest.raises(SignalTimeoutError, match=said):
        group.transports[0].synchronize()
