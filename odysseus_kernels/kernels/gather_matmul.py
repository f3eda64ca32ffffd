"""``all_gather(x) @ weight.T + bias`` as one persistent kernel whose tiles wait for their chunk.

Streams: the kernel runs on the caller's stream, while copies on other streams, or other ranks, fill ``gathered`` and
then set ``words``.  The local chunk is read in place and multiplied first, so arrival hides behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from odysseus_kernels.kernels.configs import Problem, TileConfig
from odysseus_kernels.kernels.launch import (
    Order,
    check_bias,
    check_chunks,
    check_matrix,
    check_signals,
    choose,
    launch,
    matrix,
    ring,
    same_count,
    ticks,
    weight_matrices,
)
from odysseus_kernels.kernels.tiles import (
    accumulate,
    await_word,
    described,
    described_weight,
    visited_chunk,
    visited_tile,
)

__all__ = ["gather_matmul", "gather_matmul_kernel"]


# Ranks run one binary: the numbers are not compiled in, nor whether an address of words, which differs from window to
# window, is a multiple of 16.
@triton.jit(
    do_not_specialize=["rank", "world", "pieces", "ticks", "tag"],
    do_not_specialize_on_alignment=["words", "epoch", "aborted", "control"],
)
def gather_matmul_kernel(
    outs,
    local,
    gathered,
    weights,
    biases,
    words,
    epoch,
    aborted,
    control,
    ticks,
    tag,
    rows,
    depth,
    widths,
    bias_widths,
    local_stride,
    gathered_rows,
    gathered_stride,
    weight_strides,
    out_strides,
    rank,
    world,
    pieces,
    COUNT: tl.constexpr,
    RING: tl.constexpr,
    DEEP: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """See :func:`gather_matmul`; ``gathered_rows`` is the distance of two chunks in rows of ``gathered_stride``."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    second = tl.cdiv(widths[0], BLOCK_N)
    third = second
    tiles_n = second
    gathered_end = tl.maximum(world - 2, 0) * gathered_rows + rows
    here = described(local, rows, depth, local_stride, BLOCK_M, BLOCK_K, DESCRIPTORS)
    there = described(gathered, gathered_end, depth, gathered_stride, BLOCK_M, BLOCK_K, DESCRIPTORS)
    b0 = described_weight(weights[0], widths[0], depth, weight_strides[0], BLOCK_N, BLOCK_K, DEEP, DESCRIPTORS)
    b1 = b0
    b2 = b0
    if COUNT > 1:
        third = second + tl.cdiv(widths[1], BLOCK_N)
        tiles_n = third
        b1 = described_weight(weights[1], widths[1], depth, weight_strides[1], BLOCK_N, BLOCK_K, DEEP, DESCRIPTORS)
    if COUNT > 2:
        tiles_n = third + tl.cdiv(widths[2], BLOCK_N)
        b2 = described_weight(weights[2], widths[2], depth, weight_strides[2], BLOCK_N, BLOCK_K, DEEP, DESCRIPTORS)
    tiles = tiles_m * tiles_n
    base = tl.load(epoch) * 256
    # Chunk and piece that this program has seen, in one number: a tile that needs no more than that does not poll.
    seen = 255
    for tile in range(tl.program_id(0), world * tiles, tl.num_programs(0)):
        visit = tile // tiles
        tile_m, tile_n = visited_tile(tile % tiles, tiles_m, tiles_n, GROUP)
        row = tile_m * BLOCK_M
        a, a_row, a_rows, a_stride = here, row, rows, local_stride
        if visit > 0:
            needed = tl.cdiv(tl.minimum(row + BLOCK_M, rows) * pieces, rows)
            if visit * 256 + needed > seen:
                which = tag + (visit - 1) * pieces + needed - 1
                await_word(words + visit - 1, base + needed, aborted, control, ticks, which, DESCRIPTORS, INTERPRETED)
                seen = visit * 256 + needed
            before = (visit - 1) * gathered_rows
            a, a_row, a_rows, a_stride = there, before + row, before + rows, gathered_stride
        # The weights' columns lie side by side; a tile has columns of one of them.  (Two ifs each: only the outer is
        # decided when compiling.)
        out, bias, b = outs[0], biases[0], b0
        width, bias_width, b_stride, out_stride = widths[0], bias_widths[0], weight_strides[0], out_strides[0]
        if COUNT > 1:  # noqa: SIM102
            if tile_n >= second:
                tile_n -= second
                out, bias, b = outs[1], biases[1], b1
                width, bias_width, b_stride, out_stride = widths[1], bias_widths[1], weight_strides[1], out_strides[1]
                if COUNT > 2:  # noqa: SIM102
                    if tile_n >= third - second:
                        tile_n -= third - second
                        out, bias, b = outs[2], biases[2], b2
                        width, bias_width = widths[2], bias_widths[2]
                        b_stride, out_stride = weight_strides[2], out_strides[2]
        column = tile_n * BLOCK_N
        acc = accumulate(
            tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
            a,
            a_row,
            a_rows,
            a_stride,
            b,
            column,
            width,
            b_stride,
            depth,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DEEP,
            DESCRIPTORS,
            INTERPRETED,
        )
        c = column + tl.arange(0, BLOCK_N)
        if BIASED:
            acc += tl.load(bias + c, mask=c < bias_width, other=0.0).to(tl.float32)[None, :]
        r = row + tl.arange(0, BLOCK_M)
        start = visited_chunk(visit, rank, world, RING) * rows
        at = out + ((start + r).to(tl.int64) * out_stride)[:, None] + c[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (c < width)[None, :])


