"""How a collective travels beside products: on threads (CPU), or on a stream of its own (GPU).

CPU tensors travel by the ranks' own connections (``comm/collective/links.py``) where these could be made, else by the
process group's backend, as everything small does.

A lane issues a collective and later finishes it.  On a GPU neither blocks the host: the lane's stream waits for the
caller's at the issue, the caller's stream for the lane's at the finish, and between the two the buffers belong to the
collective.  Whoever issues keeps them until it has finished; after that everything is in the order of the caller's
stream, so the allocator needs to know nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from odysseus_kernels.comm.collective.links import Links, LostConnectionError, Transfer
from odysseus_kernels.comm.meeting.backend import WaitTimeoutError, all_gather_single, nccl_of, wait
from odysseus_kernels.comm.meeting.lingering import keep_for_ever
from odysseus_kernels.errors import SignalTimeoutError

__all__ = ["HostLane", "Lane", "StreamLane", "make_lane"]

_HIGH_PRIORITY = -1
# Thread blocks that NCCL may take from the products: enough for the rate of NVLink 4, an eighth of an H200.
_MOST_BLOCKS = 16
_LONGEST_S = 1e6
# Peers are looked for as often while a transfer is waited for.
_SLICE_S = 0.2
# A peer that gives up says why and ends its connections, or dies: which of both is known a little later.
_REASON_S = 1.0
Look = Callable[[], None]


class Lane(Protocol):
    """Issues collectives of one group.

    Attributes:
        between_hosts: whether what travels is known to leave the host, on CPU ranks.
    """

    between_hosts: bool

    @property
    def group(self) -> dist.ProcessGroup:
        """The group to pass to collectives."""

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """For collectives that are started within: nothing computes beside them."""

    def issue(self, start: Callable[[], dist.Work]) -> Any:
        """Starts an asynchronous collective; what it returns is for :meth:`finish`."""

    def all_gather(self, out: Tensor, own: Tensor) -> Any:
        """Starts to gather the flat ``own`` of all ranks into the flat ``out``, world times as long; as ``issue``."""

    def all_to_all(
        self, out: Tensor, sent: Tensor, out_splits: Sequence[int] | None = None, splits: Sequence[int] | None = None
    ) -> Any:
        """Starts to send a part of the flat ``sent`` to each rank, and to receive a part of ``out``; as ``issue``.

        ``splits`` are the elements for each rank, ``out_splits`` those from each; equal parts without them.
        """

    def finish(self, handle: Any, name: str, timeout_s: float, look: Look) -> None:
        """What the caller does next happens after the collective; ``look`` may raise while the host waits."""

    def check(self) -> None:
        """SignalTimeoutError for a collective that should have ended long ago."""

    def abandon(self) -> None:
        """Nobody will finish what is under way."""

    def close(self) -> None:
        """Gives back what is held."""


class HostLane:
    """Collectives that the host waits for."""

    def __init__(
        self, group: Callable[[], dist.ProcessGroup], links: Links | None, *, between_hosts: bool = False
    ) -> None:
        self.between_hosts = between_hosts
        self._group = group
        self._links = links
        # With what starts them, which refers to their tensors.
        self._under_way: dict[int, tuple[dist.Work, Callable[[], dist.Work]]] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        return self._group()

    def alone(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def issue(self, start: Callable[[], dist.Work]) -> dist.Work:
        work = start()
        self._under_way[id(work)] = (work, start)
        return work

    def all_gather(self, out: Tensor, own: Tensor) -> dist.Work | Transfer:
        if self._links is None:
            return self.issue(lambda: all_gather_single(out, own, self.group, async_op=True))
        rank, blocks = self.group.rank(), out.detach().view(self.group.size(), own.numel())
        others = [peer for peer in range(len(blocks)) if peer != rank]
        transfer = self._links.exchange(dict.fromkeys(others, own), {peer: blocks[peer] for peer in others})
        blocks[rank].copy_(own.detach())
        return transfer

    def all_to_all(
        self, out: Tensor, sent: Tensor, out_splits: Sequence[int] | None = None, splits: Sequence[int] | None = None
    ) -> dist.Work | Transfer:
        if self._links is None:
            return self.issue(
                lambda: dist.all_to_all_single(out, sent, _listed(out_splits), _listed(splits), self.group, True)
            )
        rank, world = self.group.rank(), self.group.size()
        leaving, arriving = _parts(sent, splits, world), _parts(out, out_splits, world)
        own, kept = leaving.pop(rank), arriving.pop(rank)
        transfer = self._links.exchange(leaving, arriving)
        kept.copy_(own)
        return transfer

    def finish(self, handle: dist.Work | Transfer, name: str, timeout_s: float, look: Look) -> None:
        if isinstance(handle, Transfer):
            _wait_for(handle, timeout_s, look)
            return
        wait(handle, timeout_s, look)
        self._under_way.pop(id(handle), None)

    def check(self) -> None:
        """A call leaves nothing under way."""

    def abandon(self) -> None:
        if self._links is not None:
            self._links.close()
        unfinished = [(work, start) for work, start in self._under_way.values() if not work.is_completed()]
        if unfinished:
            keep_for_ever(*unfinished, self._group())
        self._under_way.clear()

    def close(self) -> None:
        """Its links are closed by whoever made them."""


def _wait_for(transfer: Transfer, timeout_s: float, look: Look) -> None:
    """As ``wait`` of ``comm/meeting/backend.py`` for what the links move."""
    deadline = time.monotonic() + min(timeout_s, _LONGEST_S)
    while not transfer.wait(min(_SLICE_S, max(deadline - time.monotonic(), 0.0))):
        look()
        if time.monotonic() >= deadline:
            raise WaitTimeoutError(f"not complete within {timeout_s:g} s")
    if isinstance(transfer.error, LostConnectionError):
        until = time.monotonic() + _REASON_S
        while time.monotonic() < until:
            look()
            time.sleep(_SLICE_S / 10)
    if transfer.error is not None:
        raise transfer.error


def _parts(tensor: Tensor, splits: Sequence[int] | None, world: int) -> dict[int, Tensor]:
    parts, begin = {}, 0
    for peer, count in enumerate(splits or [tensor.numel() // world] * world):
        parts[peer] = tensor.detach()[begin : begin + count]
        begin += count
    return parts


def _listed(splits: Sequence[int] | None) -> list[int] | None:
    return None if splits is None else list(splits)


@dataclasses.dataclass(frozen=True)
class _Flight:
    event: torch.cuda.Event
    name: str
    deadline: float
    timeout_s: float


class StreamLane:
    """Collectives of NCCL, on a stream and a communicator of their own.

    The communicator has a stream of high priority and may take few thread blocks, so that a collective starts at once
    beside a product and leaves it most of the GPU.  Where none can be made, the caller's is used; so it is for a
    collective that is alone, with as many blocks as NCCL takes by default: there is no product to leave the GPU to.
    """

    between_hosts = False

    def __init__(self, group: Callable[[], dist.ProcessGroup], device: torch.device, timeout_s: float) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, _HIGH_PRIORITY)
        self._flights: deque[_Flight] = deque()
        self._given = group
        self._own = _communicator(group(), timeout_s)
        self._alone = False

    @property
    def group(self) -> dist.ProcessGroup:
        return self._own if self._own is not None and not self._alone else self._given()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        # Both communicators are used on the lane's one stream, so that their kernels never wait for one another.
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def issue(self, start: Callable[[], dist.Work]) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            start().wait()  # the stream waits, not the host
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def all_gather(self, out: Tensor, own: Tensor) -> torch.cuda.Event:
        return self.issue(lambda: all_gather_single(out, own, self.group, async_op=True))

    def all_to_all(
        self, out: Tensor, sent: Tensor, out_splits: Sequence[int] | None = None, splits: Sequence[int] | None = None
    ) -> torch.cuda.Event:
        return self.issue(
            lambda: dist.all_to_all_single(out, sent, _listed(out_splits), _listed(splits), self.group, True)
        )

    def finish(self, handle: torch.cuda.Event, name: str, timeout_s: float, look: Look) -> None:
        look()
        torch.cuda.current_stream(self._device).wait_event(handle)
        if not torch.cuda.is_current_stream_capturing():
            deadline = time.monotonic() + min(timeout_s, _LONGEST_S)
            self._flights.append(_Flight(handle, name, deadline, timeout_s))
            self.check()

    def check(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            return  # asking for an event would end the capture
        while self._flights and self._flights[0].event.query():
            self._flights.popleft()
        if self._flights and time.monotonic() > self._flights[0].deadline:
            late = self._flights[0]
            raise SignalTimeoutError(
                f"{late.name}: not complete {late.timeout_s:g} s after it was issued: a peer is stuck, gone, has not "
                f"come, or makes other calls"
            )

    def abandon(self) -> None:
        """NCCL's own watchdog ends what is left."""

    def close(self) -> None:
        self._flights.clear()
        if self._own is not None and dist.is_initialized():
            with contextlib.suppress(ValueError, RuntimeError):  # destroyed with everything else
                dist.destroy_process_group(self._own)
        self._own = None


def _communicator(group: dist.ProcessGroup, timeout_s: float) -> dist.ProcessGroup | None:
    """A communicator of the same ranks, made by all of them together; None if they are not NCCL's."""
    nccl = nccl_of(group)
    if nccl is None:
        return None
    options = nccl.Options(is_high_priority_stream=True)
    options.config.max_ctas = _MOST_BLOCKS
    options._timeout = timeout = datetime.timedelta(seconds=min(timeout_s, _LONGEST_S))
    return dist.new_group(
        dist.get_process_group_ranks(group),
        backend="nccl",
        timeout=timeout,
        pg_options=options,
        use_local_synchronization=True,
    )


def make_lane(
    group: Callable[[], dist.ProcessGroup],
    device: torch.device,
    timeout_s: float,
    links: Links | None,
    *,
    between_hosts: bool,
) -> Lane:
    """The lane for tensors of ``device``; all ranks of the group make theirs together."""
    if device.type == "cpu":
        return HostLane(group, links, between_hosts=between_hosts)
    return StreamLane(group, device, timeout_s)
