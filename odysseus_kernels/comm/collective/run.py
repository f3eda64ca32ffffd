"""A gather, a scatter or both over asynchronous collectives, a piece in flight while another multiplies.

The concurrency contract is that of ``comm/collective/transport.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odysseus_kernels.comm.collective.ahead import Ahead, Spans, most_rows, send_ahead
from odysseus_kernels.comm.collective.lanes import Lane
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.reduce import PieceSum
from odysseus_kernels.comm.schedules.collective import IN_FLIGHT, collective_schedule, sends_ahead_after, tapered_spans
from odysseus_kernels.comm.schedules.steps import Kind, Step, Task, piece_bounds
from odysseus_kernels.comm.trace import timed
from odysseus_kernels.comm.transport import Call, Scatter, row_pieces

__all__ = ["CollectiveRun", "spans_ahead"]

# Pieces of a shard: enough that the first product starts early, few and large enough that issuing them and multiplying
# narrow blocks does not cost more than it hides (on two cores, 4 MB pieces did best from 4 MB to 32 MB).
_PIECES = 4
_PIECE_BYTES = 4 << 20
# Between hosts, where a link is the narrow place: rows of a shard, over all batches, from which it is cut into as many
# tapered pieces.  A product of few rows reads the whole other matrix: in fp32 it takes as long as with 40 rows more.
_PIECES_OF_LINK = ((2048, 6), (512, 4), (128, 2))
_LEAST_BYTES_OF_LINK = 256 << 10  # a smaller shard takes no longer than its latencies


class CollectiveRun:
    """One call on one rank: its buffers, and the handles of what is under way."""

    def __init__(self, call: Call, lane: Lane, rank: int, world: int) -> None:
        self._call = call
        self._lane = lane
        self._rank, self._world = rank, world
        self._spans = {
            Task.ALL_GATHER: _spans(call, lane, call.gather.shard) if call.gather else ((0, 0),),
            Task.ALL_TO_ALL: _spans(call, lane, call.scatter.out, scattered=True) if call.scatter else ((0, 0),),
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
        """Takes over the first piece if it was sent ahead; says whether it was."""
        if ahead is None or not ahead.sent.serves(self._call, len(self._spans[Task.ALL_GATHER])):
            return False
        self._buffers["gathered", 0] = ahead.arrived
        self._sent[Task.ALL_GATHER, 0] = ahead.own
        self._work[Task.ALL_GATHER, 0] = ahead.work
        return True

    def steps(self, wait: Callable[[Any], None], prefetch: Prefetch | None) -> Ahead | None:
        """Runs the schedule; ``wait`` waits for a handle.  Returns ``prefetch``, sent meanwhile for the next call."""
        ahead = None
        schedule = collective_schedule(
            self._call.program,
            self._world,
            self._rank,
            gather_pieces=len(self._spans[Task.ALL_GATHER]),
            scatter_pieces=len(self._spans[Task.ALL_TO_ALL]),
            # On a GPU the host runs ahead, and one product of the whole own shard is faster.
            cuts_own=self._call.device.type == "cpu",
        )
        sends_after = sends_ahead_after(schedule) if prefetch is not None else -1
        first = -1
        operator, phase, copies = self._call.operator, self._call.phase, self._call.copies
        steps = timed(schedule.steps, operator, phase, "collective", self._rank, copies=copies)
        for index, step in enumerate(steps):
            assert step.task is not None
            if step.kind is Kind.ISSUE:
                # A first piece that was sent ahead is under way already.
                if (step.task, step.piece) not in self._work:
                    self._issue(step.task, step.piece)
                if index == sends_after and prefetch is not None:
                    ahead = self._send_ahead(prefetch)
            elif step.kind is Kind.FINISH:
                wait(self._work.pop((step.task, step.piece)))
                self._sent.pop((step.task, step.piece), None)
            else:
                first = step.piece if first < 0 else first
                if self._goes_on(step, schedule.steps[index + 1 : index + 2]):
                    continue
                self._compute(step, first)
                first = -1
        return ahead

    def _goes_on(self, step: Step, following: tuple[Step, ...]) -> bool:
        """Whether the next step is the own shard's next piece: one product of both costs less than two."""
        return any(
            step.rank == one.rank == self._rank and step.task is one.task and one.piece == step.piece + 1
            for one in following
        )

    def _send_ahead(self, prefetch: Prefetch) -> Ahead:
        return send_ahead(
            self._call, prefetch, spans_ahead(self._call, self._lane, prefetch), self._lane, self._rank, self._world
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


def _spans(call: Call, lane: Lane, chunk: Tensor, *, scattered: bool = False) -> Spans:
    """First and last-plus-one row of each piece of one rank's shard, or sum, [batch, rows, width]."""
    batch, rows, _ = chunk.shape
    size = chunk.numel() * chunk.element_size()
    chunks = call.config.chunks_per_rank
    if chunks == "auto" and lane.between_hosts:
        wanted = next((pieces for least, pieces in _PIECES_OF_LINK if batch * rows >= least), 1)
        return tapered_spans(rows, wanted if size >= _LEAST_BYTES_OF_LINK else 1, scattered=scattered)
    pieces = row_pieces(chunks, rows, auto=max(1, min(_PIECES, size // _PIECE_BYTES)))
    return tuple(piece_bounds(rows, pieces, piece) for piece in range(pieces))


def spans_ahead(call: Call, lane: Lane, prefetch: Prefetch) -> Spans:
    """Pieces into which the call that ``call`` sends ahead for will cut its gather."""
    return _spans(call, lane, prefetch.shard) if prefetch.kind == "gather" else ()
