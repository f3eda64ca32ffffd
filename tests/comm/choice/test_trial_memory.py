"""Windows that grew for runs that were only timed are given back, and what lies in windows is not mistaken."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from simulated_group import CONFIG, Group
from test_kernel_preparation import AUTO, Lockstep, a_device_by_name

from odysseus_kernels.comm.device.cuda import CudaDevice
from odysseus_kernels.comm.device.peer_memory import TorchSymmetricMemory
from odysseus_kernels.testing.virtual_devices import SilentPeers

assert a_device_by_name  # a fixture of both files

LARGE = dataclasses.replace(CONFIG, chunks_per_rank=1)


def reserved(group: Group) -> int:
    (nbytes,) = {transport.reserved_bytes for transport in group.transports}
    return nbytes


def run(group: Group, rows: int, config: Any = CONFIG, seed: int = 0) -> None:
    """A gather and a scatter of ``rows`` rows, whose results are checked."""
    gathers, gathered = group.gather_part(1, rows)
    scatters, scattered = group.scatter_part(1, rows)
    group.enqueue(gathers, scatters, config)
    group.checks += [gathered, scattered]
    group.run(seed)


@pytest.mark.parametrize("rows_before", (0, 8))
def test_windows_are_what_they_were_before_a_trial(rows_before: int) -> None:
    group = Group(4)
    for seed in range(3 if rows_before else 0):
        run(group, rows_before, seed=seed)
    before = reserved(group)
    with ExitStack() as trials:
        for transport in group.transports:
            trials.enter_context(transport.trial())
        for seed in range(4):
            run(group, 64, LARGE, seed)
        most = reserved(group)
    assert most > 4 * before and reserved(group) == before
    for seed in range(4):
        run(group, 64, dataclasses.replace(CONFIG, chunks_per_rank=16), seed)
    alone = Group(4)
    for seed in range(4):
        run(alone, 64, dataclasses.replace(CONFIG, chunks_per_rank=16), seed)
    assert reserved(group) == reserved(alone) < most


def test_a_trial_that_is_refused_gives_back_too() -> None:
    group = Group(2)

    def refused() -> None:
        with ExitStack() as trials:
            for transport in group.transports:
                trials.enter_context(transport.trial())
            run(group, 8)
            assert reserved(group) > 0
            raise ValueError("no mode")

    with pytest.raises(ValueError, match="no mode"):
        refused()
    assert reserved(group) == 0
    run(group, 8)


def test_a_shard_that_a_trial_sent_ahead_is_sent_again() -> None:
    """It lies in a window that is no more."""
    group = Group(3)
    first, second = ([group.random(1, 6, 3) for _ in range(3)] for _ in range(2))
    with ExitStack() as trials:
        for transport in group.transports:
            trials.enter_context(transport.trial())
        gathers, check = group.gather_of(first)
        group.enqueue(gathers, None, CONFIG, second)
        group.checks.append(check)
        group.run(0)
    assert reserved(group) == 0
    for seed in range(6):
        gathers, check = group.gather_of(second)
        group.enqueue(gathers, None, CONFIG)
        group.checks.append(check)
        group.run(seed)


def test_a_graph_that_was_captured_before_a_trial_goes_on() -> None:
    group = Group(3)
    gathers, check = group.gather_part(1, 4)
    for seed in range(3):
        group.enqueue(gathers, None, CONFIG)
        group.run(seed)
    replay = group.machine.capture(lambda: group.enqueue(gathers, None, CONFIG))
    with ExitStack() as trials:
        for transport in group.transports:
            trials.enter_context(transport.trial())
        for seed in range(4):
            run(group, 32, LARGE, seed)
    for seed in range(4):
        for gather in gathers:
            gather.shard.copy_(group.random(*gather.shard.shape))
        replay()
        group.checks.append(check)
        group.run(seed)
        run(group, 4, seed=seed)


def test_a_choice_keeps_only_what_the_chosen_mode_needs() -> None:
    ranks = Lockstep(set(), {"unfused": 1.0, "fused": 2.0, "tiles": 3.0})
    found, _ = ranks.choose(AUTO)
    assert {one.mode for one in found} == {"unfused"}
    assert reserved(ranks.group) == 0
    ranks.check(found[0])
    alone = Lockstep(set(), {})
    alone.check(found[0])
    assert reserved(ranks.group) == reserved(alone.group) > 0


# ---- memory of GPUs --------------------------------------------------------------------------------------------------


def symmetric_memory() -> TorchSymmetricMemory:
    """With a stand-in for what torch does."""
    memory = object.__new__(TorchSymmetricMemory)
    memory._device, memory._refused, memory._windows, memory.retain = torch.device("cuda", 0), None, {}, False
    memory._retained, memory._trial, memory._exchange = [], False, lambda text: [text, ""]
    memory._empty = lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)  # type: ignore[method-assign]
    memory._meet = lambda tensor: ([tensor.data_ptr()] * 2, object())  # type: ignore[method-assign]
    return memory


@pytest.mark.parametrize("retain", (False, True))
def test_symmetric_memory_of_a_trial_is_freed(retain: bool) -> None:
    memory, place, other = symmetric_memory(), ("receive", 0), ("receive", 1)
    with mock.patch.object(torch.cuda, "synchronize"):
        memory.grow({place: 1})
        small, address = memory.backed(place), memory.window(1, place)
        memory.retain = retain  # a graph was captured
        held = memory.hold()
        for nbytes in (10 << 20, 50 << 20):
            memory.grow({place: nbytes, other: nbytes})
        memory._refused = 60 << 20  # beside all that
        freed = [weakref.ref(memory._windows[one][0]) for one in (place, other)]
        assert memory.backed(place) == 50 << 20
        assert memory.restore(held) == {place, other}
        gc.collect()
        assert memory._refused is None
        assert (memory.backed(place), memory.window(1, place), memory.backed(other)) == (small, address, 0)
        assert [ref() for ref in freed] == [None, None] and not memory._retained
        # Outside of a trial a window that a graph uses stays when it is replaced.
        memory.grow({place: 10 << 20})
    assert len(memory._retained) == retain


def test_silent_peers_give_back_too() -> None:
    peers = SilentPeers(torch.device("cpu"), 3)
    peers.grow({("shard", 0): 100})
    address, held = peers.window(1, ("shard", 0)), peers.hold()
    peers.grow({("shard", 0): 1000, ("receive", 1): 500})
    assert peers.restore(held) == {("shard", 0), ("receive", 1)}
    assert peers.backed(("shard", 0)) == 100 and peers.backed(("receive", 1)) == 0
    assert peers.window(1, ("shard", 0)) == address
    peers.grow({("receive", 1): 700})
    assert peers.backed(("receive", 1)) == 700


def test_a_device_is_idle_before_its_memory_goes() -> None:
    """Scratch memory goes back with it, which torch would keep; a capture, in which nothing grows, is not disturbed."""
    order = mock.Mock()
    device: Any = object.__new__(CudaDevice)
    device.device, device._memory = torch.device("cuda", 0), order.memory
    order.memory.restore.side_effect = [{("shard", 0)}, set()]
    with (
        mock.patch.object(torch.cuda, "synchronize", order.synchronize),
        mock.patch.object(torch.cuda, "empty_cache", order.empty_cache),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", side_effect=[False, False, True]),
    ):
        assert device.restore("held") == {("shard", 0)}
        assert [one[0] for one in order.mock_calls] == ["synchronize", "memory.restore", "empty_cache"]
        order.reset_mock()
        assert device.restore("held") == set() and not order.empty_cache.called  # nothing had grown
        order.reset_mock()
        assert device.restore("held") == set() and not order.mock_calls
