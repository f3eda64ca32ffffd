"""What the kernels share on the device: waiting for words, loading and multiplying tiles, the order of tiles.

A word is an int32 that counts within an epoch: ``wanted = epoch * 256 + value``, and a word has reached it when their
difference, which wraps, is not negative.

Memory order.  A wait loads its word with acquire semantics at system scope in one thread, and a barrier of the program
follows, so that ordinary loads of all threads see what the word stands for.  Loads through descriptors go through the
asynchronous proxy, for which a proxy fence follows as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "accumulate",
    "await_word",
    "described",
    "described_weight",
    "load_tile",
    "multiply",
    "visited_chunk",
    "visited_tile",
]


@triton.jit
def await_word(word, wanted, aborted, ASYNC: tl.constexpr, INTERPRETED: tl.constexpr):
    """Returns whether the word has reached ``wanted``: at once if it has, else as soon as it has or ``aborted`` is set.

    Args:
        word, aborted: pointers to int32.
        ASYNC: descriptors read what the word stands for.
    """
    missing = tl.atomic_add(word, 0, sem="acquire", scope="sys") - wanted < 0
    waiting = missing & (tl.atomic_add(aborted, 0, sem="acquire", scope="sys") == 0)
    while waiting:
        if not INTERPRETED:
            # All programs may wait for one word: a pause keeps their polling out of the data's way.
            tl.inline_asm_elementwise(
                "nanosleep.u32 $1; mov.u32 $0, $1;", "=r,r", [64], dtype=tl.int32, is_pure=False, pack=1
            )
        missing = tl.atomic_add(word, 0, sem="acquire", scope="sys") - wanted < 0
        waiting = missing & (tl.atomic_add(aborted, 0, sem="acquire", scope="sys") == 0)
    if ASYNC and not INTERPRETED:
        tl.inline_asm_elementwise(
            "fence.proxy.async.global; mov.u32 $0, $1;", "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1
        )
    return missing == 0


@triton.jit
def visited_tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a chunk's tile: ``GROUP`` rows of tiles at a time, so that their operands stay in L2."""
    per_group = GROUP * tiles_n
    first = tile // per_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + tile % per_group % height, tile % per_group // height


@triton.jit
def load_tile(
    source, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """Tile [ROWS, COLUMNS] at (row, column) of a matrix [rows, columns] with contiguous rows; zeros outside of it."""
    if DESCRIPTORS:
        tile = source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        tile = tl.load(source + (r.to(tl.int64) * stride)[:, None] + c[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def multiply(a, b, acc, INTERPRETED: tl.constexpr):
    """``acc + a @ b`` in fp32; fp32 operands are not rounded to TF32."""
    if INTERPRETED:
        # The interpreter holds bfloat16 as bits, and would multiply those.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def accumulate(
    acc,
    a,
    a_row,
    a_rows,
    a_stride,
    b,
    b_row,
    b_rows,
    b_stride,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEEP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``acc + a[a_row:] @ b[b_row:].T`` over the whole depth; b is [b_rows, depth], or [depth, b_rows] if DEEP."""
    for k in range(0, depth, BLOCK_K):
        x = load_tile(a, a_row, k, a_rows, depth, a_stride, BLOCK_M, BLOCK_K, DESCRIPTORS)
        if DEEP:
            w = load_tile(b, k, b_row, depth, b_rows, b_stride, BLOCK_K, BLOCK_N, DESCRIPTORS)
        else:
            w = load_tile(b, b_row, k, b_rows, depth, b_stride, BLOCK_N, BLOCK_K, DESCRIPTORS).T
        acc = multiply(x, w, acc, INTERPRETED)
    return acc


@triton.jit
def described(data, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """What :func:`load_tile` takes for a matrix: a descriptor for tiles [ROWS, COLUMNS], or the pointer itself."""
    source = data
    if DESCRIPTORS:
        source = tl.make_tensor_descriptor(data, [rows, columns], [stride, 1], [ROWS, COLUMNS])
    return source


@triton.jit
def described_weight(
    data,
    width,
    depth,
    stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEEP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The same for the second operand of :func:`accumulate`."""
    if DEEP:
        return described(data, depth, width, stride, BLOCK_K, BLOCK_N, DESCRIPTORS)
    else:
        return described(data, width, depth, stride, BLOCK_N, BLOCK_K, DESCRIPTORS)


@triton.jit
def visited_chunk(visit, rank, world, RING: tl.constexpr):
    """The rank whose chunk is visited after ``visit`` others, the local one (visit 0) being the first."""
    if RING:
        return (rank + visit) % world
    else:
        # The others in the order of the sequence.
        return tl.where(visit == 0, rank, tl.where(visit <= rank, visit - 1, visit))
