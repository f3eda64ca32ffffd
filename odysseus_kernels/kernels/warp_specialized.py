"""The product of :mod:`gather_matmul` on Hopper by warps that do one thing each (Gluon, sm_90).

A program has three kinds of warps.  One warp loads: it waits for chunks, and fills a ring of stages in shared memory
through descriptors, on into the next tiles while this one is stored.  Two groups of four warps multiply from the ring
and store.  They share the rows of a tile (``cooperative``: each stage is read twice, and traffic is that of the large
tile), or take turns at whole tiles (``pingpong``: one stores while the other multiplies).

The ring.  A stage has two barriers in shared memory: ``full`` completes when its bytes are there, ``empty`` when all
groups that read it are done.  Stage ``i`` of all that are ever filled lies in slot ``i % STAGES``, in whose phase
``i // STAGES``, so both sides know from the number alone which phase to wait for.  Groups that take turns read it
one after the other; ``passed`` says that one has issued all its products.  Only the loading warp waits for other
ranks, and within bounds; all other waits are for it, or it waits for them, so that they end when it does.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from odysseus_kernels.kernels.tiles import await_word, visited_chunk, visited_tile

__all__ = ["gather_matmul_specialized_kernel"]

# Registers of a thread once each kind of warp has its own share: loading needs few, and what it leaves the others have.
_LOADING_REGISTERS = gl.constexpr(40)
_MULTIPLYING_REGISTERS = gl.constexpr(216)


@gluon.constexpr_function
def stored_layout(rows, columns, bits):
    """Where elements of an accumulator [rows, columns] are when they are stored: 16 bytes of a row in each thread.

    The same warp has them as in wgmma's layout, so that its threads exchange them among themselves: by shuffles, or
    through 512 bytes of shared memory, which the stages fill, and never behind a barrier.  Four threads write 64 bytes
    of a row: whole sectors.
    """
    vector = 128 // bits
    registers = [[0, 1 << i] for i in range(vector.bit_length() - 1)]
    lanes = [[0, vector], [0, 2 * vector], [1, 0], [2, 0], [4, 0]]
    registers.append([8, 0])
    column = 4 * vector
    while column < columns:
        registers.append([0, column])
        column *= 2
    row = 64
    while row < rows:
        registers.append([row, 0])
        row *= 2
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [rows, columns])


@gluon.jit
def described_weight(data, width, depth, stride, DEEP: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Descriptor of a weight [width, depth] for tiles of shape ``SHAPE``; of [depth, width] if DEEP."""
    if DEEP:
        return tma.make_tensor_descriptor(data, [depth, width], [stride, 1], SHAPE, LAYOUT)
    else:
        return tma.make_tensor_descriptor(data, [width, depth], [stride, 1], SHAPE, LAYOUT)


@gluon.jit
def tiles_across(widths, COUNT: gl.constexpr, BLOCK_N: gl.constexpr):
    """The columns of tiles before the second weight's, before the third's, and in all: a tile has one weight's."""
    second = gl.cdiv(widths[0], BLOCK_N)
    third = second
    every = second
    if COUNT > 1:
        third = second + gl.cdiv(widths[1], BLOCK_N)
        every = third
    if COUNT > 2:
        every = third + gl.cdiv(widths[2], BLOCK_N)
    return second, third, every


