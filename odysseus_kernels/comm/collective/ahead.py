"""What is sent ahead over a process group: the first transfers of the call that comes next.

Their buffers belong to them until they have finished; the call that they were sent for takes them over with their
buffers, and any other waits for them and lets them go (``comm/collective/transport.py``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from odysseus_kernels.comm.bundles import Bundle, as_bytes
from odysseus_kernels.comm.collective.agreement import Agreement
from odysseus_kernels.comm.collective.lanes import Lane
from odysseus_kernels.comm.collective.spans import Spans, cut_into_spans, most_rows
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.schedules.collective import IN_FLIGHT, sends_ahead_after
from odysseus_kernels.comm.schedules.steps import Schedule
from odysseus_kernels.comm.sent_ahead import SentAhead, in_backward_pass
from odysseus_kernels.comm.transport import Call

__all__ = ["Ahead", "Sender", "Sending"]


@dataclasses.dataclass(frozen=True)
class Sending:
    """A transfer that is under way or has arrived.

    Attributes:
        work: its handle.
        own: what the backend reads.
        arrived: what it writes; raw bytes of an exchange.
    """

    work: Any
    own: Tensor
    arrived: Tensor


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A gather's first one or two pieces, or an exchange's first hop.

    Attributes:
        sent: what they were sent for.
        transfers: in the order of the pieces.
    """

    sent: SentAhead
    transfers: tuple[Sending, ...]


class Sender:
    """Sends ahead of the next call while another one's ``schedule`` is carried out.

    The first transfer follows all that the call itself gathers.  In a forward pass a second one follows all that it
    sends: the link then has something to carry while the call ends and ranks meet in the next one.  In a backward pass
    the next call scatters beside its gather, and needs the second piece to fill the gaps between what it scatters.

    Attributes:
        ahead: what has been sent so far.
    """

    def __init__(
        self,
        call: Call,
        prefetch: Prefetch | None,
        schedule: Schedule,
        lane: Lane,
        rank: int,
        world: int,
        agreement: Agreement,
    ) -> None:
        self.ahead: Ahead | None = None
        self._call, self._prefetch, self._lane = call, prefetch, lane
        self._rank, self._world = rank, world
        self._agreement = agreement
        self._after = () if prefetch is None else sends_ahead_after(schedule)

    def after(self, index: int) -> None:
        """To be told after each step of the schedule."""
        if index not in self._after or self._prefetch is None:
            return
        self._agreement.wait()
        if self._prefetch.kind == "shared":
            if self.ahead is None:
                first = self._first_hop(self._prefetch)
                self.ahead = Ahead(SentAhead.of(self._call, self._prefetch), (first,))
            return
        spans = cut_into_spans(self._call, self._lane, self._prefetch.shard)
        ahead = self.ahead or Ahead(SentAhead.of(self._call, self._prefetch, len(spans)), ())
        most = IN_FLIGHT if self._call.phase == "forward" and not in_backward_pass() else 1
        if len(ahead.transfers) < min(most, len(spans)):
            sending = self._piece(self._prefetch.shard, spans, len(ahead.transfers))
            ahead = dataclasses.replace(ahead, transfers=(*ahead.transfers, sending))
        self.ahead = ahead

    def _piece(self, shard: Tensor, spans: Spans, piece: int) -> Sending:
        start, stop = spans[piece]
        own = shard[:, start:stop].contiguous()
        arrived = shard.new_empty(self._world * shard.shape[0] * most_rows(spans) * shard.shape[2])
        work = self._lane.all_gather(arrived[: self._world * own.numel()], own.view(-1))
        return Sending(work, own, arrived)

    def _first_hop(self, prefetch: Prefetch) -> Sending:
        own = _packed(prefetch.tensors)
        arrived = torch.empty_like(own)
        leaving, arriving = [0] * self._world, [0] * self._world
        leaving[(self._rank - 1) % self._world] = arriving[(self._rank + 1) % self._world] = own.numel()
        return Sending(self._lane.all_to_all(arrived, own, arriving, leaving), own, arrived)


def _packed(tensors: tuple[Tensor, ...]) -> Tensor:
    """What an exchange shares, as bytes: a single tensor where it is, several one after another."""
    if len(tensors) == 1:
        return as_bytes(tensors[0])
    bundle = Bundle.of(tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors))
    raw = torch.empty(bundle.nbytes, dtype=torch.uint8, device=tensors[0].device)
    for place, tensor in zip(bundle.tensors(raw), tensors, strict=True):
        place.copy_(tensor.detach())
    return raw
