"""What the kernels share on the device: waiting for words, loading and multiplying tiles, the order of tiles.

A word is an int32 that counts within an epoch: ``wanted = epoch * 256 + value``, and a word has reached it when their
difference, which wraps, is not negative.

Memory order.  A wait loads its word with acquire semantics at system scope in one thread, and a barrier of the program
follows, so that ordinary loads of all threads see what the word stands for.  Loads through descriptors go through the
asynchronous proxy, for which a proxy fence follows as well.

Every wait ends: when its time is over, or when the host says so, it gives up as the waits of ``csrc/cuda/wait.cuh`` do
and through the same block of words, so that the host reports both alike.  A word that is there costs no look at either.
"""

from __future__ import annotations

import time

import triton
import triton.language as tl

from odysseus_kernels._ext import CONTROL_WORDS
from odysseus_kernels.kernels.launch import TICK_NS, interpreted

__all__ = [
    "accumulate",
    "await_word",
    "clock",
    "described",
    "described_weight",
    "load_tile",
    "multiply",
    "release_word",
    "visited_chunk",
    "visited_tile",
]


_CODE = tl.constexpr(CONTROL_WORDS["code"])
_TAG = tl.constexpr(CONTROL_WORDS["tag"])
_EXPECTED = tl.constexpr(CONTROL_WORDS["expected"])
_SEEN = tl.constexpr(CONTROL_WORDS["seen"])
_CLAIMED = tl.constexpr(CONTROL_WORDS["claimed"])
_RECORDED = tl.constexpr(CONTROL_WORDS["recorded"])
_TIMED_OUT = tl.constexpr(1)
# Polls between two looks at the clock and at the host's word, which lies behind the bus: about every 50 microseconds.
_LOOK_EVERY = tl.constexpr(32)

