"""One pipeline on the host: pieces are read where their owners published them, partial results where they were made.

The window of what is published holds all pieces of this rank's shards; the window of partial results two cells as large
as the largest piece, followed by the sum in progress.  The order of everything is the schedule's
(``comm/schedules/steps.py``), which ``comm/host/transport.py`` executes.
"""

from __future__ import annotations

import torch

from odysseus_kernels.comm.bundles import Bundle
from odysseus_kernels.comm.host.windows import BundleBuffer, PartialBuffer, Windows
from odysseus_kernels.comm.pipeline import Pipeline
from odysseus_kernels.comm.reduce import PieceSum
from odysseus_kernels.comm.schedules.leases import LeaseTable
from odysseus_kernels.comm.schedules.steps import PARTIAL_CELLS, Step, Task

__all__ = ["HostPipeline"]


class HostPipeline:
    """The buffers of one pipeline and what its steps do.

    Attributes:
        given: what this rank publishes.
        made: partial results for others; None where nothing is scattered.
    """

    def __init__(
        self, pipeline: Pipeline, rank: int, world: int, reduce_dtype: torch.dtype, leases: LeaseTable, windows: Windows
    ) -> None:
        self._pipeline, self._rank, self._world = pipeline, rank, world
        self._reduce_dtype, self._windows = reduce_dtype, windows
        specs = [
            ((shard.shape[0], stop - start, shard.shape[2]), shard.dtype)
            for start, stop in pipeline.spans
            for shard in pipeline.shards
        ]
        self.given = BundleBuffer(leases.lease(), Bundle.of(tuple(specs)))
        self.made: PartialBuffer | None = None
        self._sums: PieceSum | None = None
        if pipeline.out is not None:
            batch, rows, width = pipeline.out.shape
            held = PieceSum.held_bytes(pipeline.out, world, reduce_dtype, pipeline.most_rows)
            pieces = len(pipeline.spans)
            cells = min(PARTIAL_CELLS, pieces * (world - 1))
            self.made = PartialBuffer(
                leases.lease(), pipeline.out.dtype, batch, rows, width, pieces, cells, held, spans=pipeline.spans
            )

    @property
    def buffers(self) -> list[BundleBuffer | PartialBuffer]:
        """In the order of their leases."""
        return [buffer for buffer in (self.given, self.made) if buffer is not None]

    @torch.no_grad()  # windows are memory, not part of anybody's graph
    def publish(self, index: int) -> None:
        for place, own in zip(self._published(self._rank, index), self._pipeline.own(index), strict=True):
            place.copy_(own)

    def compute(self, step: Step) -> None:
        """Runs the callback that ``step`` stands for."""
        pipeline, index = self._pipeline, step.piece
        if step.task is Task.CONSUME:
            own = step.rank == self._rank
            blocks = pipeline.own(index) if own else self._published(step.rank, index)
            pipeline.consume(index, step.rank, blocks[: pipeline.early])
        elif step.task is Task.PROCESS:
            pipeline.compute(index)
            if pipeline.conclude is not None:
                # All of a piece is published at once: nothing arrives late here.
                for rank in range(self._world):
                    blocks = pipeline.own(index) if rank == self._rank else self._published(rank, index)
                    pipeline.conclude(index, rank, blocks[pipeline.early :])
        elif step.task is Task.ADD:
            assert self.made is not None and pipeline.out is not None
            if self._sums is None:
                held = self._windows.held(self._rank, self.made)
                self._sums = PieceSum(pipeline.out, self._world, self._reduce_dtype, held)
            block = self._windows.partial(step.rank, self.made, step.reads[0].part, index)
            self._sums.add(*pipeline.spans[index], block)
        else:
            assert self.made is not None and pipeline.produce is not None
            if step.rank == self._rank:
                pipeline.produce(index, step.rank, pipeline.own_out(index))
            else:
                block = self._windows.partial(self._rank, self.made, step.writes[0].part, index)
                pipeline.produce(index, step.rank, block)

    def _published(self, rank: int, index: int) -> tuple[torch.Tensor, ...]:
        count = len(self._pipeline.shards)
        return self._windows.cell(rank, self.given, 0)[index * count : (index + 1) * count]
