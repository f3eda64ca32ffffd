"""``grads.T @ all_gather(x)`` as one persistent kernel that adds chunks up in registers as they arrive.

Streams: as in :mod:`gather_matmul`.  A tile of the gradient is rounded once, after the last chunk; all programs meet
the chunks in the same order, the local one first.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from odysseus_kernels.kernels.configs import Problem, TileConfig
from odysseus_kernels.kernels.launch import (
    Order,
    check_chunks,
    check_matrix,
    check_signals,
    choose,
    expect,
    launch,
    matrix,
    ring,
    ticks,
)
from odysseus_kernels.kernels.tiles import await_word, described, load_tile, multiply, visited_chunk, visited_tile

__all__ = ["weight_gradient", "weight_gradient_kernel"]


# Ranks run one binary: the numbers are not compiled in, nor whether an address of words, which differs from window to
# window, is a multiple of 16.
@triton.jit(
    do_not_specialize=["rank", "world", "pieces", "ticks", "tag"],
    do_not_specialize_on_alignment=["words", "epoch", "aborted", "control"],
)
def weight_gradient_kernel(
    out,
    grads,
    local,
    gathered,
    words,
    epoch,
    aborted,
    control,
    ticks,
    tag,
    rows,
    height,
    width,
    grads_stride,
    local_stride,
    gathered_rows,
    gathered_stride,
    out_row_stride,
    out_column_stride,
    rank,
    world,
    pieces,
    RING: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """See :func:`weight_gradient`; ``out`` is [height, width], ``grads`` has ``height`` columns."""
    tiles_m = tl.cdiv(height, BLOCK_M)
    tiles_n = tl.cdiv(width, BLOCK_N)
    base = tl.load(epoch) * 256
    a = described(grads, world * rows, height, grads_stride, BLOCK_K, BLOCK_M, DESCRIPTORS)
    gathered_end = tl.maximum(world - 2, 0) * gathered_rows + rows
    here = described(local, rows, width, local_stride, BLOCK_K, BLOCK_N, DESCRIPTORS)
    there = described(gathered, gathered_end, width, gathered_stride, BLOCK_K, BLOCK_N, DESCRIPTORS)
    seen = 0
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = visited_tile(tile, tiles_m, tiles_n, GROUP)
        i = tile_m * BLOCK_M
        j = tile_n * BLOCK_N
        if ADD:
            # Before the products: afterwards, registers would have to hold two tiles.
            p = i + tl.arange(0, BLOCK_M)
            q = j + tl.arange(0, BLOCK_N)
            at = (out + q.to(tl.int64) * out_column_stride)[None, :] + (p.to(tl.int64) * out_row_stride)[:, None]
            acc = tl.load(at, mask=(q < width)[None, :] & (p < height)[:, None], other=0.0)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for visit in range(world):
            b, before, b_stride = here, 0, local_stride
            if visit > 0:
                if visit > seen:
                    which = tag + visit * pieces - 1
                    await_word(
                        words + visit - 1, base + pieces, aborted, control, ticks, which, DESCRIPTORS, INTERPRETED
                    )
                    seen = visit
                b, before, b_stride = there, (visit - 1) * gathered_rows, gathered_stride
            start = visited_chunk(visit, rank, world, RING) * rows
            for k in range(0, rows, BLOCK_K):
                g = load_tile(a, start + k, i, start + rows, height, grads_stride, BLOCK_K, BLOCK_M, DESCRIPTORS)
                x = load_tile(b, before + k, j, before + rows, width, b_stride, BLOCK_K, BLOCK_N, DESCRIPTORS)
                acc = multiply(g.T, x, acc, INTERPRETED)
        # Not the expressions above: the compiler would keep a tile of addresses in registers meanwhile.
        p = i + tl.arange(0, BLOCK_M)
        q = j + tl.arange(0, BLOCK_N)
        at = (out + p.to(tl.int64) * out_row_stride)[:, None] + (q.to(tl.int64) * out_column_stride)[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=(p < height)[:, None] & (q < width)[None, :])


def weight_gradient(
    out: Tensor,
    grads: Tensor,
    local: Tensor,
    gathered: Tensor | None,
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
    accumulate: bool = False,
    config: TileConfig | None = None,
) -> None:
    """``out = grads.T @ all_gather(x)``, summed in fp32 over the chunks as ``words`` say that they are there.

    Where the gradients arrive in chunks and the input is local (:func:`linear_reduce_scatter`), swap the two and give
    the output transposed: ``weight_gradient(out.T, x, dy_local, dy_gathered, ...)``.

    Args:
        out: [n, K], contiguous rows or contiguous columns; any served dtype.
        grads: [world * rows, n] in the ranks' order, contiguous rows; bfloat16, float16 or float32.
        local: [rows, K] of the same dtype, this rank's chunk, contiguous rows.  Never waited for.
        gathered: [world - 1, rows, K], contiguous rows: the others' chunks in the order of visiting; None for one rank.
        rank, world: this rank and the number of ranks.
        order: ``"ring"`` visits rank, rank + 1, ... (modulo world); ``"sequence"`` visits rank, then 0, 1, ...
        pieces: what a word reaches when the last piece of its chunk is there, 1 to 255.
        words: int32 [world - 1]: word i reaches ``epoch * 256 + pieces`` when ``gathered[i]`` is there.
        epoch: int32 [1], local: the epoch in which ``words`` count, read when the kernel runs.
        aborted: int32 [1], local: once it is not zero nothing waits any more, and the output is worth nothing.
        control: int64 [1], local: address of the block of words by which host and device end waits (``cuda.Control``).
        timeout_s: seconds after which a wait for a word gives up: it writes what it waited for into that block and sets
            ``aborted``.
        tag: the block then says ``tag + i * pieces + pieces - 1`` for ``gathered[i]``.
        accumulate: add to ``out``, which is then float32, instead of overwriting it.  With ``world=1`` (and None for
            gathered, words, epoch, aborted and control) this takes chunks one by one.
        config: tiles; by default the one that should be fastest.

    Raises:
        ValueError: an argument does not fit; the message names what was expected and what was given.
    """
    check_matrix("local", local, (None, None), local, dtype=True)
    check_signals(rank, world, epoch, aborted, control, local)
    chunks = check_chunks(local, gathered, world, pieces, words)
    rows, width = local.shape
    check_matrix("grads", grads, (world * rows, None), local, dtype=True)
    height = grads.shape[1]
    check_matrix("out", out, (height, width), local, dtype=False)
    expect(not accumulate or out.dtype == torch.float32, "out", "torch.float32 to accumulate into", out.dtype)
    result = matrix("out", out, columns_first=True)
    a, b, far = matrix("grads", grads), matrix("local", local), matrix("gathered", chunks[0])
    problem = Problem(1, height, (width,), world * rows)
    describable = all(each.describable() for each in (a, b, far))
    config = choose("weight_gradient", config, problem, local, describable)
    if config.descriptors and world > 1 and rows % config.block_k:
        # Past the end of a chunk a descriptor would read the next one, whose products belong to other rows.
        config = dataclasses.replace(config, descriptors=False)
    unused, no_table = local.new_empty(1, dtype=torch.int32), local.new_empty(1, dtype=torch.int64)
    arguments = {
        "out": out,
        "grads": grads,
        "local": local,
        "gathered": chunks,
        "words": unused if words is None else words,
        "epoch": unused if epoch is None else epoch,
        "aborted": unused if aborted is None else aborted,
        "control": no_table if control is None else control,
        "ticks": ticks(timeout_s),
        "tag": tag,
        "rows": rows,
        "height": height,
        "width": width,
        "grads_stride": a.stride,
        "local_stride": b.stride,
        "gathered_rows": chunks.stride(0) // far.stride if world > 1 else rows,
        "gathered_stride": far.stride,
        "out_row_stride": 1 if result.columns_first else result.stride,
        "out_column_stride": result.stride if result.columns_first else 1,
        "rank": rank,
        "world": world,
        "pieces": pieces,
        "RING": ring(order),
        "ADD": accumulate,
    }
    launch(weight_gradient_kernel, arguments, config, problem.tiles(config), local)