if interpreted():

    def clock(WARP: tl.constexpr):
        """As below, of the host: the interpreter runs kernels as Python."""
        return (time.monotonic_ns() // TICK_NS + 2**31) % 2**32 - 2**31

else:

    @triton.jit
    def clock(WARP: tl.constexpr):
        """Ticks of 2**20 ns of the clock that all multiprocessors of a device share; int32, wraps around.

        Threads read it one by one and branch on it together: all take the latest that any of them saw; of one WARP by
        itself, what its first thread saw.
        """
        if WARP:
            return tl.inline_asm_elementwise(
                "{ .reg .u64 time; .reg .u32 own; mov.u64 time, %globaltimer; shr.u64 time, time, 20; "
                "cvt.u32.u64 own, time; shfl.sync.idx.b32 $0, own, 0, 31, 0xffffffff; }",
                "=r,r",
                [0],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            lanes = tl.arange(0, tl.extra.cuda.num_threads())
            times = tl.inline_asm_elementwise(
                "{ .reg .u64 time; mov.u64 time, %globaltimer; shr.u64 time, time, 20; cvt.u32.u64 $0, time; }",
                "=r,r",
                [lanes],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
            return tl.max(times, 0)


@triton.jit
def release_word(address, value, INTERPRETED: tl.constexpr, WARP: tl.constexpr = False):
    """Stores ``value`` in the int32 word at ``address`` (int64), in a peer's memory or the host's, after all that was
    acquired; ``WARP`` says that one warp, whichever, runs this by itself.

    A store rather than an exchange: a word has one writer, and not every link between GPUs carries atomics.
    """
    THREAD: tl.constexpr = "%laneid" if WARP else "%tid.x"
    if INTERPRETED:
        tl.atomic_xchg(address.to(tl.pointer_type(tl.int32)), value, sem="release", scope="sys")
    else:
        # Inline assembly runs on every thread.  The atomics before it, one thread's, end in a barrier of the program.
        tl.inline_asm_elementwise(
            "{ .reg .pred first; .reg .u32 thread; mov.u32 thread, " + THREAD + "; setp.eq.u32 first, thread, 0; "
            "@first st.release.sys.global.u32 [$1], $2; mov.u32 $0, $2; }",
            "=r,l,r",
            [address, value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def give_up(aborted, control, code, tag, wanted, seen, INTERPRETED: tl.constexpr, WARP: tl.constexpr):
    """Says which wait gave up, unless another one has, and ends all waits of the rank: ``wait.cuh``, in Triton."""
    address = tl.load(control)
    block = address.to(tl.pointer_type(tl.int32))
    # The scope of the device is enough: all waits of a rank run on it, and the host only reads.
    if tl.atomic_cas(block + _CLAIMED, 0, 1, sem="acq_rel", scope="gpu") == 0:
        tl.store(block + _CODE, code)
        tl.store(block + _TAG, tag)
        tl.store(block + _EXPECTED, wanted)
        tl.store(block + _SEEN, seen)
        tl.debug_barrier()
        release_word(address + 4 * _RECORDED, 1, INTERPRETED, WARP)
    tl.atomic_xchg(aborted, 1, sem="release", scope="gpu")


@triton.jit
def keep_waiting(word, wanted, aborted, control, ticks, tag, INTERPRETED: tl.constexpr, WARP: tl.constexpr):
    """The part of :func:`await_word` that a word which is there never comes to; returns whether it is still missing."""
    began = clock(WARP)
    seen = tl.atomic_add(word, 0, sem="acquire", scope="sys")
    waiting = (seen - wanted < 0) & (tl.atomic_add(aborted, 0, sem="acquire", scope="sys") == 0)
    code = 0
    polls = 0
    while waiting:
        if not INTERPRETED:
            # All programs may wait for one word: a pause keeps their polling out of the data's way.
            tl.inline_asm_elementwise(
                "nanosleep.u32 $1; mov.u32 $0, $1;", "=r,r", [64], dtype=tl.int32, is_pure=False, pack=1
            )
        seen = tl.atomic_add(word, 0, sem="acquire", scope="sys")
        waiting = (seen - wanted < 0) & (tl.atomic_add(aborted, 0, sem="acquire", scope="sys") == 0)
        polls += 1
        if waiting & (polls % _LOOK_EVERY == 0):
            # The block's first word is the host's, zero unless it ends the waits.
            code = tl.atomic_add(tl.load(control).to(tl.pointer_type(tl.int32)), 0, sem="acquire", scope="sys")
            late = clock(WARP) - began >= ticks
            code = tl.where((code == 0) & late, _TIMED_OUT, code)
            waiting = code == 0
    if code != 0:
        # A peer may have signalled, and ended in order, between the two looks.
        seen = tl.atomic_add(word, 0, sem="acquire", scope="sys")
        if seen - wanted < 0:
            give_up(aborted, control, code, tag, wanted, seen, INTERPRETED, WARP)
    return seen - wanted < 0


@triton.jit
def await_word(
    word,
    wanted,
    aborted,
    control,
    ticks,
    tag,
    ASYNC: tl.constexpr,
    INTERPRETED: tl.constexpr,
    WARP: tl.constexpr = False,
):
    """Returns whether the word has reached ``wanted``: at once if it has, else as soon as it has or the wait is over.

    A wait is over when ``aborted`` is set; when the host's word is, within about 50 microseconds; and after ``ticks``.
    In the last two cases it writes into the host's block which wait that was, and sets ``aborted``.

    Args:
        word, aborted: pointers to int32.
        wanted: int32.
        control: pointer to int64, the address of the block that host and device share.
        ticks: of :func:`clock`, from the first look at a word that was not there.
        tag: number by which the host knows what is waited for.
        ASYNC: descriptors read what the word stands for.
        WARP: one warp of the program waits by itself.
    """
    missing = tl.atomic_add(word, 0, sem="acquire", scope="sys") - wanted < 0
    if missing:
        missing = keep_waiting(word, wanted, aborted, control, ticks, tag, INTERPRETED, WARP)
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
