"""The CUDA part of the compiled module, as far as it can be tested without a device."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from odysseus_kernels import _ext

pytestmark = pytest.mark.without_ranks

C = _ext.load()
if not hasattr(C, "cuda"):
    pytest.skip("the extension was built without CUDA", allow_module_level=True)
CUDA = C.cuda
HOST = CUDA.host_side

TYPE_PAIRS = (
    [(dtype, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
    + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
    + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
without_driver = pytest.mark.skipif(CUDA.why_unavailable() == "", reason="this machine has a CUDA device")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- without a driver ----------------------------------------------------------------------------------------------


def test_import_needs_no_driver_and_links_none() -> None:
    code = "import odysseus_kernels._C as C; print(C.cuda.why_unavailable())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip("\n") == CUDA.why_unavailable()
    linked = subprocess.run(["ldd", C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in linked
    assert "libcudart" not in linked


@without_driver
def test_without_a_driver_everything_says_so() -> None:
    reason = CUDA.why_unavailable()
    assert "CUDA" in reason
    assert "\n" not in reason
    assert CUDA.multimem_supported(0) is False
    assert "cuMemcpyBatchAsync" in CUDA.why_no_batch_copies()
    calls: list[Callable[[], object]] = [
        lambda: CUDA.Control(0, 64),
        lambda: CUDA.small_kernels(0),
        lambda: CUDA.reduce(0, 256, "float32", [512], "float32", 4),
        lambda: CUDA.multimem_reduce(0, 256, 512, "float32", 4),
    ]
    for call in calls:
        with pytest.raises(RuntimeError) as error:
            call()
        assert str(error.value) == reason


def test_kernels_of_others_know_where_words_of_the_control_block_lie() -> None:
    assert HOST.control_words() == _ext.CONTROL_WORDS


def test_bad_arguments_of_functions_come_before_the_driver() -> None:
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: CUDA.Control(0, 0), "got 0 and 0: aborted is a null pointer"),
        (lambda: CUDA.Control(0, 66), "got 2 and 0: aborted is the address of a uint32"),
        (lambda: CUDA.reduce(0, 256, "int8", [512], "float32", 4), "got int8"),
        (lambda: CUDA.reduce(0, 256, "float32", [], "float32", 4), "got 0 and 1: a reduction needs a source"),
        (lambda: CUDA.reduce(0, 256, "float32", [0], "float32", 4), "source of operation 0 is a null pointer"),
        (lambda: CUDA.reduce(0, 256, "float32", [513], "float32", 4), "at 513 is not aligned to 4 bytes"),
        (lambda: CUDA.reduce(0, 256, "float32", [512], "float32", -1), "got -1 and 0: count"),
        (lambda: CUDA.reduce(0, 256, "float32", [512], "float32", 4, -1), "got -1 and 0: 0 for as many"),
        (lambda: CUDA.multimem_reduce(0, 256, 512, "float64", 4), "got float64"),
        (lambda: CUDA.multimem_reduce(0, 256, 512, "bfloat16", 7), "7 elements of bfloat16 are 14 bytes"),
        (lambda: CUDA.multimem_reduce(0, 8, 512, "float32", 4), "out at 8 is not aligned to 16 bytes"),
        (lambda: CUDA.multimem_reduce(0, 256, 0, "float32", 4), "multicast is a null pointer"),
    ]
    for call, text in cases:
        with pytest.raises(ValueError, match=text):
            call()


# ---- recordings ----------------------------------------------------------------------------------------------------

A, B = (0, 0), (0, 64)
REDUCE = (0, A, "float32", [B], "float32", 4)


def test_operations_are_checked_when_they_are_recorded() -> None:
    recording = CUDA.Recording()
    seventeen = [B] * 17
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: recording.copy(-1, A, B, 1), "got -1 and 0: stream"),
        (lambda: recording.copy(64, A, B, 1), "got 64 and 64: stream"),
        (lambda: recording.copy(0, (-1, 0), B, 1), "got -1 and 0: dst: index of a base"),
        (lambda: recording.copy(0, A, (0, -4), 1), "got -4 and 0: src: bytes behind its base"),
        (lambda: recording.copy(0, A, B, -1), "got -1 and 0: row_bytes"),
        (lambda: recording.copy(0, A, B, 8, -1), "got -1 and 0: rows"),
        (lambda: recording.copy(0, A, B, 8, 2, 7), "got 7 and 8: dst_pitch: rows overlap"),
        (lambda: recording.copy(0, A, B, 8, 2, 8, 7), "got 7 and 8: src_pitch: rows overlap"),
        (lambda: recording.wait(0, A, [], [], 0), "got 0 and 1: there is nothing to wait for"),
        (lambda: recording.wait(0, A, [B], [1, 2], 0), "got 1 and 2: each word has one value"),
        (lambda: recording.wait(0, A, [B], [256], 0), "got 256 and 255: value 0"),
        (lambda: recording.wait(0, A, [B, B], [0, -256], 0), "got -256 and -255: value 1"),
        (lambda: recording.wait(0, A, [B], [0], -1), "got -1 and 0: tag"),
        (lambda: recording.wait(0, A, [B], [0], 2**32), "a tag has 32 bits"),
        (lambda: recording.signal(0, A, [B], []), "got 1 and 0: each word has one value"),
        (lambda: recording.signal(0, (0, -1), [B], [1]), "got -1 and 0: epoch: bytes behind its base"),
        (lambda: recording.advance(0, (-1, 0)), "got -1 and 0: epoch: index of a base"),
        (lambda: recording.reduce(0, A, "float32", [], "float32", 4), "got 0 and 1: a reduction needs a source"),
        (lambda: recording.reduce(0, A, "float32", seventeen, "float32", 4), "got 17 and"),
        (lambda: recording.reduce(0, A, "float64", [B], "float32", 4), "got float32 sources and float64 out"),
        (lambda: recording.reduce(0, A, "float16", [B], "bfloat16", 4), "got bfloat16 sources and float16 out"),
        (lambda: recording.reduce(*REDUCE[:-1], -4), "got -4 and 0: count"),
        (lambda: recording.reduce(*REDUCE, 2, 12), "got 12 and 16: out_pitch: rows overlap"),
        (lambda: recording.reduce(*REDUCE, 2, 18), "got 2 and 0: out_pitch 18: whole elements"),
        (lambda: recording.reduce(*REDUCE, 2, 0, [16, 16]), "got 2 and 1: each source has one pitch"),
        (lambda: recording.reduce(*REDUCE, 2, 0, [8]), "got 8 and 16: source_pitches: rows overlap"),
        (lambda: recording.reduce(*REDUCE, epoch=A), "expected all of them or none"),
        (lambda: recording.reduce(*REDUCE, epoch=A, words=[B, B], values=[1, 1]), "each source has one word"),
        (lambda: recording.reduce_multicast(0, A, B, "float64", 4), "got float64: no switch adds it"),
        (lambda: recording.reduce_multicast(0, A, B, "bfloat16", 7), "14 bytes of a row: expected a multiple of 16"),
        (lambda: recording.reduce_multicast(0, A, (-1, 0), "float32", 4), "got -1 and 0: multicast: index of a base"),
        (lambda: recording.reduce_multicast(0, A, B, "float32", -4), "got -4 and 0: count"),
        (lambda: recording.reduce_multicast(0, A, B, "float32", 4, 2, 24), "pitch 24: expected a multiple of 16"),
        (lambda: recording.reduce_multicast(0, A, B, "float32", 8, 2, 16), "got 16 and 32: pitch: rows overlap"),
        (lambda: recording.store_multicast(0, A, B, 24), "24 bytes of a row: expected a multiple of 16"),
        (lambda: recording.store_multicast(0, A, B, 16, -1), "got -1 and 0: rows"),
        (lambda: recording.store_multicast(0, A, B, 16, beside=-1), "got -1 and 0: beside"),
        (lambda: recording.record(0, 65536), "got 65536 and 65536: event"),
        (lambda: recording.depend(0, -1), "got -1 and 0: event"),
        (lambda: recording.depend(0, 3), "one that an earlier operation records, got 3"),
    ]
    for call, text in cases:
        with pytest.raises(ValueError, match=text):
            call()
    assert len(recording) == 0, "nothing that was refused was recorded"


def test_runs_are_checked_before_anything_is_enqueued() -> None:
    recording = CUDA.Recording()
    recording.record(1, 5)
    recording.depend(0, 5)
    recording.copy(0, (0, 0), (1, 8), 8)
    recording.wait(2, (1, 0), [(0, 4)], [-1], 7)
    recording.reduce(0, (0, 0), "float64", [(1, 0)], "float64", 4, epoch=(0, 0), words=[(2, 0)], values=[255])
    assert len(recording) == 5
    streams, bases = [0, 0, 0], [64, 128, 256]
    recording.check_run(0, 5, streams, bases, math.inf)
    recording.check_run(5, 5, [], [], 0.0)
    recording.check_run(0, 2, [0, 0], [], 0.0)
    absolute = CUDA.Recording()
    absolute.copy(0, (0, 64), (0, 128), 8)
    absolute.check_run(0, 1, [0], [0], 0.0)  # a base of 0 makes offsets addresses
    cases = [
        ((-1, 5, streams, bases, 1.0), "got -1 and 0: first operation"),
        ((3, 2, streams, bases, 1.0), "got 2 and 3: operations"),
        ((0, 6, streams, bases, 1.0), "got 6 and 5: operations"),
        ((0, 5, [0, 0], bases, 1.0), "got 2 and 2: stream of operation 3"),
        ((0, 5, streams, bases[:2], 1.0), "got 2 and 2: base of word of operation 4"),
        ((0, 5, streams, [0, 128, 256], 1.0), "dst of operation 2 is a null pointer"),
        ((0, 5, streams, [62, 128, 256], 1.0), "word of operation 3 at 66 is not aligned to 4 bytes"),
        ((0, 5, streams, [68, 128, 256], 1.0), "out of operation 4 at 68 is not aligned to 8 bytes"),
        ((0, 5, streams, bases, -0.5), "got -0.5 and 0"),
        ((0, 5, streams, bases, math.nan), "got nan and 0"),
    ]
    for arguments, text in cases:
        with pytest.raises(ValueError, match=text):
            recording.check_run(*arguments)


def test_multicast_addresses_are_checked_before_anything_is_enqueued() -> None:
    recording = CUDA.Recording()
    recording.reduce_multicast(0, (1, 0), (0, 4096), "bfloat16", 8)
    recording.store_multicast(0, (0, 8192), (1, 0), 16)
    recording.check_run(0, 2, [0], [0, 256], 0.0)
    with pytest.raises(ValueError, match="local of operation 0 at 264 is not aligned to 16 bytes"):
        recording.check_run(0, 2, [0], [0, 264], 0.0)
    with pytest.raises(ValueError, match="local of operation 1 is a null pointer"):
        recording.check_run(1, 2, [0], [0, 0], 0.0)


# ---- words and times -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 1, 2**23 - 1, 2**23, 2**24 - 1, 2**24, 2**32 - 1])
def test_words_compare_rightly_where_they_wrap_around(epoch: int) -> None:
    for value in (-255, -1, 0, 1, 255):
        expected = HOST.word_of(epoch, value)
        assert expected == (epoch * 256 + value) % 2**32
        for ahead in (0, 1, 255, 256, 2**31 - 1):
            assert HOST.reached((expected + ahead) % 2**32, expected)
        for behind in (1, 256, 2**31):
            assert not HOST.reached((expected - behind) % 2**32, expected)
    # The last value of an epoch is there for a wait for the previous use in the next.
    assert HOST.reached(HOST.word_of(epoch, 255), HOST.word_of((epoch + 1) % 2**32, -1))
    assert not HOST.reached(HOST.word_of(epoch, 254), HOST.word_of((epoch + 1) % 2**32, -1))


def test_timeouts_in_nanoseconds() -> None:
    assert HOST.nanoseconds(0.0) == 0
    assert HOST.nanoseconds(1e-12) == 1, "rounds up"
    assert HOST.nanoseconds(1.5) == 1_500_000_000
    assert HOST.nanoseconds(math.inf) == HOST.nanoseconds(1e300) == 2**64 - 1


# ---- pieces of copies ----------------------------------------------------------------------------------------------


def covered(row_bytes: int, rows: int, dst_pitch: int, src_pitch: int, piece: int) -> list[tuple[int, int]]:
    """(dst, src) of every byte in the order of the pieces; the pieces keep the copy's pitches."""
    dense = dst_pitch == src_pitch == row_bytes
    pairs = []
    for dst, src, width, count in HOST.link_pieces(row_bytes, rows, dst_pitch, src_pitch, piece):
        assert width > 0
        assert count > 0
        assert count == 1 or not dense, "dense rows are one"
        for row, byte in itertools.product(range(count), range(width)):
            pairs.append((dst + row * dst_pitch + byte, src + row * src_pitch + byte))
    return pairs