def gather_matmul(
    outs: Sequence[Tensor],
    local: Tensor,
    gathered: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    rank: int,
    world: int,
    order: Order = "ring",
    pieces: int = 1,
    words: Tensor | None,
    epoch: Tensor | None,
    aborted: Tensor | None,
    control: Tensor | None,
    timeout_s: float = 600.0,
    tag: int = 0,
    config: TileConfig | None = None,
) -> None:
    """``outs[i] = all_gather(x) @ weights[i].T + biases[i]``, chunk by chunk as ``words`` say that they are there.

    Products and sums are fp32, rounded once to the outputs' dtype; fp32 operands are not rounded to TF32.

    Args:
        outs: 1 to 3 outputs [world * rows, n_i] with contiguous rows, each of any served dtype, in the ranks' order.
        local: [rows, K], this rank's chunk, contiguous rows; bfloat16, float16 or float32.  Never waited for.
        gathered: [world - 1, rows, K], contiguous rows: the others' chunks in the order of visiting; None for one rank.
        weights: [n_i, K] of the dtype of ``local``, all with contiguous rows or all with contiguous columns.
        biases: [n_i] or None, each.
        rank, world: this rank and the number of ranks.
        order: ``"ring"`` visits rank, rank + 1, ... (modulo world); ``"sequence"`` visits rank, then 0, 1, ...
        pieces: parts of a chunk that arrive one after another, 1 to 255; piece p has rows
            ``rows * p // pieces`` to ``rows * (p + 1) // pieces``.
        words: int32 [world - 1]; word i counts the pieces of ``gathered[i]`` that are there: it reaches
            ``epoch * 256 + p + 1`` with piece p.
        epoch: int32 [1], local: the epoch in which ``words`` count, read when the kernel runs.
        aborted: int32 [1], local: once it is not zero no tile waits any more, and the outputs are worth nothing.
        control: int64 [1], local: address of the block of words by which host and device end waits (``cuda.Control``).
        timeout_s: seconds after which a wait for a word gives up: it writes what it waited for into that block and sets
            ``aborted``.
        tag: the block then says ``tag + i * pieces + p`` for piece p of ``gathered[i]``.
        config: tiles; by default the one that should be fastest.

    Raises:
        ValueError: an argument does not fit; the message names what was expected and what was given.
    """
    check_signals(rank, world, epoch, aborted, control, local)
    same_count(weights=weights, outs=outs, biases=biases)
    check_matrix("local", local, (None, None), local, dtype=True)
    chunks = check_chunks(local, gathered, world, pieces, words)
    rows, depth = local.shape
    for i, (out, weight, bias) in enumerate(zip(outs, weights, biases, strict=True)):
        check_matrix(f"weights[{i}]", weight, (None, depth), local, dtype=True)
        check_matrix(f"outs[{i}]", out, (world * rows, weight.shape[0]), local, dtype=False)
        check_bias(f"biases[{i}]", bias, weight.shape[0], local)
    a, far = matrix("local", local), matrix("gathered", chunks[0])
    operands, deep = weight_matrices("weights", weights)
    out_strides = tuple(matrix("outs", out).stride for out in outs)
    unused, no_table = local.new_empty(1, dtype=torch.int32), local.new_empty(1, dtype=torch.int64)
    widths = tuple(weight.shape[0] for weight in weights)
    problem = Problem(world, rows, widths, depth)
    describable = all(each.describable() for each in (a, far, *operands))
    config = choose("gather_matmul", config, problem, local, describable)
    arguments = {
        "outs": tuple(outs),
        "local": local,
        "gathered": chunks,
        "weights": tuple(weights),
        "biases": tuple(weight if bias is None else bias for bias, weight in zip(biases, weights, strict=True)),
        "words": unused if words is None else words,
        "epoch": unused if epoch is None else epoch,
        "aborted": unused if aborted is None else aborted,
        "control": no_table if control is None else control,
        "ticks": ticks(timeout_s),
        "tag": tag,
        "rows": rows,
        "depth": depth,
        "widths": widths,
        "bias_widths": tuple(0 if bias is None else bias.numel() for bias in biases),
        "local_stride": a.stride,
        "gathered_rows": chunks.stride(0) // far.stride if world > 1 else rows,
        "gathered_stride": far.stride,
        "weight_strides": tuple(operand.stride for operand in operands),
        "out_strides": out_strides,
        "rank": rank,
        "world": world,
        "pieces": pieces,
        "COUNT": len(weights),
        "RING": ring(order),
        "DEEP": deep,
        "BIASED": any(bias is not None for bias in biases),
    }
    kernel = gather_matmul_kernel
    if config.specialized:
        # Imported where it is launched: a Triton whose Gluon differs then costs this configuration alone.
        from odysseus_kernels.kernels.warp_specialized import gather_matmul_specialized_kernel

        kernel = gather_matmul_specialized_kernel
    launch(kernel, arguments, config, problem.tiles(config), local)
