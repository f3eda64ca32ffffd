"""``reduce_scatter(x @ weight.T) + bias`` as one persistent kernel that stores into the owners' receive slots.

Streams: the kernel runs on the caller's stream.  It writes into other ranks' memory, whose owners may read a slot as
soon as its word has arrived, while this kernel still works on other targets, and add the parts up themselves.

Memory order: each program stores a tile, meets at a barrier and counts the tile with release semantics at system
scope; the program that counts a target's last tile has thereby acquired all others' stores, and releases the word.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from odysseus_kernels.kernels.configs import Problem, TileConfig
from odysseus_kernels.kernels.launch import (
    check_bias,
    check_matrix,
    check_signals,
    check_words,
    choose,
    expect,
    launch,
    matrix,
    same_count,
    ticks,
    weight_matrices,
)
from odysseus_kernels.kernels.tiles import (
    accumulate,
    await_word,
    described,
    described_weight,
    release_word,
    visited_tile,
)

__all__ = ["matmul_scatter", "matmul_scatter_kernel"]


# Ranks run one binary: the numbers are not compiled in, nor whether an address of words, which differs from window to
# window, is a multiple of 16.
@triton.jit(
    do_not_specialize=["rank", "world", "credit_value", "arrived_value", "ticks", "tag"],
    do_not_specialize_on_alignment=["epoch", "aborted", "control", "counters"],
)
def matmul_scatter_kernel(
    own,
    xs,
    weights,
    bias,
    slots,
    credits,
    arrived,
    counters,
    epoch,
    aborted,
    control,
    ticks,
    tag,
    rows,
    width,
    depths,
    x_strides,
    weight_strides,
    own_stride,
    rank,
    world,
    credit_value,
    arrived_value,
    COUNT: tl.constexpr,
    DEEP: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """See :func:`matmul_scatter`."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(width, BLOCK_N)
    tiles = tiles_m * tiles_n
    total = world * rows
    a0 = described(xs[0], total, depths[0], x_strides[0], BLOCK_M, BLOCK_K, DESCRIPTORS)
    b0 = described_weight(weights[0], width, depths[0], weight_strides[0], BLOCK_N, BLOCK_K, DEEP, DESCRIPTORS)
    a1, b1, a2, b2 = a0, b0, a0, b0
    if COUNT > 1:
        a1 = described(xs[1], total, depths[1], x_strides[1], BLOCK_M, BLOCK_K, DESCRIPTORS)
        b1 = described_weight(weights[1], width, depths[1], weight_strides[1], BLOCK_N, BLOCK_K, DEEP, DESCRIPTORS)
    if COUNT > 2:
        a2 = described(xs[2], total, depths[2], x_strides[2], BLOCK_M, BLOCK_K, DESCRIPTORS)
        b2 = described_weight(weights[2], width, depths[2], weight_strides[2], BLOCK_N, BLOCK_K, DEEP, DESCRIPTORS)
    base = tl.load(epoch) * 256
    # The last target whose credit this program asked for, and whether it was granted.
    asked = -1
    granted = 1
    for tile in range(tl.program_id(0), world * tiles, tl.num_programs(0)):
        visit = tile // tiles
        target = (rank + 1 + visit) % world
        remote = visit < world - 1
        tile_m, tile_n = visited_tile(tile % tiles, tiles_m, tiles_n, GROUP)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        a_row = target * rows + row
        a_rows = target * rows + rows
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = accumulate(
            acc,
            a0,
            a_row,
            a_rows,
            x_strides[0],
            b0,
            column,
            width,
            weight_strides[0],
            depths[0],
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DEEP,
            DESCRIPTORS,
            INTERPRETED,
        )
        if COUNT > 1:
            acc = accumulate(
                acc,
                a1,
                a_row,
                a_rows,
                x_strides[1],
                b1,
                column,
                width,
                weight_strides[1],
                depths[1],
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                DEEP,
                DESCRIPTORS,
                INTERPRETED,
            )
        if COUNT > 2:
            acc = accumulate(
                acc,
                a2,
                a_row,
                a_rows,
                x_strides[2],
                b2,
                column,
                width,
                weight_strides[2],
                depths[2],
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                DEEP,
                DESCRIPTORS,
                INTERPRETED,
            )
        r = row + tl.arange(0, BLOCK_M)
        c = column + tl.arange(0, BLOCK_N)
        if BIASED:
            acc += tl.load(bias + c, mask=(c < width) & (visit == world - 1), other=0.0).to(tl.float32)[None, :]
        place, stride, open_ = own, own_stride, 1
        if remote:
            if visit > asked:
                credit = tl.load(credits + target).to(tl.pointer_type(tl.int32))
                wanted = base + credit_value
                granted = await_word(credit, wanted, aborted, control, ticks, tag + visit, False, INTERPRETED).to(
                    tl.int32
                )
                asked = visit
            # Addresses of slots are multiples of 16, as the launching function's contract says.
            place = tl.multiple_of(tl.load(slots + target).to(own.dtype), 16)
            stride = width
            # Without a credit the owner may still be reading.
            open_ = granted
        at = place + (r.to(tl.int64) * stride)[:, None] + c[None, :]
        tl.store(at, acc.to(own.dtype.element_ty), mask=(r < rows)[:, None] & (c < width)[None, :] & (open_ != 0))
        if remote:
            # Triton's atomics are issued by one thread: the others' stores come first only through a barrier.
            tl.debug_barrier()
            done = tl.atomic_add(counters + target, 1, sem="acq_rel", scope="sys")
            if done == tiles - 1:
                tl.atomic_xchg(counters + target, 0, sem="relaxed", scope="gpu")
                if tl.atomic_add(aborted, 0, sem="acquire", scope="sys") == 0:
                    release_word(tl.load(arrived + target), base + arrived_value, INTERPRETED)


