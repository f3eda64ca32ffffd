"""What a call says that gathers, computes and scatters a sequence piece by piece.

A pipelined attention block is of this form: while one piece of the sequence is computed, the next one's rows arrive
from all ranks and the last one's results travel back to theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

__all__ = ["Pipeline"]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Rows of every rank's shards, span by span: gathered, worked on together, and given back as sums over ranks.

    For each span in turn: ``consume(index, source, blocks)`` for every rank, this one first; ``compute(index)`` once;
    ``produce(index, target, block)`` for every rank, this one last; ``conclude(index, source, blocks)`` for every rank,
    in their order, at any time between this ``compute`` and the next one.

    Attributes:
        shards: this rank's tensors [batch, rows, width], contiguous.
        spans: (first row, last row + 1) of each piece of a shard, in the order of work; together all rows, each once.
        consume: ``blocks`` are the rows of ``source``'s shards but the late ones, [batch, rows of the span, width]
            each; this rank's own are slices of ``shards``, others' are contiguous.
        compute: whatever needs all ranks' rows of the span, and of those before it.
        out: [batch, rows, width], contiguous; receives the sums of what all ranks produce for this one.  None: nothing
            is scattered.
        produce: writes this rank's part of ``target``'s rows of the span into ``block``, whatever it holds.
        late: how many of the shards, the last ones, ``conclude`` alone reads: their rows may arrive while the span is
            computed.
        conclude: ``blocks`` are the rows of the late shards, as for ``consume``.
    """

    shards: tuple[Tensor, ...]
    spans: tuple[tuple[int, int], ...]
    consume: Callable[[int, int, tuple[Tensor, ...]], None]
    compute: Callable[[int], None]
    out: Tensor | None = None
    produce: Callable[[int, int, Tensor], None] | None = None
    late: int = 0
    conclude: Callable[[int, int, tuple[Tensor, ...]], None] | None = None

    @property
    def early(self) -> int:
        """How many of the shards ``consume`` reads, the first ones."""
        return len(self.shards) - self.late

    @property
    def most_rows(self) -> int:
        """Rows of the largest span."""
        return max(stop - start for start, stop in self.spans)

    def own(self, index: int) -> tuple[Tensor, ...]:
        """This rank's rows of a span."""
        start, stop = self.spans[index]
        return tuple(shard[:, start:stop] for shard in self.shards)

    def own_out(self, index: int) -> Tensor:
        """Where this rank's rows of a span are summed."""
        assert self.out is not None
        start, stop = self.spans[index]
        return self.out[:, start:stop]

    def check(self, name: str) -> None:
        """Raises ValueError unless the spans are all rows of the tensors; ``name`` is the call's."""
        if not 0 <= self.late <= len(self.shards) or (self.late > 0) != (self.conclude is not None):
            given = "without" if self.conclude is None else "with"
            raise ValueError(
                f"{name}: expected at most {len(self.shards)} late shards, and conclude if there are any, "
                f"got {self.late} {given} it"
            )
        rows = self.shards[0].shape[1]
        end = 0
        for start, stop in sorted(self.spans):
            if start != end or stop <= start:
                raise ValueError(f"{name}: expected spans that are all {rows} rows of a shard, got {self.spans}")
            end = stop
        tensors = (*self.shards, *(() if self.out is None else (self.out,)))
        if end != rows or any(tensor.shape[1] != rows or not tensor.is_contiguous() for tensor in tensors):
            raise ValueError(
                f"{name}: expected contiguous tensors of {end} rows, got shapes {[list(t.shape) for t in tensors]}"
            )
