"""Into how many pieces a device's chunks are cut, and how much of the device what moves and adds them may hold."""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor

from odysseus_kernels.comm.schedules.switch import PART_SETS, PARTS, PUSHED
from odysseus_kernels.comm.transport import Call, Scatter, row_pieces
from odysseus_kernels.planner.sums import sum_multiprocessors, switch_multiprocessors
from odysseus_kernels.planner.waves import wave_pieces

__all__ = ["held_multiprocessors", "of_gather", "of_scatter", "sets"]

# Rows of a piece below which a product of one piece fills no GPU.
_PIECE_ROWS = 1024
# Of pulled chunks: finer, since the product of the last piece is all that follows its arrival.
_GATHER_ROWS = 2048
_GATHER_PIECES = 4


def of_gather(call: Call, shard: Tensor, world: int) -> int:
    """Pieces of a shard that is gathered."""
    rows = shard.shape[0] * shard.shape[1]
    auto = max(1, min(_GATHER_PIECES, rows // _GATHER_ROWS))
    if call.switched and call.scatter is None:
        # All ranks' pieces lie in one window: with as many as there are ranks two sets of them are two chunks.
        auto = max(1, min(world, rows // _PIECE_ROWS))
    return row_pieces(call.config.chunks_per_rank, shard.shape[1], auto=auto)


def sets(call: Call, pieces: int) -> int:
    """Sets of cells for what is stored to all ranks.  Beside a scatter's product all pieces of a gather travel."""
    return pieces if call.scatter is not None else PART_SETS


def of_scatter(call: Call, scatter: Scatter, world: int, multiprocessors: int) -> int:
    """Pieces of a chunk that is scattered.

    As many as there are ranks: then what is on its way, sent and received, stays within two chunks.  Or up to twice as
    many, where their products fill the device better; never fewer, for the memory's sake.
    """
    batch, rows, width = scatter.out.shape
    auto = max(1, min(world, batch * rows // _PIECE_ROWS))
    if multiprocessors and auto > 1:
        most = min(2 * auto, batch * rows // (_PIECE_ROWS // 2))
        auto = wave_pieces(batch * rows, width, multiprocessors, least=auto, most=most)
    return row_pieces(call.config.chunks_per_rank, rows, auto=auto)


def held_multiprocessors(windows: Container[str], world: int, link_bytes_per_s: float) -> int:
    """The most that sums, and stores to all ranks, may hold while products run, given the windows that a call uses."""
    switched = PARTS in windows or PUSHED in windows
    return (switch_multiprocessors if switched else sum_multiprocessors)(world, link_bytes_per_s)