def matmul_scatter(
    own: Tensor,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    slots: Tensor | None,
    *,
    rank: int,
    world: int,
    credits: Tensor | None,
    credit_value: int,
    arrived: Tensor | None,
    arrived_value: int,
    counters: Tensor | None,
    epoch: Tensor | None,
    aborted: Tensor | None,
    control: Tensor | None,
    timeout_s: float = 600.0,
    tag: int = 0,
    config: TileConfig | None = None,
) -> None:
    """This rank's parts of ``reduce_scatter(sum of xs[i] @ weights[i].T) + bias``, each stored at its owner.

    Targets are rank + 1, rank + 2, ... (modulo world) and this rank last.  Products and sums are fp32, rounded once to
    the dtype of ``own``; fp32 operands are not rounded to TF32.  ``epoch * 256 + value`` is what words are compared
    with and set to.  Once ``aborted`` is not zero, no tile waits any more, nothing is stored where no credit was given,
    and no word is set.

    Args:
        own: [rows, n], contiguous rows, any served dtype: receives this rank's part for itself, with the bias.
        xs: 1 to 3 operands [world * rows, K_i], contiguous rows, in the ranks' order; bfloat16, float16 or float32.
        weights: [n, K_i] of the dtype of ``xs``, all with contiguous rows or all with contiguous columns.
        bias: [n] or None; added to ``own`` only.
        slots: int64 [world]: where the part for each target goes, contiguous [rows, n] of the dtype of ``own``, in the
            target's memory as this device addresses it; multiples of 16 bytes.  That of this rank is not used.
        rank, world: this rank and the number of ranks.  For one rank, slots, credits, arrived, counters, epoch,
            aborted and control may be None.
        credits: int64 [world]: for each target the address of an int32 word in local memory.  A target's slot is
            written once it has reached ``credit_value``, which may be negative: an earlier epoch.
        arrived: int64 [world]: for each target the address of the int32 word, in its memory, that is set to
            ``arrived_value`` once all of its part is stored.
        counters: int32 [world], local, zeros; zeros again when the kernel is over.  Not shared by concurrent calls.
        epoch: int32 [1], local: the epoch in which words count, read when the kernel runs.
        aborted: int32 [1], local.
        control: int64 [1], local: address of the block of words by which host and device end waits (``cuda.Control``).
        timeout_s: seconds after which a wait for a word gives up: it writes what it waited for into that block and sets
            ``aborted``.
        tag: the block then says ``tag + i`` for the i-th target, which is rank + 1 + i.
        config: tiles; by default the one that should be fastest.

    Raises:
        ValueError: an argument does not fit; the message names what was expected and what was given.
    """
    same_count(xs=xs, weights=weights)
    check_matrix("own", own, (None, None), own, dtype=False)
    rows, width = own.shape
    for i, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        check_matrix(f"xs[{i}]", x, (world * rows, None), xs[0], dtype=True)
        check_matrix(f"weights[{i}]", weight, (width, x.shape[1]), xs[0], dtype=True)
    check_signals(rank, world, epoch, aborted, control, xs[0])
    check_matrix("own", own, (None, None), xs[0], dtype=False)
    check_bias("bias", bias, width, own)
    if world > 1:
        for name, table in (("slots", slots), ("credits", credits), ("arrived", arrived)):
            check_words(name, table, torch.int64, world, own)
        check_words("counters", counters, torch.int32, world, own)
    for name, value in (("credit_value", credit_value), ("arrived_value", arrived_value)):
        expect(-256 < value < 256, name, "-255 to 255", value)
    a = [matrix(f"xs[{i}]", x) for i, x in enumerate(xs)]
    operands, deep = weight_matrices("weights", weights)
    problem = Problem(world, rows, (width,), sum(x.shape[1] for x in xs))
    describable = all(each.describable() for each in (*a, *operands))
    config = choose("matmul_scatter", config, problem, xs[0], describable)
    unused = own.new_empty(1, dtype=torch.int32)
    no_table = own.new_empty(1, dtype=torch.int64)
    arguments = {
        "own": own,
        "xs": tuple(xs),
        "weights": tuple(weights),
        "bias": own if bias is None else bias,
        "slots": no_table if slots is None else slots,
        "credits": no_table if credits is None else credits,
        "arrived": no_table if arrived is None else arrived,
        "counters": unused if counters is None else counters,
        "epoch": unused if epoch is None else epoch,
        "aborted": unused if aborted is None else aborted,
        "control": no_table if control is None else control,
        "ticks": ticks(timeout_s),
        "tag": tag,
        "rows": rows,
        "width": width,
        "depths": tuple(x.shape[1] for x in xs),
        "x_strides": tuple(each.stride for each in a),
        "weight_strides": tuple(operand.stride for operand in operands),
        "own_stride": matrix("own", own).stride,
        "rank": rank,
        "world": world,
        "credit_value": credit_value,
        "arrived_value": arrived_value,
        "COUNT": len(xs),
        "DEEP": deep,
        "BIASED": bias is not None,
    }
    launch(matmul_scatter_kernel, arguments, config, problem.tiles(config), own)
