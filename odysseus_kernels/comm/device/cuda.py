"""GPUs whose memory ranks map into one another: the device behind the symmetric transport.

Concurrency and memory: ``comm/device/transport.py``; where the memory comes from: ``comm/device/peer_memory.py``.

A rank has one stream of high priority for each stream of a schedule, besides the caller's.  Words lie in symmetric
memory of their own; what ranks call, and whether they are alive, is exchanged between hosts' processes in shared memory
(``comm/device/ledger.py``), never through the GPU.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from odysseus_kernels import _ext
from odysseus_kernels.comm.device.call import WarmUpNeededError
from odysseus_kernels.comm.device.ledger import Ledger
from odysseus_kernels.comm.device.lowering import KINDS, WINDOWS, Operations, word_index
from odysseus_kernels.comm.device.peer_memory import Exchange, PeerMemory, TorchSymmetricMemory, Window
from odysseus_kernels.comm.device.supervisor import Supervisor
from odysseus_kernels.comm.device.transport import SymmetricDeviceTransport
from odysseus_kernels.comm.mismatch import short_text
from odysseus_kernels.comm.schedules.streams import COMPUTE, STREAMS, check_queues
from odysseus_kernels.comm.transport import Call
from odysseus_kernels.config import shared_memory_directory
from odysseus_kernels.errors import CommunicationError, FallbackWarning
from odysseus_kernels.planner.hardware import hardware_for

__all__ = ["CudaDevice", "connect", "device_identity"]

_HIGH_PRIORITY = -1
_CLOSED = 4  # a code of ``Control.abort``; the others are the supervisor's
_MOST_RANKS = 16  # sources that one sum adds
# Buffers take turns, so that the first run alone does not make all of them.
_WARM_UP = (
    "{}: expected its buffers to exist before a CUDA graph is captured; run it at least three times with these shapes "
    "on all ranks before the capture"
)
_CLOSE_S = 10.0


class CudaDevice:
    """One rank's GPU.

    Args:
        device: the GPU.
        rank, world: the ranks, and which one this is.
        memory: of all ranks.
        ledger: what ranks call; None where they are in one process and call alike.
        link: bytes/s to which copies between ranks are paced (an emulated link), or 0.
        multiprocessors: the fewest of any rank's GPU, or 0 for this one's.
        no_switch: why no switch adds for these ranks; the same on all of them.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int,
        world: int,
        memory: PeerMemory,
        ledger: Ledger | None = None,
        link: float = 0.0,
        multiprocessors: int = 0,
        no_switch: str = "these ranks' memory has no multicast addresses",
    ) -> None:
        self.no_switch = no_switch
        self.device, self._rank, self._world = device, rank, world
        self._memory, self._ledger, self._link = memory, ledger, link
        self._native = _ext.load().cuda
        # The epochs of all windows, counters of kernels, and last whether a wait gave up.
        self._state = torch.zeros(len(KINDS) * WINDOWS + world + 1, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        self._control = self._native.Control(device.index, self._state[-1:].data_ptr())
        self._control_address = torch.tensor([self._control.block], dtype=torch.int64).to(device)
        self.waits: list[str] = []
        # By name: the driver tells no rate.  For an unknown one it is modest, and sums hold the fewest multiprocessors.
        self.link_bytes_per_s = link or hardware_for(torch.cuda.get_device_name(device)).link_bytes_per_s
        self.multiprocessors = multiprocessors or torch.cuda.get_device_properties(device).multi_processor_count
        self._supervisor = Supervisor(self._control, ledger, self.waits)
        self._streams = [torch.cuda.Stream(device, _HIGH_PRIORITY) for name in STREAMS if name != COMPUTE]
        self._caller: torch.cuda.Stream | None = None
        self._warned = False
        self._tables: dict[tuple[int, ...], Tensor] = {}

    # ---- memory ------------------------------------------------------------------------------------------------------

    def window(self, rank: int, kind: str, window: int) -> int:
        return self._memory.window(rank, (kind, window))

    def own_window(self, kind: str, window: int) -> Tensor:
        return self._memory.own_window((kind, window))

    def multicast(self, kind: str, window: int) -> int:
        return self._memory.multicast((kind, window))

    def words(self, rank: int) -> int:
        return self._memory.words(rank)

    def epoch(self, kind: str, window: int) -> int:
        return self.epoch_tensor(kind, window).data_ptr()

    def epoch_tensor(self, kind: str, window: int) -> Tensor:
        place = KINDS.index(kind) * WINDOWS + window
        return self._state[place : place + 1]

    def counter_tensor(self) -> Tensor:
        return self._state[-1 - self._world : -1]

    def aborted_tensor(self) -> Tensor:
        return self._state[-1:]

    def control_tensor(self) -> Tensor:
        return self._control_address

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

    def grow(self, call: Call, sizes: dict[Window, int]) -> None:
        if self.capturing():
            raise WarmUpNeededError(_WARM_UP.format(call.name))
        if self._ledger is not None:
            self._ledger.settle(call)
        self._memory.grow(sizes)

    def hold(self) -> object:
        return self._memory.hold()

    def restore(self, held: object) -> set[Window]:
        if self.capturing():  # in which nothing grows
            return set()
        torch.cuda.synchronize(self.device)
        moved = self._memory.restore(held)
        if moved:
            # Scratch memory of runs that were timed: other groups' windows do not come from where torch keeps it.
            torch.cuda.empty_cache()
        return moved

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
    """GPUs of ``peers`` that ``device`` cannot map; those that this process does not see are left to the driver.

    That they can be mapped suffices.  Links that carry no atomics between GPUs (PCIe) serve as well: what a rank writes
    into a peer's memory it stores, words too, and what it changes atomically lies in its own.
    """
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
    answer: dict[str, Any]
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
        answer = {"path": host.path, "sms": torch.cuda.get_device_properties(device).multi_processor_count}
        answer["multicast"] = _multicasts(device)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        answer = {"error": short_text(error)}
    answers = [json.loads(text) for text in exchange(json.dumps(answer))]
    failure, memory = answers[rank].get("error", ""), None
    if not any("error" in other for other in answers):
        try:
            host.attach([other["path"] for other in answers])
            memory = TorchSymmetricMemory(group, device, exchange, nonce)
        except (OSError, ValueError, RuntimeError) as error:
            failure = short_text(error)
    # The second exchange is also what makes it safe to signal: all ranks' words are zero.
    mapped = memory is not None and memory.multicasts
    met = [json.loads(text) for text in exchange(json.dumps({"error": failure, "multicast": mapped}))]
    for other, one in enumerate(met):
        if one["error"]:
            if host is not None:
                host.close()
            raise OSError(f"rank {other}: {one['error']}")
    assert memory is not None
    check_queues()
    sms = min(int(other["sms"]) for other in answers)
    reason = why_no_switch([bool(one["multicast"]) for one in answers], [bool(one["multicast"]) for one in met])
    cuda = CudaDevice(device, rank, world, memory, Ledger(host, rank, world), multiprocessors=sms, no_switch=reason)
    return SymmetricDeviceTransport(cuda, rank, world)


def _multicasts(device: torch.device) -> bool:
    """Whether this GPU and its driver know multicast addresses."""
    return torch.cuda.get_device_capability(device) >= (9, 0) and _ext.load().cuda.multimem_supported(device.index)


def why_no_switch(devices: Sequence[bool], mapped: Sequence[bool]) -> str:
    """Why no switch can add for the ranks; empty if one can.

    Args:
        devices: for each rank, whether its GPU and driver know multicast addresses.
        mapped: for each rank, whether the memory that ranks have mapped got one.
    """
    if not all(devices):
        return f"the GPU or driver of rank {list(devices).index(False)} knows no multicast addresses"
    if not all(mapped):
        return f"the memory that ranks share got no multicast address on rank {list(mapped).index(False)}"
    return ""
