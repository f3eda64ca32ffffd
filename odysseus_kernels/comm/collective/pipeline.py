"""One pipeline over asynchronous collectives: a piece arrives and another leaves while a third is computed.

The concurrency contract is that of ``comm/collective/transport.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odysseus_kernels.comm.bundles import Bundle, as_bytes
from odysseus_kernels.comm.collective.agreement import Agreement
from odysseus_kernels.comm.collective.ahead import Ahead, Sender
from odysseus_kernels.comm.collective.lanes import Lane
from odysseus_kernels.comm.pipeline import Pipeline
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.reduce import PieceSum
from odysseus_kernels.comm.schedules.collective import IN_FLIGHT, collective_schedule
from odysseus_kernels.comm.schedules.steps import Kind, Step, Task
from odysseus_kernels.comm.trace import timed
from odysseus_kernels.comm.transport import Call

__all__ = ["PipelineRun"]


class PipelineRun:
    """The buffers and handles of one pipeline.

    At any time two pieces of each shard that is gathered are held beside the caller's tensors, and two of what is
    scattered, each way.
    """

    def __init__(self, call: Call, pipeline: Pipeline, lane: Lane, rank: int, world: int) -> None:
        self._call, self._pipeline, self._lane = call, pipeline, lane
        self._rank, self._world = rank, world
        self._program = call.program
        self._bundles = {
            task: [
                Bundle.of(tuple((tuple(part.shape), part.dtype) for part in self._own(task, index)))
                for index in range(len(pipeline.spans))
            ]
            for task in (Task.ALL_GATHER, Task.LATE_GATHER)
        }
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._work: dict[tuple[Task, int], Any] = {}
        # Kept until the collective has finished: the backend reads them.
        self._sent: dict[tuple[Task, int], Tensor] = {}
        self._sums: PieceSum | None = None
        if pipeline.out is not None:
            dtype = call.config.reduce_dtype
            nbytes = PieceSum.held_bytes(pipeline.out, world, dtype, pipeline.most_rows)
            self._sums = PieceSum(pipeline.out, world, dtype, self._bytes(nbytes))

    def adopt(self, ahead: Ahead | None) -> bool:
        """Uses nothing that was sent ahead: what it gathers is made just before."""
        return False

    def steps(self, wait: Callable[[Any], None], agreement: Agreement, prefetch: Prefetch | None) -> Ahead | None:
        """Runs the schedule; ``wait`` finishes what the lane has issued.  Returns ``prefetch``, sent meanwhile."""
        pieces = len(self._pipeline.spans)
        schedule = collective_schedule(
            self._program,
            self._world,
            self._rank,
            gather_pieces=pieces,
            scatter_pieces=pieces,
            early=self._pipeline.early > 0,
            late=self._pipeline.late > 0,
        )
        sender = Sender(self._call, prefetch, schedule, self._lane, self._rank, self._world, agreement)
        steps = timed(schedule.steps, self._call.operator, self._call.phase, "collective", self._rank)
        for index, step in enumerate(steps):
            assert step.task is not None
            if step.kind is Kind.ISSUE:
                agreement.wait()
                self._issue(step.task, step.piece)
            elif step.kind is Kind.FINISH:
                wait(self._work.pop((step.task, step.piece)))
                self._sent.pop((step.task, step.piece), None)
            else:
                self._compute(step)
            sender.after(index)
        agreement.wait()
        return sender.ahead

    def _issue(self, task: Task, index: int) -> None:
        if task is not Task.ALL_TO_ALL:
            own, everyone = self._packed(task, index), self._gathered(task, index)
            self._sent[task, index] = own
            self._work[task, index] = self._lane.all_gather(everyone.view(-1), own)
            return
        sent, received = self._partial("sent", index), self._partial("received", index)
        splits = [0 if peer == self._rank else sent[0].numel() for peer in range(self._world)]
        self._work[task, index] = self._lane.all_to_all(received.view(-1), sent.view(-1), splits, splits)

    def _compute(self, step: Step) -> None:
        pipeline, index, rank = self._pipeline, step.piece, step.rank
        if step.task is Task.CONSUME:
            pipeline.consume(index, rank, self._blocks(Task.ALL_GATHER, index, rank))
        elif step.task is Task.CONCLUDE:
            assert pipeline.conclude is not None
            pipeline.conclude(index, rank, self._blocks(Task.LATE_GATHER, index, rank))
        elif step.task is Task.PROCESS:
            pipeline.compute(index)
        elif step.task is Task.ADD:
            assert self._sums is not None
            self._sums.add(*pipeline.spans[index], self._partial("received", index)[self._slot(rank)])
        else:
            assert pipeline.produce is not None
            own = rank == self._rank
            block = pipeline.own_out(index) if own else self._partial("sent", index)[self._slot(rank)]
            pipeline.produce(index, rank, block)

    def _own(self, task: Task, index: int) -> tuple[Tensor, ...]:
        """This rank's rows of what ``task`` gathers."""
        early = self._pipeline.early
        return self._pipeline.own(index)[slice(early) if task is Task.ALL_GATHER else slice(early, None)]

    def _blocks(self, task: Task, index: int, rank: int) -> tuple[Tensor, ...]:
        """``rank``'s rows of it."""
        if rank == self._rank:
            return self._own(task, index)
        return self._bundles[task][index].tensors(self._gathered(task, index)[rank])

    def _packed(self, task: Task, index: int) -> Tensor:
        """This rank's rows of what ``task`` gathers, as bytes; a single contiguous one is sent from where it lies."""
        own, bundle = self._own(task, index), self._bundles[task][index]
        if len(own) == 1 and own[0].is_contiguous():
            return as_bytes(own[0])
        raw = self._bytes(bundle.nbytes)
        for place, part in zip(bundle.tensors(raw), own, strict=True):
            place.copy_(part.detach())
        return raw

    def _gathered(self, task: Task, index: int) -> Tensor:
        """[world, bytes of a rank's rows]."""
        bundles = self._bundles[task]
        most = self._world * max(bundle.nbytes for bundle in bundles)
        return self._slotted(task.value, index, most, bundles[index].nbytes)

    def _partial(self, name: str, index: int) -> Tensor:
        """[world - 1, batch, rows of the span, width] of what leaves or arrives."""
        out = self._pipeline.out
        assert out is not None
        start, stop = self._pipeline.spans[index]
        row = out.shape[0] * out.shape[2] * out.dtype.itemsize
        most = (self._world - 1) * self._pipeline.most_rows * row
        raw = self._slotted(name, index, most, (stop - start) * row, self._world - 1)
        return raw.view(out.dtype).view(self._world - 1, out.shape[0], stop - start, out.shape[2])

    def _slotted(self, name: str, index: int, most: int, nbytes: int, count: int | None = None) -> Tensor:
        """[count, nbytes] of a buffer that is made once for each of the pieces in flight."""
        count = self._world if count is None else count
        key = (name, index % IN_FLIGHT)
        if key not in self._buffers:
            self._buffers[key] = self._bytes(most)
        return self._buffers[key][: count * nbytes].view(count, nbytes)

    def _slot(self, peer: int) -> int:
        """Place of ``peer`` among the others: no rank sends itself anything."""
        return peer - (peer > self._rank)

    def _bytes(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._pipeline.shards[0].device)
