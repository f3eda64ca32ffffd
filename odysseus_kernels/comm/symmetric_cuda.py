"""GPUs whose memory ranks map into one another, by torch's symmetric memory: the device behind the symmetric transport.

Everything that differs between versions of torch's symmetric memory is here: allocation, rendezvous, peers' addresses.
Supported are torch 2.10 and later.  Concurrency and memory: ``comm/symmetric_device.py``.

A rank has one stream of high priority for each stream of a schedule, besides the caller's.  Words lie in symmetric
memory of their own; what ranks call, and whether they are alive, is exchanged between hosts' processes in shared memory
(``comm/ledger.py``), never through the GPU.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _ext
from ..config import shared_memory_directory
from ..errors import CapacityWarning, CommunicationError, FallbackWarning
from .device_call import WarmUpNeededError
from .device_schedule import COMPUTE, RECEIVE, STREAMS
from .device_streams import check_queues
from .ledger import Ledger
from .lowering import WINDOWS, WORDS, Operations, word_index
from .mismatch import short_text
from .schedule import SHARD
from .supervisor import Supervisor
from .symmetric_device import SymmetricDeviceTransport
from .transport import Call, CapacityExceededError

__all__ = ["CudaDevice", "PeerMemory", "TorchSymmetricMemory", "connect", "device_identity"]

_KINDS = (SHARD, RECEIVE)
_HIGH_PRIORITY = -1
_CLOSED = 4  # a code of ``Control.abort``; the others are the supervisor's
_MOST_RANKS = 16  # sources that one sum adds
# Buffers take turns, so that the first run alone does not make all of them.
_WARM_UP = (
    "{}: expected its buffers to exist before a CUDA graph is captured; run it at least three times with these shapes "
    "on all ranks before the capture"
)
_CLOSE_S = 10.0
_GRANULARITY = 2 << 20  # what a driver allocates at once
_Window = tuple[str, int]
Exchange = Callable[[str], list[str]]


class PeerMemory(Protocol):
    """Memory of all ranks at addresses of this rank's device.

    Attributes:
        retain: windows that are replaced by larger ones stay: a captured graph goes on using them.
    """

    retain: bool

    def words(self, rank: int) -> int:
        """Address of a rank's words."""

    def own_words(self) -> Tensor:
        """This rank's words: int32 [2 * WINDOWS * WORDS * world]."""

    def window(self, rank: int, place: _Window) -> int:
        """Address of a rank's window."""

    def backed(self, place: _Window) -> int:
        """Bytes of a window that every rank has."""

    def grow(self, sizes: dict[_Window, int]) -> None:
        """Makes windows larger, together with all ranks.  CapacityExceededError on all ranks if one cannot."""

    def close(self) -> None:
        """Gives the memory back."""


