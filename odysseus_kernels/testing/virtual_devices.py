"""Ranks that share a GPU, or are not there at all: memory for tests and for benchmarks with emulated links.

Both classes stand in for the memory that ranks map of one another (``PeerMemory`` of ``comm/device/peer_memory.py``).
Everything else, from schedules to kernels, is what real ranks run.

:class:`VirtualPeers`
    N ranks in one process on one GPU or several: for correctness.  Each rank needs a stream of its own to compute on.
    The process needs ``CUDA_DEVICE_MAX_CONNECTIONS=32``, or streams of different ranks share a hardware queue in which
    one rank's wait stands before another's signal; and ``CUDA_MODULE_LOADING=EAGER``, or the first use of a kernel
    waits for all that is running.
:class:`SilentPeers`
    one rank whose peers never do anything: their shards lie ready, and what is sent to them stays where it arrives.
    With copies that take the time of a link, this is what one GPU can tell about overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from odysseus_kernels.comm.device.cuda import CudaDevice
from odysseus_kernels.comm.device.lowering import KINDS, WINDOWS, WORDS, word_index
from odysseus_kernels.comm.device.transport import SymmetricDeviceTransport
from odysseus_kernels.comm.schedules.device import RECEIVE
from odysseus_kernels.comm.schedules.steps import SHARD
from odysseus_kernels.comm.schedules.streams import STREAMS

__all__ = ["SATISFIED", "LinkKind", "SilentPeers", "VirtualPeers", "VirtualRank", "link_of", "virtual_transports"]

LinkKind = Literal["device", "pinned"]
Place = tuple[str, int]  # kind and index of a window

_QUEUES = 32

SATISFIED = 1 << 30
"""What a word holds that no wait will ever find too small.

Words are compared by a difference that wraps at 2**31.  The first wait of a window wants -1, so a word of 2**31 - 1
would look as if it came before; half of that serves the first 2**22 uses of a window.
"""


def link_of(name: str) -> tuple[LinkKind, float]:
    """Where peers' memory lies, and the bytes/s to which copies are paced (0: not at all), of an emulated link.

    ``"paced:450"`` is memory of the same GPU at 450 GB/s in all, ``"pcie"`` is pinned memory of the host at the speed
    of the bus.

    Raises:
        ValueError: ``name`` is neither.
    """
    if name == "pcie":
        return "pinned", 0.0
    kind, _, rate = name.partition(":")
    try:
        bytes_per_s = float(rate) * 1e9
    except ValueError:
        bytes_per_s = 0.0
    if kind != "paced" or not 0 < bytes_per_s < float("inf"):
        raise ValueError(f'link: expected "pcie" or "paced:" and GB/s above 0, such as "paced:450", got {name!r}')
    return "device", bytes_per_s


def _words_count(world: int) -> int:
    return len(KINDS) * WINDOWS * WORDS * world


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class SilentPeers:
    """Memory of rank ``rank`` of ``world``, whose peers are silent.

    This rank's words say that peers have done whatever it could wait for; words that it sets in peers go nowhere.
    As nobody else reads or writes, all windows of a kind are one buffer, and so are all peers' receive windows, in
    which parts from one source to different owners lie apart anyway.  New memory is zero.

    Args:
        device: of the rank under test; a CPU where a simulated device uses this.
        world, rank: the ranks, and which one is under test.
        kind: peers' windows lie on ``"device"``, or in ``"pinned"`` memory of the host.
    """

    def __init__(self, device: torch.device, world: int, rank: int = 0, kind: LinkKind = "device") -> None:
        self.device, self.world, self.rank, self.kind = device, world, rank, kind
        self.retain = self.multicasts = False
        self._retained: list[Tensor] = []
        words = torch.zeros(_words_count(world), dtype=torch.int32)
        for buffer in KINDS:
            for window in range(WINDOWS):
                for which in (0, 1):  # the owners' and the peers'; local words are set by this rank's own copies
                    start = word_index(world, buffer, window, which, 0)
                    words[start : start + world] = SATISFIED
        self._words = words.to(device)
        self._ignored = torch.zeros_like(self._words)
        self._windows: dict[tuple[Place, int], Tensor] = {}
        self._buffers: dict[tuple[str, str], Tensor] = {}
        _synchronize(device)

    def words(self, rank: int) -> int:
        return (self._words if rank == self.rank else self._ignored).data_ptr()

    def own_words(self) -> Tensor:
        return self._words

    def window(self, rank: int, place: Place) -> int:
        return self.memory(rank, place).data_ptr()

    def own_window(self, place: Place) -> Tensor:
        return self.memory(self.rank, place)

    def multicast(self, place: Place) -> int:
        return 0  # one device has no switch

    def memory(self, rank: int, place: Place) -> Tensor:
        """A window's bytes, to be filled and looked at; it must have been grown."""
        return self._windows[place, rank]

    def backed(self, place: Place) -> int:
        found = self._windows.get((place, self.rank))
        return 0 if found is None else found.numel()

    def grow(self, sizes: dict[Place, int]) -> None:
        _synchronize(self.device)  # plans of other windows keep their buffers, which stay as they are
        for kind in KINDS:
            most = max((nbytes for place, nbytes in sizes.items() if place[0] == kind), default=0)
            for rank in range(self.world) if most else ():
                buffer = self._buffer(rank, kind, most)
                for place in sizes:
                    if place[0] == kind:
                        before, self._windows[place, rank] = self._windows.get((place, rank)), buffer
                        if self.retain and before is not None:
                            self._retained.append(before)

    def _buffer(self, rank: int, kind: str, nbytes: int) -> Tensor:
        own = rank == self.rank
        key = (kind, "own" if own else "peers" if kind == RECEIVE else f"peer {rank}")
        found = self._buffers.get(key)
        if found is None or found.numel() < nbytes:
            pinned = self.kind == "pinned" and not own
            where = torch.device("cpu") if pinned else self.device
            found = torch.zeros(nbytes, dtype=torch.uint8, device=where, pin_memory=pinned)
            self._buffers[key] = found
        return found

    def hold(self) -> object:
        return dict(self._windows), dict(self._buffers)

    def restore(self, held: object) -> set[Place]:
        assert isinstance(held, tuple)
        before, buffers = held
        moved = {place for (place, rank), window in self._windows.items() if window is not before.get((place, rank))}
        self._windows, self._buffers = before, buffers
        return moved

    def close(self) -> None:
        self._windows.clear()
        self._buffers.clear()
        self._retained.clear()