@gluon.jit
def load_stages(
    descriptors,
    stages,
    signals,
    sizes,
    widths,
    GROUP: gl.constexpr,
    COUNT: gl.constexpr,
    DEEP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
):
    """The loading warp: waits for the chunk of each tile, and fills stage after stage."""
    here, there, b0, b1, b2 = descriptors
    a_stages, b_stages, full, empty, _ = stages
    words, epoch, aborted, control, ticks, tag, pieces = signals
    rows, depth, gathered_rows, world = sizes
    PART_M: gl.constexpr = BLOCK_M // PARTS
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K * a_stages.dtype.primitive_bitwidth // 8
    tiles_m = gl.cdiv(rows, BLOCK_M)
    second, third, tiles_n = tiles_across(widths, COUNT, BLOCK_N)
    tiles = tiles_m * tiles_n
    base = gl.load(epoch) * 256
    # Chunk and piece that this program has seen, in one number: a tile that needs no more than that does not poll.
    seen = 255
    stage = 0
    for tile in range(gl.program_id(0), world * tiles, gl.num_programs(0)):
        visit = tile // tiles
        tile_m, tile_n = visited_tile(tile % tiles, tiles_m, tiles_n, GROUP)
        row = tile_m * BLOCK_M
        a, a_row = here, row
        if visit > 0:
            needed = gl.cdiv(gl.minimum(row + BLOCK_M, rows) * pieces, rows)
            if visit * 256 + needed > seen:
                which = tag + (visit - 1) * pieces + needed - 1
                await_word(words + visit - 1, base + needed, aborted, control, ticks, which, True, False, True)
                seen = visit * 256 + needed
            a, a_row = there, (visit - 1) * gathered_rows + row
        b = b0
        if COUNT > 1:  # noqa: SIM102
            if tile_n >= second:
                tile_n -= second
                b = b1
                if COUNT > 2:  # noqa: SIM102
                    if tile_n >= third - second:
                        tile_n -= third - second
                        b = b2
        column = tile_n * BLOCK_N
        for k in range(0, depth, BLOCK_K):
            slot = stage % STAGES
            arriving = full.index(slot)
            # Slots begin empty: of a barrier that was never used the phase before the first one counts as complete.
            mbarrier.wait(empty.index(slot), (stage // STAGES & 1) ^ 1)
            mbarrier.expect(arriving, BYTES)
            for part in gl.static_range(PARTS):
                at = [a_row + part * PART_M, k]
                tma.async_copy_global_to_shared(a, at, arriving, a_stages.index(slot * PARTS + part))
            if DEEP:
                tma.async_copy_global_to_shared(b, [k, column], arriving, b_stages.index(slot))
            else:
                tma.async_copy_global_to_shared(b, [column, k], arriving, b_stages.index(slot))
            stage += 1


@gluon.jit
def multiply_stages(
    PART: gl.constexpr,
    stages,
    results,
    sizes,
    widths,
    GROUP: gl.constexpr,
    COUNT: gl.constexpr,
    RING: gl.constexpr,
    DEEP: gl.constexpr,
    BIASED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
):
    """Group ``PART`` of the multiplying warps: its rows of every tile, or all rows of every second one."""
    a_stages, b_stages, full, empty, passed = stages
    outs, out_strides, biases, bias_widths = results
    rows, depth, rank, world = sizes
    TURNS: gl.constexpr = 3 - PARTS
    PART_M: gl.constexpr = BLOCK_M // PARTS
    MADE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    tiles_m = gl.cdiv(rows, BLOCK_M)
    second, third, tiles_n = tiles_across(widths, COUNT, BLOCK_N)
    tiles = tiles_m * tiles_n
    blocks = gl.cdiv(depth, BLOCK_K)
    programs = gl.num_programs(0)
    turn = PART % TURNS
    stage = turn * blocks
    done = 0
    for tile in range(gl.program_id(0) + turn * programs, world * tiles, TURNS * programs):
        acc = gl.zeros([PART_M, BLOCK_N], gl.float32, MADE)
        if TURNS == 2:
            # The groups pass the ring in turn.  A phase is known by its parity: a group that ran ahead by one would
            # take the phase before the last for the one that it waits for.
            mbarrier.wait(passed.index(1 - PART), (done + 1 - PART) & 1)
            done += 1
        for block in range(blocks):
            slot = stage % STAGES
            mbarrier.wait(full.index(slot), stage // STAGES & 1)
            x = a_stages.index(slot * PARTS + PART % PARTS)
            w = b_stages.index(slot)
            if not DEEP:
                w = w.permute((1, 0))
            acc = warpgroup_mma(x, w, acc, is_async=True)
            # One product stays in flight; the one before it is done with its stage.
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1, pred=block > 0)
            stage += 1
        if TURNS == 2:
            mbarrier.arrive(passed.index(PART), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)
        stage += (TURNS - 1) * blocks

        visit = tile // tiles
        tile_m, tile_n = visited_tile(tile % tiles, tiles_m, tiles_n, GROUP)
        out, bias = outs[0], biases[0]
        width, bias_width, out_stride = widths[0], bias_widths[0], out_strides[0]
        if COUNT > 1:  # noqa: SIM102
            if tile_n >= second:
                tile_n -= second
                out, bias = outs[1], biases[1]
                width, bias_width, out_stride = widths[1], bias_widths[1], out_strides[1]
                if COUNT > 2:  # noqa: SIM102
                    if tile_n >= third - second:
                        tile_n -= third - second
                        out, bias = outs[2], biases[2]
                        width, bias_width, out_stride = widths[2], bias_widths[2], out_strides[2]
        column = tile_n * BLOCK_N
        if BIASED:
            c = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, MADE))
            acc += gl.load(bias + c, mask=c < bias_width, other=0.0).to(gl.float32)[None, :]
        TYPE: gl.constexpr = out.dtype.element_ty
        STORED: gl.constexpr = stored_layout(PART_M, BLOCK_N, TYPE.primitive_bitwidth)
        result = gl.convert_layout(acc.to(TYPE), STORED)
        r = tile_m * BLOCK_M + PART % PARTS * PART_M + gl.arange(0, PART_M, gl.SliceLayout(1, STORED))
        c = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, STORED))
        start = visited_chunk(visit, rank, world, RING) * rows
        at = out + ((start + r).to(gl.int64) * out_stride)[:, None] + c[None, :]
        gl.store(at, result, mask=(r < rows)[:, None] & (c < width)[None, :])


