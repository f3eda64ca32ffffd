"""Memory of virtual ranks and silent peers, as far as it can be seen without a GPU."""

from __future__ import annotations

import weakref

import pytest
import torch

from odysseus_kernels.comm.device.lowering import KINDS, WINDOWS, WORDS
from odysseus_kernels.comm.schedules.device import RECEIVE
from odysseus_kernels.comm.schedules.steps import SHARD
from odysseus_kernels.comm.schedules.streams import STREAMS
from odysseus_kernels.testing import virtual_devices
from odysseus_kernels.testing.virtual_devices import SilentPeers, VirtualPeers, VirtualRank

_PLACE = (SHARD, 1)


def test_the_first_rank_that_grows_a_window_grows_it_for_all() -> None:
    peers = VirtualPeers([torch.device("cpu")] * 3)
    ranks = [peers.of(rank) for rank in range(3)]
    assert [rank.backed(_PLACE) for rank in ranks] == [0, 0, 0]
    ranks[0].grow({_PLACE: 64, (RECEIVE, 0): 32})
    addresses = [ranks[0].window(rank, _PLACE) for rank in range(3)]
    assert [rank.backed(_PLACE) for rank in ranks] == [64, 0, 0], "the others make the same call, and grow with it"
    for rank in ranks[1:]:
        rank.grow({_PLACE: 64, (RECEIVE, 0): 32})
        assert [rank.window(peer, _PLACE) for peer in range(3)] == addresses, "what rank 0 enqueued stays valid"
    assert [rank.backed(_PLACE) for rank in ranks] == [64, 64, 64]
    assert len({*addresses, *(ranks[1].window(peer, (RECEIVE, 0)) for peer in range(3))}) == 6


def test_memory_that_nobody_wrote_is_nan_and_words_are_zero() -> None:
    peers = VirtualPeers([torch.device("cpu")] * 2)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        peers.of(0).grow({_PLACE: 64})
        assert peers.memory(1, _PLACE).view(dtype).isnan().all()
    for rank in range(2):
        words = peers.of(rank).own_words()
        assert words.shape == (len(KINDS) * WINDOWS * WORDS * 2,)
        assert not words.any()
        assert peers.of(1 - rank).words(rank) == words.data_ptr()


def test_replaced_windows_stay_once_a_graph_may_use_them() -> None:
    peers = VirtualPeers([torch.device("cpu")] * 2)
    for rank in range(2):
        peers.of(rank).grow({_PLACE: 64})
    silent = SilentPeers(torch.device("cpu"), 2)
    silent.grow({_PLACE: 64})
    for memory in (peers.of(1), silent):
        old = memory._peers.memory(0, _PLACE) if isinstance(memory, VirtualRank) else memory.memory(0, _PLACE)
        kept = weakref.ref(old)
        memory.retain = True
        memory.grow({_PLACE: 128})
        del old
        assert kept() is not None
        assert memory.window(0, _PLACE) != kept().data_ptr()  # type: ignore[union-attr]


@pytest.mark.parametrize("world", (1, 2, 3, 4, 8, 16))
def test_no_two_ranks_share_a_stream(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """Torch repeats itself after 32 streams."""
    made: list[int] = []

    def stream(device: torch.device, priority: int) -> int:
        made.append(len(made) % 32)
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    streams = virtual_devices._streams([torch.device("cuda", 0)] * world)
    assert all(len(own) == len(STREAMS) - 1 for own in streams)
    assert len(made) + world <= 32, "each rank has a stream for products besides"
    assert len(set().union(*streams)) == sum(len(set(own)) for own in streams)
    assert all(own == sorted(own) for own in streams), "steps keep the order in which they are enqueued"


def test_too_many_ranks_on_a_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 16 ranks on cuda:0, got 17"):
        virtual_devices._streams([torch.device("cuda", 0)] * 17)