class VirtualPeers:
    """Memory of ranks in one process, one for each of ``devices``; whatever nobody wrote is NaN.

    Ranks make their calls one after another.  A call that makes windows larger must come after the end of all earlier
    calls: the first rank that makes it replaces everybody's memory, the others find it replaced.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)
        self.world = len(self.devices)
        self.retain = False
        self._retained: list[Tensor] = []
        self._words = [torch.zeros(_words_count(self.world), dtype=torch.int32, device=d) for d in self.devices]
        self._windows: dict[Place, list[Tensor]] = {}
        self._synchronize()

    def of(self, rank: int) -> VirtualRank:
        """What ``rank`` sees."""
        return VirtualRank(self, rank)

    def own_words(self, rank: int) -> Tensor:
        """A rank's words."""
        return self._words[rank]

    def memory(self, rank: int, place: Place) -> Tensor:
        """A window's bytes."""
        return self._windows[place][rank]

    def reserve(self, place: Place, nbytes: int) -> int:
        """Makes all ranks' windows at least that large; returns what they have."""
        found = self._windows.get(place)
        if found is None or found[0].numel() < nbytes:
            self._synchronize()
            if self.retain and found is not None:
                self._retained += found
            found = [torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=device) for device in self.devices]
            self._windows[place] = found
            self._synchronize()
        return found[0].numel()

    def _synchronize(self) -> None:
        for device in set(self.devices):
            _synchronize(device)


class VirtualRank:
    """One rank's view of :class:`VirtualPeers`: a ``PeerMemory``."""

    def __init__(self, peers: VirtualPeers, rank: int) -> None:
        self._peers, self._rank, self.multicasts = peers, rank, False
        self._backed: dict[Place, int] = {}

    @property
    def retain(self) -> bool:
        """Whether windows that are replaced stay, for captured graphs."""
        return self._peers.retain

    @retain.setter
    def retain(self, value: bool) -> None:
        self._peers.retain = value

    def words(self, rank: int) -> int:
        return self._peers.own_words(rank).data_ptr()

    def own_words(self) -> Tensor:
        return self._peers.own_words(self._rank)

    def window(self, rank: int, place: Place) -> int:
        return self._peers.memory(rank, place).data_ptr()

    def own_window(self, place: Place) -> Tensor:
        return self._peers.memory(self._rank, place)

    def multicast(self, place: Place) -> int:
        return 0  # ranks of one process share a device, or have no switch between them

    def backed(self, place: Place) -> int:
        return self._backed.get(place, 0)

    def grow(self, sizes: dict[Place, int]) -> None:
        for place, nbytes in sizes.items():
            self._backed[place] = self._peers.reserve(place, nbytes)

    def hold(self) -> object:
        return None

    def restore(self, held: object) -> set[Place]:
        return set()  # ranks of one process share their windows, and others may be using them

    def close(self) -> None:
        self._backed.clear()


def virtual_transports(devices: Sequence[torch.device], reserve: int = 0) -> list[SymmetricDeviceTransport]:
    """Transports of as many ranks as ``devices`` has entries, all in this process.

    Args:
        devices: GPU of each rank, with an index; at most 16 ranks share one.
        reserve: bytes that every window has from the start, so that no call has to make it larger.

    Raises:
        ValueError: more ranks share a GPU than it has queues for.
    """
    peers, world = VirtualPeers(devices), len(devices)
    transports = []
    for rank, (device, streams) in enumerate(zip(devices, _streams(devices), strict=True)):
        memory = peers.of(rank)
        if reserve:
            memory.grow({(kind, window): reserve for kind in (SHARD, RECEIVE) for window in range(WINDOWS)})
        cuda = CudaDevice(device, rank, world, memory)
        cuda._streams = streams
        transports.append(SymmetricDeviceTransport(cuda, rank, world))
    return transports


def _streams(devices: Sequence[torch.device]) -> list[list[torch.cuda.Stream]]:
    """Streams of high priority for each rank, which no two ranks share.

    Torch hands out 32 different ones, and a GPU has as many queues.  Where ranks would need more, several streams of
    a schedule become one: that adds order in which steps are enqueued anyway, which no schedule minds.
    """
    needed = len(STREAMS) - 1  # besides the rank's own, for products
    found: dict[int, list[torch.cuda.Stream]] = {}
    for device in set(devices):
        ranks = [rank for rank, other in enumerate(devices) if other == device]
        each = min(needed, _QUEUES // len(ranks) - 1)
        if each < 1:
            raise ValueError(f"devices: expected at most {_QUEUES // 2} ranks on {device}, got {len(ranks)}")
        for rank in ranks:
            own = [torch.cuda.Stream(device, -1) for _ in range(each)]
            found[rank] = [own[index * each // needed] for index in range(needed)]
    return [found[rank] for rank in range(len(devices))]