@gluon.jit(
    do_not_specialize=["rank", "world", "pieces", "ticks", "tag"],
    do_not_specialize_on_alignment=["words", "epoch", "aborted", "control"],
)
def gather_matmul_specialized_kernel(
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
    COUNT: gl.constexpr,
    RING: gl.constexpr,
    DEEP: gl.constexpr,
    BIASED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
):
    """See :func:`odysseus_kernels.kernels.gather_matmul.gather_matmul`; arguments as of its own kernel.

    ``PARTS`` is 2 where the groups of multiplying warps share a tile, and 1 where they take turns.
    """
    TYPE: gl.constexpr = local.dtype.element_ty
    A_SHAPE: gl.constexpr = [BLOCK_M // PARTS, BLOCK_K]
    B_SHAPE: gl.constexpr = [BLOCK_K, BLOCK_N] if DEEP else [BLOCK_N, BLOCK_K]
    A_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(A_SHAPE, TYPE)
    B_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(B_SHAPE, TYPE)
    gathered_end = gl.maximum(world - 2, 0) * gathered_rows + rows
    here = tma.make_tensor_descriptor(local, [rows, depth], [local_stride, 1], A_SHAPE, A_LAYOUT)
    there = tma.make_tensor_descriptor(gathered, [gathered_end, depth], [gathered_stride, 1], A_SHAPE, A_LAYOUT)
    b0 = described_weight(weights[0], widths[0], depth, weight_strides[0], DEEP, B_SHAPE, B_LAYOUT)
    b1 = b0
    b2 = b0
    if COUNT > 1:
        b1 = described_weight(weights[1], widths[1], depth, weight_strides[1], DEEP, B_SHAPE, B_LAYOUT)
    if COUNT > 2:
        b2 = described_weight(weights[2], widths[2], depth, weight_strides[2], DEEP, B_SHAPE, B_LAYOUT)
    a_stages = gl.allocate_shared_memory(TYPE, [STAGES * PARTS, A_SHAPE[0], A_SHAPE[1]], A_LAYOUT)
    b_stages = gl.allocate_shared_memory(TYPE, [STAGES, B_SHAPE[0], B_SHAPE[1]], B_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=PARTS)
    passed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(2):
        mbarrier.init(passed.index(part), count=1)
    stages = (a_stages, b_stages, full, empty, passed)
    # The copy engine completes barriers through another proxy than the one that made them.
    fence_async_shared()
    signals = (words, epoch, aborted, control, ticks, tag, pieces)
    results = (outs, out_strides, biases, bias_widths)
    sizes = (rows, depth, rank, world)
    load_sizes = (rows, depth, gathered_rows, world)
    # Triton keeps constants in a list of arguments, but not in a variable: hence twice what differs in one number.
    # fmt: off
    gl.warp_specialize(
        [
            (multiply_stages, (0, stages, results, sizes, widths, GROUP, COUNT, RING, DEEP, BIASED,
                               BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS)),
            (multiply_stages, (1, stages, results, sizes, widths, GROUP, COUNT, RING, DEEP, BIASED,
                               BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS)),
            (load_stages, ((here, there, b0, b1, b2), stages, signals, load_sizes, widths, GROUP, COUNT, DEEP,
                           BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS)),
        ],
        [4, 1],
        [_MULTIPLYING_REGISTERS, _LOADING_REGISTERS],
    )
    # fmt: on