class TorchSymmetricMemory:
    """Windows and words in torch's symmetric memory; every rank makes the same calls in the same order."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, exchange: Exchange) -> None:
        self._group_name, self._device, self._world = group.group_name, device, group.size()
        self._exchange = exchange
        self.retain = False
        self._refused: int | None = None  # bytes that some rank did not have
        # A handle owns the mappings of peers' memory.
        self._windows: dict[_Window, tuple[Tensor, list[int], Any]] = {}
        self._retained: list[Any] = []
        failure, words = "", None
        try:
            words = self._empty(4 * len(_KINDS) * WINDOWS * WORDS * self._world).zero_()
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            failure = short_text(error, 200)
        # Before the rendezvous, in which a rank that comes alone would wait long.
        for rank, text in enumerate(exchange(failure)):
            if text:
                raise OSError(f"rank {rank}: {text}")
        assert words is not None
        self._words: Tensor | None = words.view(torch.int32)
        self._word_addresses, self._word_handle = self._meet(words)

    def _empty(self, nbytes: int) -> Tensor:
        from torch._C._distributed_c10d import _SymmetricMemory

        # Not symm_mem.empty: newer versions take that from a pool, and a window is to be an allocation of its own.
        return _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, self._device)

    def _meet(self, memory: Tensor) -> tuple[list[int], Any]:
        """Addresses of all ranks' ``memory`` on this device, and what keeps them valid."""
        import torch.distributed._symmetric_memory as symmetric_memory

        handle = symmetric_memory.rendezvous(memory, self._group_name)
        ranks = range(self._world)
        return [handle.get_buffer(rank, (memory.numel(),), torch.uint8).data_ptr() for rank in ranks], handle

    def words(self, rank: int) -> int:
        return self._word_addresses[rank]

    def own_words(self) -> Tensor:
        assert self._words is not None
        return self._words

    def window(self, rank: int, place: _Window) -> int:
        return self._windows[place][1][rank]

    def backed(self, place: _Window) -> int:
        return self._windows[place][0].numel() if place in self._windows else 0

    def grow(self, sizes: dict[_Window, int]) -> None:
        needed = sum(sizes.values())
        if self._refused is not None and needed >= self._refused:  # known to all ranks alike
            raise CapacityExceededError(f"{needed:,} bytes of symmetric memory were refused before")
        # Our own use of what is replaced is over after this, and everybody's after the exchange.
        torch.cuda.synchronize(self._device)
        made: dict[_Window, Tensor] = {}
        failure = ""
        try:
            for place, nbytes in sizes.items():
                made[place] = self._empty(-(-nbytes // _GRANULARITY) * _GRANULARITY)
            # An allocator may clear new memory in its own time: before a peer writes there.
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, a driver's refusal another
            failure = short_text(error, 200)
        failures = {rank: text for rank, text in enumerate(self._exchange(failure)) if text}
        if failures:
            made.clear()
            self._refused = needed
            told = "; ".join(f"rank {rank}: {text}" for rank, text in failures.items())
            message = f"{needed:,} bytes of symmetric memory cannot be had: {told}"
            warnings.warn(f"{message}; calls of that size use collectives instead", CapacityWarning, stacklevel=2)
            raise CapacityExceededError(message)
        for place, memory in made.items():
            if self.retain and place in self._windows:
                self._retained.append(self._windows[place])
            try:
                self._windows[place] = (memory, *self._meet(memory))
            except RuntimeError as error:
                raise CommunicationError(f"ranks could not map one another's memory: {short_text(error)}") from error

    def close(self) -> None:
        self._windows.clear()
        self._retained.clear()
        self._words = self._word_handle = None


class CudaDevice:
    """One rank's GPU.

    Args:
        device: the GPU.
        rank, world: the ranks, and which one this is.
        memory: of all ranks.
        ledger: what ranks call; None where they are in one process and call alike.
        link: bytes/s to which copies between ranks are paced (an emulated link), or 0.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int,
        world: int,
        memory: PeerMemory,
        ledger: Ledger | None = None,
        link: float = 0.0,
    ) -> None:
        self.device, self._rank, self._world = device, rank, world
        self._memory, self._ledger, self._link = memory, ledger, link
        self._native = _ext.load().cuda
        # The epochs of all windows, counters of kernels, and last whether a wait gave up.
        self._state = torch.zeros(len(_KINDS) * WINDOWS + world + 1, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        self._control = self._native.Control(device.index, self._state[-1:].data_ptr())
        self.waits: list[str] = []
        self._supervisor = Supervisor(self._control, ledger, self.waits)
        self._streams = [torch.cuda.Stream(device, _HIGH_PRIORITY) for name in STREAMS if name != COMPUTE]
        self._caller: torch.cuda.Stream | None = None
        self._warned = False
        self._tables: dict[tuple[int, ...], Tensor] = {}

    # ---- memory ------------------------------------------------------------------------------------------------------

    def window(self, rank: int, kind: str, window: int) -> int:
        return self._memory.window(rank, (kind, window))

    def words(self, rank: int) -> int:
        return self._memory.words(rank)

    def epoch(self, kind: str, window: int) -> int:
        return self.epoch_tensor(kind, window).data_ptr()

    def epoch_tensor(self, kind: str, window: int) -> Tensor:
        place = _KINDS.index(kind) * WINDOWS + window
        return self._state[place : place + 1]

    def counter_tensor(self) -> Tensor:
        return self._state[-1 - self._world : -1]

    def aborted_tensor(self) -> Tensor:
        return self._state[-1:]

    def word_tensor(self, kind: str, window: int) -> Tensor:
        start = word_index(self._world, kind, window, 2, 0)
        return self._memory.own_words()[start : start + self._world]

    def word_addresses(self, kind: str, window: int, which: Literal["waited", "set"]) -> Tensor:
        world, rank = self._world, self._rank
        if which == "waited":  # the owner's word, with us
            return self.addresses([self.words(rank) + 4 * word_index(world, kind, window, 0, p) for p in range(world)])
        return self.addresses([self.words(p) + 4 * word_index(world, kind, window, 1, rank) for p in range(world)])

    def addresses(self, values: Sequence[int]) -> Tensor:
        key = tuple(values)
        if key not in self._tables:
            if self.capturing():
                raise WarmUpNeededError(_WARM_UP.format("an operator"))
            self._tables[key] = torch.tensor(key, dtype=torch.int64).to(self.device)
        return self._tables[key]

    def scratch(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def backed(self, kind: str, window: int) -> int:
        return self._memory.backed((kind, window))

    def grow(self, call: Call, sizes: dict[_Window, int]) -> None:
        if self.capturing():
            raise WarmUpNeededError(_WARM_UP.format(call.name))
        if self._ledger is not None:
            self._ledger.settle(call)
        self._memory.grow(sizes)

    # ---- execution ---------------------------------------------------------------------------------------------------

    def operations(self) -> Operations:
        return self._native.Program(self._control, self.device.index, self._link)

    def streams(self) -> list[int]:
        current = torch.cuda.current_stream(self.device)
        # Calls happen in the order in which they are made, also where the caller changes streams between them.  A
        # capture may not wait for what lies outside of it; whoever replays it orders that.
        if self._caller is not None and self._caller != current and not self.capturing():
            current.wait_stream(self._caller)
        self._caller = current
        return [current.cuda_stream, *(stream.cuda_stream for stream in self._streams)]

    def call(self, callback: Callable[[], None]) -> None:
        callback()

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    # ---- errors ------------------------------------------------------------------------------------------------------

    def begin(self, call: Call, extra: str) -> None:
        self._memory.retain = self._memory.retain or self.capturing()
        self._supervisor.timeout_s = call.config.timeout_s
        self._supervisor.check()
        if not self._warned and (reason := self._native.why_no_batch_copies()):
            self._warned = True
            warnings.warn(f"copies within a GPU take multiprocessors from products: {reason}", FallbackWarning, 2)
        if self._ledger is not None:
            self._ledger.post(call, extra)

    def give_up(self, error: BaseException) -> None:
        reason = error if isinstance(error, CommunicationError) else CommunicationError(short_text(error))
        self._supervisor.end(reason)

    def failure(self) -> CommunicationError | None:
        return self._supervisor.failure()

    def drain(self) -> None:
        # What was enqueued ends first, since peers may still be waiting for our signals; but not for long.
        with contextlib.suppress(RuntimeError):
            deadline = time.monotonic() + _CLOSE_S
            while not all(stream.query() for stream in self._streams) and time.monotonic() < deadline:
                time.sleep(0.001)
            self._control.abort(_CLOSED)
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        self._supervisor.close()
        self._control.close()
        self._memory.close()
        if self._ledger is not None:
            self._ledger.close()


# ---- meeting ---------------------------------------------------------------------------------------------------------


DeviceIdentity = tuple[str, str]  # name and UUID of a GPU, as other processes know it


def device_identity(device: torch.device) -> DeviceIdentity:
    """Name and UUID of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return properties.name, str(getattr(properties, "uuid", ""))


def unreachable(device: torch.device, peers: Sequence[DeviceIdentity]) -> list[str]:
    """GPUs of ``peers`` that ``device`` cannot map; those that this process does not see are left to the driver."""
    visible = {device_identity(torch.device("cuda", i))[1]: i for i in range(torch.cuda.device_count())}
    found = []
    for rank, (name, uuid) in enumerate(peers):
        index = visible.get(uuid)
        if index is not None and index != device.index and not torch.cuda.can_device_access_peer(device.index, index):
            found.append(f"rank {rank} ({name})")
    return found


def connect(
    group: dist.ProcessGroup, device: torch.device, peers: Sequence[DeviceIdentity], nonce: int, exchange: Exchange
) -> SymmetricDeviceTransport:
    """The transport of ``group`` on ``device``.  Every rank calls it; it fails on all or on none.

    Args:
        group: ranks of one host.
        device: this rank's GPU, with an index.
        peers: all ranks' GPUs.
        nonce: equal on all ranks, different for each group.
        exchange: a collective that hands every rank's text to all.

    Raises:
        OSError: some rank cannot; the message names it and says why.
    """
    rank, world = group.rank(), group.size()
    host: Any = None
    answer: dict[str, str]
    try:
        reason = _ext.load().cuda.why_unavailable()
        if world > _MOST_RANKS:
            raise OSError(f"it serves at most {_MOST_RANKS} ranks, got {world}")
        missing = unreachable(device, peers)
        if missing:
            reason = reason or f"no peer-to-peer access from {device} to {', '.join(missing)}"
        if reason:
            raise OSError(reason)
        host = _ext.load().SymmetricHost(rank, world, shared_memory_directory(), 4096, nonce)
        answer = {"path": host.path}
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        answer = {"error": short_text(error)}
    answers = [json.loads(text) for text in exchange(json.dumps(answer))]
    failure, memory = answers[rank].get("error", ""), None
    if not any("error" in other for other in answers):
        try:
            host.attach([other["path"] for other in answers])
            memory = TorchSymmetricMemory(group, device, exchange)
        except (OSError, ValueError, RuntimeError) as error:
            failure = short_text(error)
    # The second exchange is also what makes it safe to signal: all ranks' words are zero.
    for other, text in enumerate(exchange(failure)):
        if text:
            if host is not None:
                host.close()
            raise OSError(f"rank {other}: {text}")
    assert memory is not None
    check_queues()
    cuda = CudaDevice(device, rank, world, memory, Ledger(host, rank, world))
    return SymmetricDeviceTransport(cuda, rank, world)
