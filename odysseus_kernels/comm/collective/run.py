"""A gather, a scatter or both over asynchronous collectives, a piece in flight while another multiplies.

The concurrency contract is that of ``comm/collective/transport.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odysseus_kernels.comm.collective.agreement import Agreement
from odysseus_kernels.comm.collective.ahead import Ahead, Sender
from odysseus_kernels.comm.collective.lanes import Lane
from odysseus_kernels.comm.collective.spans import cut_into_spans, most_rows
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.reduce import PieceSum
from odysseus_kernels.comm.schedules.collective import IN_FLIGHT, collective_schedule
from odysseus_kernels.comm.schedules.steps import Kind, Step, Task
from odysseus_kernels.comm.trace import timed
from odysseus_kernels.comm.transport import Call, Scatter

__all__ = ["CollectiveRun"]


class CollectiveRun:
    """One call on one rank: its buffers, and the handles of what is under way."""

    def __init__(self, call: Call, lane: Lane, rank: int, world: int) -> None:
        self._call = call
        self._lane = lane
        self._rank, self._world = rank, world
        self._spans = {
            Task.ALL_GATHER: cut_into_spans(call, lane, call.gather.shard) if call.gather else ((0, 0),),
            Task.ALL_TO_ALL: (
                cut_into_spans(call, lane, call.scatter.out, scattered=True) if call.scatter else ((0, 0),)
            ),
        }
        self._work: dict[tuple[Task, int], Any] = {}
        self._buffers: dict[tuple[str, int], Tensor] = {}
        # Kept until the collective has finished: the backend reads them.
        self._sent: dict[tuple[Task, int], Tensor] = {}
        self._sums: PieceSum | None = None
        if call.scatter is not None:
            out, dtype = call.scatter.out, call.config.reduce_dtype
            nbytes = PieceSum.held_bytes(out, self._world, dtype, most_rows(self._spans[Task.ALL_TO_ALL]))
            held = torch.empty(nbytes, dtype=torch.uint8, device=out.device)
            self._sums = PieceSum(out, self._world, dtype, held)

    def adopt(self, ahead: Ahead | None) -> bool:
        """Takes over the first pieces, under way or not, if they were sent ahead; says whether they were."""
        if ahead is None or not ahead.sent.serves(self._call, len(self._spans[Task.ALL_GATHER])):
            return False
        for piece, one in enumerate(ahead.transfers):
            self._buffers["gathered", piece] = one.arrived
            self._sent[Task.ALL_GATHER, piece] = one.own
            self._work[Task.ALL_GATHER, piece] = one.work
        return True

    def steps(self, wait: Callable[[Any], None], agreement: Agreement, prefetch: Prefetch | None) -> Ahead | None:
        """Runs the schedule; ``wait`` waits for a handle.  Returns ``prefetch``, sent meanwhile for the next call."""
        schedule = collective_schedule(
            self._call.program,
            self._world,
            self._rank,
            gather_pieces=len(self._spans[Task.ALL_GATHER]),
            scatter_pieces=len(self._spans[Task.ALL_TO_ALL]),
            # On a GPU the host runs ahead, and one product of the whole own shard is faster.
            cuts_own=self._call.device.type == "cpu",
            # Backward adds products up, and bits depend on their order.
            ahead=len(self._work) if self._call.phase == "forward" else 0,
        )
        sender = Sender(self._call, prefetch, schedule, self._lane, self._rank, self._world, agreement)
        first = -1
        operator, phase, copies = self._call.operator, self._call.phase, self._call.copies
        steps = timed(schedule.steps, operator, phase, "collective", self._rank, copies=copies)
        for index, step in enumerate(steps):
            assert step.task is not None
            if step.kind is Kind.ISSUE:
                # What was sent ahead is under way already.
                if (step.task, step.piece) not in self._work:
                    agreement.wait()
                    self._issue(step.task, step.piece)
            elif step.kind is Kind.FINISH:
                wait(self._work.pop((step.task, step.piece)))
                self._sent.pop((step.task, step.piece), None)
            else:
                first = step.piece if first < 0 else first
                if self._goes_on(step, schedule.steps[index + 1 : index + 2]):
                    continue
                self._compute(step, first)
                first = -1
            sender.after(index)
        agreement.wait()
        return sender.ahead

    def _goes_on(self, step: Step, following: tuple[Step, ...]) -> bool:
        """Whether the next step is the own shard's next piece: one product of both costs less than two."""
        return any(
            step.rank == one.rank == self._rank and step.task is one.task and one.piece == step.piece + 1
            for one in following
        )

    def _block(self, name: str, piece: int, like: Tensor, rows: int, slots: int, most: int) -> Tensor:
        """Buffer ``name`` of ``piece``: [slots, batch, rows, width], made once for each of the pieces in flight."""
        batch, _, width = like.shape
        key = (name, piece % IN_FLIGHT)
        if key not in self._buffers:
            self._buffers[key] = like.new_empty(slots * batch * most * width)
        return self._buffers[key][: slots * batch * rows * width].view(slots, batch, rows, width)

    def _bounds(self, task: Task, piece: int) -> tuple[int, int, int]:
        """First and last-plus-one row of ``piece``, and the rows of the largest."""
        spans = self._spans[task]
        return *spans[piece], most_rows(spans)

    def _gathered(self, piece: int) -> tuple[int, int, Tensor]:
        assert self._call.gather is not None
        shard = self._call.gather.shard
        start, stop, most = self._bounds(Task.ALL_GATHER, piece)
        return start, stop, self._block("gathered", piece, shard, stop - start, self._world, most)

    def _exchanged(self, name: str, piece: int) -> tuple[int, int, Tensor]:
        assert self._call.scatter is not None
        out = self._call.scatter.out
        start, stop, most = self._bounds(Task.ALL_TO_ALL, piece)
        return start, stop, self._block(name, piece, out, stop - start, self._world - 1, most)

    def _slot(self, peer: int) -> int:
        """Place of ``peer`` among the others: no rank sends itself anything."""
        return peer - (peer > self._rank)

    def _issue(self, task: Task, piece: int) -> None:
        if task is Task.ALL_GATHER:
            assert self._call.gather is not None
            start, stop, gathered = self._gathered(piece)
            own = self._call.gather.shard[:, start:stop].contiguous()
            self._sent[task, piece] = own
            self._work[task, piece] = self._lane.all_gather(gathered.view(-1), own.view(-1))
            return
        _, _, sent = self._exchanged("sent", piece)
        _, _, received = self._exchanged("received", piece)
        splits = [0 if peer == self._rank else sent[0].numel() for peer in range(self._world)]
        self._work[task, piece] = self._lane.all_to_all(received.view(-1), sent.view(-1), splits, splits)

    def _compute(self, step: Step, first: int) -> None:
        """Runs a callback; of the own shard, for pieces ``first`` to that of ``step``."""
        if step.task is Task.CONSUME:
            gather = self._call.gather
            assert gather is not None
            if step.rank == self._rank:
                spans = self._spans[Task.ALL_GATHER]
                start, stop = (0, gather.shard.shape[1]) if step.piece < 0 else (spans[first][0], spans[step.piece][1])
                gather.consume(self._rank, start, stop, gather.shard[:, start:stop])
                return
            start, stop, gathered = self._gathered(step.piece)
            gather.consume(step.rank, start, stop, gathered[step.rank])
            return
        scatter: Scatter | None = self._call.scatter
        assert scatter is not None and self._sums is not None
        if step.task is Task.ADD:
            start, stop, received = self._exchanged("received", step.piece)
            self._sums.add(start, stop, received[self._slot(step.rank)])
            return
        start, stop, sent = self._exchanged("sent", step.piece)
        own = step.rank == self._rank
        block = scatter.out[:, start:stop] if own else sent[self._slot(step.rank)]
        scatter.produce(step.rank, start, stop, block)
