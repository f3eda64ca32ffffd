"""One exchange on the host: what is given is read where its owner published it, what is made where its maker left it.

The window of the published bundle holds all that is shared, and for each peer its part of what is addressed; the own
part stays where the caller has it.  The window of what is made has two cells, followed by the sums in progress.
The order of everything is the schedule's (``comm/schedules/steps.py``), which ``comm/host/transport.py`` executes.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from odysseus_kernels.comm.bundles import Bundle, Intake, held_bundle, made_bundle
from odysseus_kernels.comm.exchange import Exchange, spread
from odysseus_kernels.comm.host.windows import BundleBuffer, Windows
from odysseus_kernels.comm.schedules.leases import LeaseTable
from odysseus_kernels.comm.schedules.steps import PARTIAL_CELLS, Step

__all__ = ["HostExchange"]


class HostExchange:
    """The buffers of one exchange and what its steps do.

    Attributes:
        given: what this rank publishes, or all that it gives if that was sent ahead (``taken``); or None.
        sent: what it shares, if that was sent ahead and it gives more; ``given`` has the rest then.
        made: what it makes for others; None if it makes nothing.
    """

    def __init__(
        self,
        exchange: Exchange,
        rank: int,
        world: int,
        reduce_dtype: torch.dtype,
        leases: LeaseTable,
        windows: Windows,
        taken: BundleBuffer | None = None,
    ) -> None:
        self._exchange, self._rank, self._world = exchange, rank, world
        self._reduce_dtype, self._windows = reduce_dtype, windows
        self.sent = taken if exchange.addressed else None
        self.given = None if exchange.addressed else taken
        self.made: BundleBuffer | None = None
        self._intake: Intake | None = None
        self._published = () if self.sent is not None else exchange.shared
        if exchange.gives and self.given is None:
            shared = [(tuple(tensor.shape), tensor.dtype) for tensor in self._published]
            addressed = [((world - 1, *tensor.shape[1:]), tensor.dtype) for tensor in exchange.addressed]
            self.given = BundleBuffer(leases.lease(), Bundle.of((*shared, *addressed)))
        if exchange.makes:
            held = held_bundle(exchange, world, reduce_dtype)
            cells = min(PARTIAL_CELLS, world - 1)
            self.made = BundleBuffer(leases.lease(), made_bundle(exchange), cells, held.nbytes)

    @property
    def buffers(self) -> list[BundleBuffer]:
        """In the order of their leases."""
        return [buffer for buffer in (self.given, self.made) if buffer is not None]

    @torch.no_grad()  # windows are memory, not part of anybody's graph
    def publish(self) -> None:
        assert self.given is not None
        rank, shared = self._rank, self._published
        published = self._windows.cell(rank, self.given, 0)
        for index, (target, tensor) in enumerate(zip(published, shared, strict=False)):
            if self._exchange.served(rank, self._world, index):  # else nobody reads it
                target.copy_(tensor)
        for target, tensor in zip(published[len(shared) :], self._exchange.addressed, strict=True):
            target[:rank].copy_(tensor[:rank])
            target[rank:].copy_(tensor[rank + 1 :])

    def visit(self, step: Step) -> None:
        exchange, rank, peer = self._exchange, self._rank, step.rank
        if peer == rank:
            exchange.visit(rank, exchange.own_given(rank), exchange.own_made(rank))
            return
        if not exchange.visits(rank, peer):
            return
        given: tuple[Tensor, ...] = ()
        made: tuple[Tensor, ...] = ()
        if self.given is not None:
            published = self._windows.cell(peer, self.given, 0)
            shared = len(self._published)
            slot = rank - (rank > peer)  # nobody publishes a part for itself
            given = (*published[:shared], *(tensor[slot] for tensor in published[shared:]))
        if self.sent is not None:
            given = (*self._windows.cell(peer, self.sent, 0), *given)
        if self.made is not None:
            made = self._windows.cell(rank, self.made, step.writes[0].part)
        if exchange.parts:
            given = _taken(given, exchange.taken(rank, peer, "shared"))
            made = _taken(made, exchange.taken(rank, peer, "sums"))
        exchange.visit(peer, given, made)

    def take(self, step: Step) -> None:
        assert self.made is not None
        if self._intake is None:
            held = self._windows.held(self._rank, self.made)
            self._intake = Intake(self._exchange, self._world, self._reduce_dtype, held)
        if not self._exchange.visits(step.rank, self._rank):
            self._intake.skip()
            return
        blocks = self._windows.cell(step.rank, self.made, step.reads[0].part)
        self._intake.take(step.rank, blocks, self._exchange.taken(step.rank, self._rank, "sums"))


def _taken(tensors: tuple[Tensor, ...], taken: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """Without those that are not taken."""
    return spread(tuple(itertools.compress(tensors, taken)), taken, tensors[0]) if tensors else ()