@pytest.mark.parametrize("shape", [(1, 1), (4097, 1), (9000, 3), (10, 0), (0, 5), (300, 50), (4096, 4)])
@pytest.mark.parametrize("gaps", [(0, 0), (0, 7), (100, 0), (5, 9000)])
@pytest.mark.parametrize("piece", [4096, 8192, 10000])
def test_pieces_cover_a_copy_once_and_in_order(shape: tuple[int, int], gaps: tuple[int, int], piece: int) -> None:
    row_bytes, rows = shape
    dst_pitch, src_pitch = (row_bytes + gap for gap in gaps)
    expected = [(row * dst_pitch + byte, row * src_pitch + byte) for row in range(rows) for byte in range(row_bytes)]
    assert covered(row_bytes, rows, dst_pitch, src_pitch, piece) == expected


def test_pieces_have_the_right_size() -> None:
    mebibyte = 2**20
    dense = HOST.link_pieces(5 * mebibyte, 5, 5 * mebibyte, 5 * mebibyte)
    assert [(width, rows) for _, _, width, rows in dense] == [(8 * mebibyte, 1)] * 3 + [(mebibyte, 1)]
    rows = HOST.link_pieces(mebibyte, 20, 2 * mebibyte, mebibyte)
    assert [(width, rows) for _, _, width, rows in rows] == [(mebibyte, 8), (mebibyte, 8), (mebibyte, 4)]
    assert [dst for dst, *_ in rows] == [0, 16 * mebibyte, 32 * mebibyte]
    wide = HOST.link_pieces(9 * mebibyte, 2, 10 * mebibyte, 9 * mebibyte)
    assert [(dst, src, width // mebibyte) for dst, src, width, _ in wide] == [
        (0, 0, 8),
        (8 * mebibyte, 8 * mebibyte, 1),
        (10 * mebibyte, 9 * mebibyte, 8),
        (18 * mebibyte, 17 * mebibyte, 1),
    ]
    assert all(src % 4096 == 0 for _, src, _, _ in wide)


# ---- reductions ----------------------------------------------------------------------------------------------------


def test_layout_of_rows() -> None:
    def layout(out: int, sources: list[int], count: int, rows: int = 1, pitches: tuple[int, int] = (0, 0)) -> object:
        source_pitches = [pitches[1]] * len(sources)
        return HOST.reduce_layout(out, "bfloat16", sources, "bfloat16", count, rows, pitches[0], source_pitches)

    assert layout(4096, [8192, 64], 100) == (1, 0, 12, 4)
    assert layout(4096 + 6, [8192 + 6], 100) == (1, 5, 11, 7), "one head for operands that are shifted alike"
    assert layout(4096 + 6, [8192 + 8], 100) == (1, 100, 0, 0), "single elements where they are not"
    assert layout(4096 + 6, [8192 + 6], 3) == (1, 3, 0, 0)
    assert layout(4096, [8192], 100, 7) == (1, 0, 87, 4), "dense rows are one"
    assert layout(4096, [8192], 100, 7, (208, 224)) == (7, 0, 12, 4)
    assert layout(4096, [8192], 100, 7, (208, 202)) == (7, 100, 0, 0), "pitches count too"
    widened = HOST.reduce_layout(4096 + 16, "float32", [8192 + 8], "bfloat16", 100, 1, 0, [0])
    assert widened == (1, 4, 12, 0)
    narrowed = HOST.reduce_layout(4096 + 8, "bfloat16", [8192], "float32", 100, 1, 0, [0])
    assert narrowed == (1, 0, 25, 0), "four narrow elements are eight bytes"


def test_grids() -> None:
    assert HOST.reduce_grid(0, "device", 132) == (1, 512)
    assert HOST.reduce_grid(1024, "device", 132) == (1, 512)
    assert HOST.reduce_grid(1025, "device", 132) == (2, 512)
    assert HOST.reduce_grid(10**12, "device", 132) == (264, 512)
    assert HOST.reduce_grid(10**12, "device", 132, 10) == (10, 512)
    assert HOST.reduce_grid(10**12, "device", 132, 1000) == (264, 512)
    assert HOST.reduce_grid(10**12, "beside", 132, 4) == (4, 1024)
    assert HOST.reduce_grid(4096, "beside", 132, 4) == (2, 1024)
    assert HOST.reduce_grid(10**12, "beside", 2, 4) == (2, 1024), "never two blocks on one multiprocessor"
    assert HOST.reduce_grid(10**12, "waiting", 132) == (8, 512)
    for share in ("device", "beside", "waiting"):
        assert HOST.reduce_grid(10**12, share, 1)[0] >= 1, "never no block"
    with pytest.raises(ValueError, match="got half"):
        HOST.reduce_grid(1, "half", 132)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values *= 2.0 ** torch.randint(-18, 12, shape, generator=generator)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 6e-8], dtype=torch.float64)
    picks = torch.randint(0, 200, shape, generator=generator)
    return torch.where(picks < len(special), special[picks.clamp(max=len(special) - 1)], values).to(dtype)


