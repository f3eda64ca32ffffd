"""A product whose rows are summed over the ranks, with the sum on all of them: tensor parallelism's all-reduce.

It is a reduce-scatter fused with the product, and a gather of the summed rows.  Cut into blocks, the gather of one
block travels while the next one multiplies: a transport's call may have both.  Each sum is made once, on the rank that
owns the rows, and copied, so that all ranks have the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.groups import dispatch
from odysseus_kernels.comm.transport import Call, Gather, Scatter, Transport, row_pieces
from odysseus_kernels.config import OverlapConfig

__all__ = ["sum_rows"]

# Pieces of what one rank owns: large enough that issuing their collectives costs less than it hides (as in
# comm/collective/transport.py).  A block has two, so that its sums travel beside its product, too.
_PIECES = 4
_PIECE_BYTES = 4 << 20
_PIECES_PER_BLOCK = 2


def sum_rows(
    operator: str,
    phase: Literal["forward", "backward"],
    like: Tensor,
    lines: int,
    width: int,
    produce: Callable[[int, int, Tensor, Tensor | None], None],
    group: dist.ProcessGroup,
    config: OverlapConfig,
    *,
    flops: int,
    shapes: str,
    own: str = "",
    bias: Tensor | None = None,
    meanwhile: Callable[[], None] | None = None,
    switched: bool = False,
) -> Tensor:
    """[lines, width] of ``like``'s type, the sum over all ranks, bitwise equal on all of them.

    Each rank sends 2 (N - 1) / N of it, or through a switch (N + 1) / N, with ``lines`` rounded up to a multiple of N.

    Args:
        operator, phase, shapes, own: as in :class:`~odysseus_kernels.comm.choice.selection.Phase`.
        like: type and device.
        lines, width: size of the result.
        produce: ``produce(start, stop, block, bias)`` writes this rank's part of lines ``start`` to ``stop`` into
            ``block`` [stop - start, width], with ``bias`` added unless it is None.
        group: the ranks.
        config: mode, transport, time limit.
        flops: of all products on this rank.
        bias: [width], added once to the sum.
        meanwhile: called once in each run while the last rows travel.
        switched: a switch adds, and copies the sums to all ranks.
    """
    world, rank = group.size(), group.rank()
    # Every rank owns equally many lines of each block; only the last block can have lines beyond the end.
    padded = -(-lines // world) * world
    whole = like.new_empty((padded, width))

    def parts(first: int, share: int) -> tuple[Scatter, Gather]:
        """The two halves of one block: lines ``first`` to ``first + world * share``."""
        mine = whole[first + rank * share : first + (rank + 1) * share].unsqueeze(0)

        def make(target: int, start: int, stop: int, block: Tensor) -> None:
            begin = first + target * share + start
            end = first + target * share + stop
            inside = max(0, min(end, lines) - begin)
            if inside:
                produce(begin, begin + inside, block[0, :inside], bias if target == rank else None)
            block[0, inside:].zero_()

        def take(source: int, start: int, stop: int, block: Tensor) -> None:
            begin = first + source * share
            if source != rank:
                whole[begin + start : begin + stop].copy_(block[0])
            elif meanwhile is not None and first + world * share == padded:
                meanwhile()

        return Scatter(mine, make), Gather(mine, take)

    def run(transport: Transport, settled: OverlapConfig) -> None:
        blocks, settled = _blocks(transport, settled, whole)

        def call(scatter: Scatter | None, gather: Gather | None, *, continued: bool = True) -> Call:
            return Call(
                operator, phase, settled, gather, scatter, shapes, "all_reduce", continued=continued, switched=switched
            )

        if settled.mode == "unfused":
            full = like.new_zeros((padded, width))
            produce(0, lines, full[:lines], None)
            scatter, gather = parts(0, padded // world)
            transport.reduce_scatter(call(scatter, None, continued=False), full.view(world, 1, padded // world, width))
            if bias is not None:
                scatter.out.add_(bias)
            transport.all_gather(call(None, gather), whole.view(world, 1, padded // world, width))
            if meanwhile is not None:
                meanwhile()
            return
        share, travels = padded // world, None
        for block in range(blocks):
            first, stop = share * block // blocks, share * (block + 1) // blocks
            scatter, gather = parts(first * world, stop - first)
            transport.execute(call(scatter, travels, continued=block > 0))
            travels = gather
        transport.execute(call(None, travels))

    choice = Phase(
        operator=operator,
        phase=phase,
        shapes=shapes,
        own=own,
        dtype=like.dtype,
        flops=flops,
        gathered_bytes=padded // world * width * like.element_size(),
        scattered_bytes=padded // world * width * like.element_size(),
        switched=switched,
    )
    if lines:
        dispatch(group, config, like.device, run, choice)
    elif meanwhile is not None:
        meanwhile()
    return whole[:lines]


def _blocks(transport: Transport, config: OverlapConfig, whole: Tensor) -> tuple[int, OverlapConfig]:
    """Blocks into which ``whole`` [world * share, width] is cut, and how a block is cut further.

    Where ranks copy from one another's memory on the CPU nothing travels by itself: there only pieces are cut.
    """
    share = whole.shape[0] // transport.world
    if config.mode == "unfused" or transport.world == 1 or (transport.name == "symmetric" and not whole.is_cuda):
        return 1, config
    automatic = max(1, min(_PIECES, whole.nbytes // transport.world // _PIECE_BYTES))
    wanted = row_pieces(config.chunks_per_rank, share, auto=automatic)
    blocks = max(1, wanted // _PIECES_PER_BLOCK)
    return blocks, dataclasses.replace(config, chunks_per_rank=-(-wanted // blocks))
