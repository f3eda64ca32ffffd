"""What is sent ahead over a process group: the first transfer of the call that comes next.

Its buffers belong to the transfer until it has finished; the call that it was sent for takes them over with it, and
any other waits for it and lets them go (``comm/collective/transport.py``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from odysseus_kernels.comm.bundles import Bundle, as_bytes
from odysseus_kernels.comm.collective.lanes import Lane
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.sent_ahead import SentAhead
from odysseus_kernels.comm.transport import Call

__all__ = ["Ahead", "Spans", "most_rows", "send_ahead"]

Spans = tuple[tuple[int, int], ...]
"""First and last-plus-one row of each piece of a shard."""


def most_rows(spans: Spans) -> int:
    """Rows of the largest piece."""
    return max(stop - start for start, stop in spans)


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A transfer that is under way or has arrived: of a gather's first piece, or of an exchange's first hop.

    Attributes:
        sent: what it was made for.
        work: its handle.
        own: what the backend reads.
        arrived: what it writes; raw bytes of an exchange.
    """

    sent: SentAhead
    work: Any
    own: Tensor
    arrived: Tensor


def send_ahead(call: Call, prefetch: Prefetch, spans: Spans, lane: Lane, rank: int, world: int) -> Ahead:
    """Starts the first transfer of the call that will gather ``prefetch``, a gather in the pieces ``spans``."""
    if prefetch.kind == "gather":
        shard = prefetch.shard
        start, stop = spans[0]
        own = shard[:, start:stop].contiguous()
        arrived = shard.new_empty(world * shard.shape[0] * most_rows(spans) * shard.shape[2])
        target = arrived[: world * own.numel()]
        work = lane.all_gather(target, own.view(-1))
        return Ahead(SentAhead.of(call, prefetch, len(spans)), work, own, arrived)
    own = packed(prefetch.tensors)
    arrived = torch.empty_like(own)
    leaving, arriving = [0] * world, [0] * world
    leaving[(rank - 1) % world], arriving[(rank + 1) % world] = own.numel(), arrived.numel()
    work = lane.all_to_all(arrived, own, arriving, leaving)
    return Ahead(SentAhead.of(call, prefetch), work, own, arrived)


def packed(tensors: tuple[Tensor, ...]) -> Tensor:
    """What an exchange shares, as bytes: a single tensor where it is, several one after another."""
    if len(tensors) == 1:
        return as_bytes(tensors[0])
    bundle = Bundle.of(tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors))
    raw = torch.empty(bundle.nbytes, dtype=torch.uint8, device=tensors[0].device)
    for place, tensor in zip(bundle.tensors(raw), tensors, strict=True):
        place.copy_(tensor.detach())
    return raw