def in_order(sources: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The specification: added in order, in fp32 (fp64 for fp64), rounded once."""
    total = sources[0].to(torch.float64 if dtype == torch.float64 else torch.float32, copy=True)
    for source in sources[1:]:
        total += source.to(total.dtype)
    return total.to(dtype)


def assert_same_bits(actual: Tensor, wanted: Tensor) -> None:
    assert torch.equal(actual.isnan(), wanted.isnan())
    bits = BITS[actual.element_size()]
    number = ~wanted.isnan()
    assert torch.equal(actual.view(bits)[number], wanted.view(bits)[number])


def reduce_on_host(out: Tensor, sources: list[Tensor], workers: int) -> None:
    """Rows of 2-D tensors whose rows are dense."""
    HOST.reduce_on_host(
        out.data_ptr(),
        name_of(out.dtype),
        [source.data_ptr() for source in sources],
        name_of(sources[0].dtype),
        out.shape[1],
        out.shape[0],
        out.stride(0) * out.element_size(),
        [source.stride(0) * source.element_size() for source in sources],
        workers,
    )


def framed(shape: tuple[int, int], dtype: torch.dtype, shift: int, gap: int) -> tuple[Tensor, Tensor]:
    """(rows, the whole memory around them, full of 77): rows begin ``shift`` elements behind a 64-byte boundary."""
    rows, count = shape
    room = 64 // dtype.itemsize
    whole = torch.full((rows * (count + gap) + 4 * room,), 77.0, dtype=dtype)
    start = -(whole.data_ptr() // dtype.itemsize) % room + room + shift
    return whole[start : start + rows * (count + gap)].unflatten(0, (rows, count + gap))[:, :count], whole


@pytest.mark.parametrize("pair", TYPE_PAIRS, ids=lambda pair: "-".join(map(name_of, pair)))
@pytest.mark.parametrize("many", [1, 2, 3, 8, 9, 16])
def test_reduction_is_right_bit_for_bit(pair: tuple[torch.dtype, torch.dtype], many: int) -> None:
    source_dtype, out_dtype = pair
    shapes = [(1, 1), (1, 7), (1, 64), (1, 1003), (3, 40), (5, 33), (4, 1)]
    placements = [(0, 0, 0), (3, 3, 0), (1, 2, 0), (0, 0, 16), (0, 0, 3), (5, 5, 8)]
    for (shape, placement), workers in itertools.product(itertools.product(shapes, placements), (1, 6, 500)):
        source_shift, out_shift, gap = placement
        sources = []
        for place in range(many):
            source, _ = framed(shape, source_dtype, source_shift, gap)
            sources.append(source.copy_(numbers(shape, source_dtype, 31 * place + shape[1])))
        out, whole = framed(shape, out_dtype, out_shift, gap)
        before = whole.clone()
        reduce_on_host(out, sources, workers)
        wanted = in_order([source.clone() for source in sources], out_dtype)
        assert_same_bits(out.clone(), wanted)
        out.copy_(torch.full(shape, 77.0, dtype=out_dtype))
        assert torch.equal(whole, before), "nothing is written beside the rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("place", [0, 1, 4])
def test_output_may_be_any_source(dtype: torch.dtype, place: int) -> None:
    for shape, gap in (((1, 777), 0), ((6, 50), 5)):
        sources = [framed(shape, dtype, 2, gap)[0].copy_(numbers(shape, dtype, seed)) for seed in range(5)]
        wanted = in_order([source.clone() for source in sources], dtype)
        reduce_on_host(sources[place], sources, 7)
        assert_same_bits(sources[place].clone(), wanted)


def test_negative_zero_stays() -> None:
    zeros = [torch.full((1, 20), -0.0) for _ in range(3)]
    out = torch.ones(1, 20)
    reduce_on_host(out, zeros, 4)
    assert torch.signbit(out).all()
    zeros[1].fill_(0.0)
    reduce_on_host(out, zeros, 4)
    assert not torch.signbit(out).any()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_nothing_to_add(shape: tuple[int, int]) -> None:
    reduce_on_host(torch.empty(shape), [torch.empty(shape)], 4)
    recording = CUDA.Recording()
    recording.reduce(0, A, "float32", [B], "float32", shape[1], shape[0])
    assert len(recording) == 1
