"""Into which pieces a shard, or a sum, is cut that travels over a process group."""

from __future__ import annotations

from torch import Tensor

from odysseus_kernels.comm.collective.lanes import Lane
from odysseus_kernels.comm.schedules.collective import tapered_spans
from odysseus_kernels.comm.schedules.steps import piece_bounds
from odysseus_kernels.comm.transport import Call, row_pieces

__all__ = ["Spans", "cut_into_spans", "most_rows"]

Spans = tuple[tuple[int, int], ...]
"""First and last-plus-one row of each piece of a shard."""

# Pieces of a shard: enough that the first product starts early, few and large enough that issuing them and multiplying
# narrow blocks does not cost more than it hides (on two cores, 4 MB pieces did best from 4 MB to 32 MB).
_PIECES = 4
_PIECE_BYTES = 4 << 20
# Between hosts, where a link is the narrow place: rows of a shard, over all batches, from which it is cut into as many
# tapered pieces.  A product of few rows reads the whole other matrix: in fp32 it takes as long as with 40 rows more.
_PIECES_OF_LINK = ((2048, 6), (512, 4), (128, 2))
_LEAST_BYTES_OF_LINK = 256 << 10  # a smaller shard takes no longer than its latencies


def most_rows(spans: Spans) -> int:
    """Rows of the largest piece."""
    return max(stop - start for start, stop in spans)


def cut_into_spans(call: Call, lane: Lane, chunk: Tensor, *, scattered: bool = False) -> Spans:
    """Pieces of one rank's shard, or of its sum if ``scattered``, [batch, rows, width]."""
    batch, rows, _ = chunk.shape
    size = chunk.numel() * chunk.element_size()
    chunks = call.config.chunks_per_rank
    if chunks == "auto" and lane.between_hosts:
        wanted = next((pieces for least, pieces in _PIECES_OF_LINK if batch * rows >= least), 1)
        return tapered_spans(rows, wanted if size >= _LEAST_BYTES_OF_LINK else 1, scattered=scattered)
    pieces = row_pieces(chunks, rows, auto=max(1, min(_PIECES, size // _PIECE_BYTES)))
    return tuple(piece_bounds(rows, pieces, piece) for piece in range(pieces))
