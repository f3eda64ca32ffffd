"""One exchange over a process group: around the ring, each transfer from one rank to one other.

Concurrency contract.  As in ``comm/collective/transport.py``: the backend moves data, callbacks run on the calling
thread, and a buffer is written again only after the transfer that used it has finished.  There are two slots for what
arrives and two for what leaves, each way; a rank never holds more than two others' blocks.

A transfer is an all-to-all in which a rank sends to one rank only and receives from one: the same bytes as a send and a
receive.  Unlike those of Gloo it can be waited for in slices of time, between which lost peers are looked for; the
links of CPU ranks (``comm/collective/links.py``) send nothing but the one block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from odysseus_kernels.comm.bundles import Bundle, Intake, as_bytes, held_bundle, made_bundle
from odysseus_kernels.comm.collective.agreement import Agreement
from odysseus_kernels.comm.collective.ahead import Ahead, Sender, Sending
from odysseus_kernels.comm.collective.lanes import Lane
from odysseus_kernels.comm.exchange import Exchange, spread
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.schedules.collective import IN_FLIGHT, collective_schedule
from odysseus_kernels.comm.schedules.steps import Kind, Step, Task
from odysseus_kernels.comm.trace import timed
from odysseus_kernels.comm.transport import Call

__all__ = ["ExchangeRun"]


class ExchangeRun:
    """The buffers and handles of one exchange."""

    def __init__(self, call: Call, exchange: Exchange, lane: Lane, rank: int, world: int) -> None:
        self._call, self._exchange, self._lane = call, exchange, lane
        self._rank, self._world = rank, world
        self._program = call.program
        self._device = call.device
        shared = [(tuple(tensor.shape), tensor.dtype) for tensor in exchange.shared]
        addressed = [(tuple(tensor.shape[1:]), tensor.dtype) for tensor in exchange.addressed]
        self._given, self._rest = Bundle.of((*shared, *addressed)), Bundle.of(tuple(addressed))
        # What the first visit's rank shares, if that was sent ahead and it gives more.
        self._first: Sending | None = None
        self._made = made_bundle(exchange)
        held = held_bundle(exchange, world, call.config.reduce_dtype)
        self._intake = Intake(exchange, world, call.config.reduce_dtype, self._empty(held.nbytes))
        self._slots: dict[tuple[str, int], Tensor] = {}
        self._packed: dict[int, tuple[bool, ...]] = {}  # which shared tensors lie in a slot that leaves
        self._work: dict[tuple[Task, int], Any] = {}
        # Kept until the transfer has finished: the backend reads them.
        self._sent: dict[tuple[Task, int], Tensor] = {}

    def adopt(self, ahead: Ahead | None) -> bool:
        """Takes over what the first hop shares, under way or not, if it was sent ahead; says whether it was."""
        if ahead is None or not ahead.sent.serves(self._call):
            return False
        (first,) = ahead.transfers
        if self._exchange.addressed:
            self._first = first
            return True
        key = (Task.GIVEN, 0)
        self._slots["given", 0], self._slots["giving", 0] = first.arrived, first.own
        self._work[key], self._sent[key] = first.work, first.own
        self._packed[0] = (True,) * len(self._exchange.shared)
        return True

    def steps(self, wait: Callable[[Any], None], agreement: Agreement, prefetch: Prefetch | None) -> Ahead | None:
        """Runs the schedule; ``wait`` finishes what the lane has issued.  Returns ``prefetch``, sent meanwhile."""
        schedule = collective_schedule(self._program, self._world, self._rank)
        sender = Sender(self._call, prefetch, schedule, self._lane, self._rank, self._world, agreement)
        operator, phase, copies = self._call.operator, self._call.phase, self._call.copies
        steps = timed(schedule.steps, operator, phase, "collective", self._rank, copies=copies)
        for index, step in enumerate(steps):
            assert step.task is not None
            key = (step.task, step.piece)
            if step.kind is Kind.ISSUE:
                if key not in self._work:  # a first hop that was sent ahead is under way already
                    agreement.wait()
                    self._issue(step, *key)
            elif step.kind is Kind.FINISH:
                wait(self._work.pop(key))
                del self._sent[key]
                if self._first is not None and key == (Task.GIVEN, 0):
                    wait(self._first.work)
            elif step.task is Task.TAKE:
                self._take(step)
            else:
                self._visit(step)
            sender.after(index)
        agreement.wait()
        return sender.ahead

    def _take(self, step: Step) -> None:
        taken = self._exchange.taken(step.rank, self._rank, "sums")
        if self._exchange.visits(step.rank, self._rank):
            self._intake.take(step.rank, self._in_slot("taken", step.piece, self._made, taken), taken)
        else:
            self._intake.skip()

    def _visit(self, step: Step) -> None:
        exchange, rank = self._exchange, self._rank
        if step.rank == rank:
            exchange.visit(rank, exchange.own_given(rank), exchange.own_made(rank))
            return
        if not exchange.visits(rank, step.rank):
            return
        given: tuple[Tensor, ...] = ()
        made: tuple[Tensor, ...] = ()
        if self._first is not None and step.piece == 0:
            shared = Bundle.of(tuple((tuple(tensor.shape), tensor.dtype) for tensor in exchange.shared))
            given = (*shared.tensors(self._first.arrived), *self._rest.tensors(self._slot("given", 0, self._given)))
        elif exchange.gives:
            given = self._in_slot("given", step.piece, self._given, exchange.taken(rank, step.rank, "shared"))
        if exchange.makes:
            made = self._in_slot("made", step.piece, self._made, exchange.taken(rank, step.rank, "sums"))
        exchange.visit(step.rank, given, made)

    def _in_slot(self, name: str, hop: int, bundle: Bundle, taken: tuple[bool, ...]) -> tuple[Tensor, ...]:
        """The tensors of ``bundle`` in a slot, which holds only those that are taken."""
        if not self._exchange.parts:
            return bundle.tensors(self._slot(name, hop, bundle))
        only = bundle.only(taken)
        slot = self._slot(name, hop, only)
        return spread(only.tensors(slot), taken, slot)

    def _issue(self, step: Step, task: Task, hop: int) -> None:
        """What comes from rank ``step.rank`` in this hop, and what goes to the rank opposite in the ring."""
        source = step.rank
        target = (2 * self._rank - source) % self._world
        if not self._exchange.everyone:
            sent, received = self._between(task, hop, source, target)
        elif task is Task.GIVEN:
            received = self._slot("given", hop, self._given)
            if self._first is not None and hop == 0:
                sent, received = self._giving_rest(target), received[: self._rest.nbytes]
            else:
                sent = self._giving(hop, target)
        else:
            sent, received = self._slot("made", hop, self._made), self._slot("taken", hop, self._made)
        leaving, arriving = [0] * self._world, [0] * self._world
        leaving[target], arriving[source] = sent.numel(), received.numel()
        self._sent[task, hop] = sent
        self._work[task, hop] = self._lane.all_to_all(received, sent, arriving, leaving)

    def _between(self, task: Task, hop: int, source: int, target: int) -> tuple[Tensor, Tensor]:
        """What is sent to ``target`` and received from ``source`` where not all visit all; empty where nothing is.

        The transfer is issued even so: it is a collective, and other ranks may have something in this hop.
        """
        exchange, rank = self._exchange, self._rank
        nothing = self._empty(0)

        def slot(name: str, bundle: Bundle, visitor: int, owner: int, kind: Literal["shared", "sums"]) -> Tensor:
            if not exchange.visits(visitor, owner):
                return nothing
            only = bundle.only(exchange.taken(visitor, owner, kind))
            return self._slot(name, hop, only)[: only.nbytes]

        if task is Task.GIVEN:
            sent = self._giving(hop, target) if exchange.visits(target, rank) else nothing
            return sent, slot("given", self._given, rank, source, "shared")
        return slot("made", self._made, rank, target, "sums"), slot("taken", self._made, source, rank, "sums")

    def _giving(self, hop: int, target: int) -> Tensor:
        """What ``target`` is given.  A single tensor leaves from where it is; others are packed, equal ones once."""
        exchange = self._exchange
        taken = exchange.taken(target, self._rank, "shared")
        shared = tuple(itertools.compress(exchange.shared, taken))
        if len(shared) + len(exchange.addressed) == 1:
            single = shared[0] if shared else exchange.addressed[0][target]
            if single.is_contiguous():
                return as_bytes(single)
        slot = hop if exchange.addressed or exchange.parts else 0
        bundle = self._given.only(taken) if exchange.parts else self._given
        raw = self._slot("giving", slot, bundle)[: bundle.nbytes]
        tensors = bundle.tensors(raw)
        if self._packed.get(slot % IN_FLIGHT) != taken:
            for place, tensor in zip(tensors, shared, strict=False):
                place.copy_(tensor.detach())
            self._packed[slot % IN_FLIGHT] = taken
        for place, tensor in zip(tensors[len(shared) :], exchange.addressed, strict=True):
            place.copy_(tensor[target].detach())
        return raw

    def _giving_rest(self, target: int) -> Tensor:
        """The same without what is shared; in memory of its own, as a later hop's lies otherwise."""
        raw = self._empty(self._rest.nbytes)
        for place, tensor in zip(self._rest.tensors(raw), self._exchange.addressed, strict=True):
            place.copy_(tensor[target].detach())
        return raw

    def _slot(self, name: str, hop: int, bundle: Bundle) -> Tensor:
        """Memory for ``bundle``, perhaps more; a slot that is too small for what comes now is free, and replaced."""
        key = (name, hop % IN_FLIGHT)
        if key not in self._slots or self._slots[key].numel() < bundle.nbytes:
            self._slots[key] = self._empty(bundle.nbytes)
        return self._slots[key]

    def _empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
