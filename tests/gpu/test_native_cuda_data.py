"""The CUDA part of the compiled module on a GPU: copies, the emulated link, reductions."""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from native_rank import ALLOWED, C, Rank, at, milliseconds
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not hasattr(C, "cuda"), reason="the extension was built without CUDA"),
    pytest.mark.timeout(120),
]

TYPE_PAIRS = (
    [(dtype, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
    + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
    + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture
def rank() -> Iterator[Rank]:
    made = Rank()
    yield made
    made.close()


# ---- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 4097), (1, 1 << 24), (7, 100), (200, 4096), (3000, 33)])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("stream", ["own", "legacy"])
def test_copies(rank: Rank, shape: tuple[int, int], pinned: bool, stream: str) -> None:
    rows, width = shape
    source = torch.randint(0, 256, (rows, width + 13), dtype=torch.uint8)
    source = source.pin_memory() if pinned else source.cuda()
    target = torch.zeros(rows, width + 5, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    program = rank.program()
    program.copy(0, at(target, 1), at(source, 3), width, rows, width + 5, width + 13)
    handle = rank.streams[0].cuda_stream if stream == "own" else 0
    program.run(0, 1, [handle], [0], ALLOWED)
    torch.cuda.synchronize()
    wanted = torch.zeros_like(target)
    wanted[:, 1 : width + 1] = source[:, 3 : width + 3].cuda()
    assert torch.equal(target, wanted)


def test_bases_and_ranges(rank: Rank) -> None:
    first, second, target = (torch.full((64,), value, device="cuda") for value in (1.0, 2.0, 0.0))
    program = rank.program()
    program.copy(0, (1, 0), (0, 16), 64)
    program.copy(0, (1, 64), (0, 16), 64)
    handles = [rank.streams[0].cuda_stream]
    torch.cuda.synchronize()
    program.run(0, 1, handles, [first.data_ptr(), target.data_ptr()], ALLOWED)
    program.run(1, 2, handles, [second.data_ptr(), target.data_ptr()], ALLOWED)
    torch.cuda.synchronize()
    assert target.tolist() == [1.0] * 16 + [2.0] * 16 + [0.0] * 32
    with pytest.raises(ValueError, match="got 1 and 1: base of dst of operation 0"):
        program.run(0, 2, handles, [first.data_ptr()], ALLOWED)


def test_copies_run_beside_products(rank: Rank) -> None:
    """Over the bus; within one device the driver copies on its multiprocessors (1.2 TB/s on an H100)."""
    if reason := C.cuda.why_no_batch_copies():
        pytest.skip(reason)
    a, b, c = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    program = rank.program()
    for _ in range(6):
        program.copy(1, at(target), at(source), source.nbytes, over_link=True)
    program.record(1, 0)
    program.depend(0, 0)

    def multiply() -> None:
        with torch.cuda.stream(rank.streams[0]):
            for _ in range(20):
                torch.mm(a, b, out=c)

    def copy() -> None:
        rank.run(program)

    def both() -> None:
        multiply()
        copy()

    for work in (multiply, copy, both):
        milliseconds(work, rank.streams[0])
    products, copies, together = (
        statistics.median(milliseconds(work, rank.streams[0]) for _ in range(5)) for work in (multiply, copy, both)
    )
    # Side by side they slow each other down through memory, but far less than half of the shorter one stays visible.
    assert together < max(products, copies) + 0.5 * min(products, copies), (products, copies, together)


# ---- the emulated link ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [(0, 0, 0), (0, 1, 2)])
@pytest.mark.parametrize("rate", [20e9, 200e9])
def test_the_link_takes_bytes_over_rate(rank: Rank, streams: tuple[int, ...], rate: float) -> None:
    megabytes = 48
    source = torch.randint(0, 256, (megabytes, 1 << 20), dtype=torch.uint8, device="cuda")
    targets = [torch.zeros_like(source) for _ in streams]
    program = rank.program(link=rate)
    program.record(0, 0)
    for stream, target in zip(streams, targets, strict=True):
        program.depend(stream, 0)
        program.copy(stream, at(target), at(source), 1 << 20, megabytes, over_link=True)
        program.record(stream, 1 + stream)
        program.depend(0, 1 + stream)
    milliseconds(lambda: rank.run(program), rank.streams[0])
    took = statistics.median(milliseconds(lambda: rank.run(program), rank.streams[0]) for _ in range(5))
    wanted = len(streams) * source.nbytes / rate * 1e3
    assert wanted <= took * 1.001
    assert took < 1.1 * wanted + 0.02, (took, wanted)
    assert all(torch.equal(target, source) for target in targets)


# ---- reductions ----------------------------------------------------------------------------------------------------


def assert_same_bits(actual: Tensor, wanted: Tensor) -> None:
    """But for the payload of a NaN."""
    assert torch.equal(actual.isnan(), wanted.isnan())
    bits = BITS[actual.element_size()]
    number = ~wanted.isnan()
    assert torch.equal(actual.view(bits)[number], wanted.view(bits)[number])


def in_order(sources: list[Tensor], source_dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    total = sources[0].to(torch.float64 if source_dtype == torch.float64 else torch.float32, copy=True)
    for source in sources[1:]:
        total += source.to(total.dtype)
    return total.to(out_dtype)


def numbers(many: int, shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(many)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(many)]


@pytest.mark.parametrize("pair", TYPE_PAIRS, ids=lambda pair: "-".join(map(name_of, pair)))
def test_reductions_are_right_bit_for_bit(rank: Rank, pair: tuple[torch.dtype, torch.dtype]) -> None:
    source_dtype, out_dtype = pair
    shapes = [(1, 1), (1, 1003), (1, 300_001), (3, 8192), (5, 333)]
    for many, (rows, count), shift in itertools.product((1, 2, 3, 8, 9, 16), shapes, (0, 1, 3)):
        sources = numbers(many, (rows, count), source_dtype)
        on_device, addresses, pitches = [], [], []
        for place, source in enumerate(sources):
            gap = 0 if rows == 1 else 8 * place  # of elements between rows
            memory = torch.zeros(shift + rows * (count + gap), dtype=source_dtype, device="cuda")
            memory[shift:].view(rows, count + gap)[:, :count] = source.cuda()
            on_device.append(memory)
            addresses.append(at(memory, shift))
            pitches.append((count + gap) * source_dtype.itemsize)
        out = torch.full((shift + rows * count + 9,), 77.0, dtype=out_dtype, device="cuda")
        torch.cuda.synchronize()
        program = rank.program()
        program.reduce(0, at(out, shift), name_of(out_dtype), addresses, name_of(source_dtype), count, rows, 0, pitches)
        rank.run(program)
        torch.cuda.synchronize()
        result = out.cpu()
        assert_same_bits(result[shift:-9].view(rows, count), in_order(sources, source_dtype, out_dtype))
        assert (result[:shift] == 77).all()
        assert (result[-9:] == 77).all()
        program.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_conversions_round_as_on_the_host(rank: Rank, dtype: torch.dtype) -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(1)
    random_bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).to(torch.int32).view(torch.float32)
    for source, out_dtype in ((every, torch.float32), (every, dtype), (random_bits, dtype)):
        out = torch.empty(source.shape, dtype=out_dtype, device="cuda")
        on_device = source.cuda()
        stream = torch.cuda.current_stream().cuda_stream
        names = name_of(out_dtype), [on_device.data_ptr()], name_of(source.dtype)
        C.cuda.reduce(stream, out.data_ptr(), *names, source.numel())
        torch.cuda.synchronize()
        assert_same_bits(out.cpu(), source.to(out_dtype))


@pytest.mark.parametrize("max_blocks", [0, 1, 5])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_the_standalone_reduction_may_write_to_a_source(max_blocks: int, place: int) -> None:
    sources = numbers(4, (1, 100_003), torch.bfloat16)
    wanted = in_order(sources, torch.bfloat16, torch.bfloat16)
    on_device = [source.cuda() for source in sources]
    stream = torch.cuda.current_stream().cuda_stream
    addresses = [source.data_ptr() for source in on_device]
    C.cuda.reduce(stream, addresses[place], "bfloat16", addresses, "bfloat16", 100_003, max_blocks)
    torch.cuda.synchronize()
    assert_same_bits(on_device[place].cpu(), wanted)


def test_a_reduction_waits_for_its_sources(rank: Rank) -> None:
    count, many = 1 << 20, 8
    sources = [source.cuda() for source in numbers(many, (1, count), torch.bfloat16)]
    arrived = [torch.full_like(source, math.nan) for source in sources]
    out = torch.zeros(1, count, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    words = [at(rank.words, index) for index in range(many)]
    reducing, sending = rank.program(), rank.program()
    reducing.reduce(
        0,
        at(out),
        "bfloat16",
        [at(source) for source in arrived],
        "bfloat16",
        count,
        epoch=at(rank.epoch),
        words=words,
        values=[4] * many,
        tag=23,
    )
    for index in reversed(range(many)):
        sending.copy(1, at(arrived[index]), at(sources[index]), sources[index].nbytes)
        sending.signal(1, at(rank.epoch), [words[index]], [4])
    rank.run(reducing)
    time.sleep(0.05)
    assert not rank.streams[0].query()
    rank.run(sending)
    torch.cuda.synchronize()
    assert rank.control.error() is None
    assert_same_bits(out.cpu(), in_order([source.cpu() for source in sources], torch.bfloat16, torch.bfloat16))
    rank.epoch.add_(1)
    torch.cuda.synchronize()
    rank.run(reducing, 0.1)
    torch.cuda.synchronize()
    assert rank.control.error() == (1, 23, 0, 256 + 4, 4)


@pytest.mark.parametrize("many", [2, 4, 8])
def test_the_standalone_reduction_is_nearly_as_fast_as_a_copy(many: int) -> None:
    count = (1 << 31) // (2 * (many + 1))  # 2 GiB are read and written in all
    sources = [torch.randn(count, device="cuda", dtype=torch.bfloat16) for _ in range(many)]
    out = torch.empty_like(sources[0])
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    stream = torch.cuda.current_stream()
    addresses = [source.data_ptr() for source in sources]

    def add() -> None:
        C.cuda.reduce(stream.cuda_stream, out.data_ptr(), "bfloat16", addresses, "bfloat16", count)

    def copy() -> None:
        other.copy_(big)

    rates = []
    for work, nbytes in ((add, 2 * count * (many + 1)), (copy, 2 * big.nbytes)):
        milliseconds(work, stream)
        rates.append(nbytes / statistics.median(milliseconds(work, stream) for _ in range(15)))
    assert rates[0] >= 0.85 * rates[1], rates


def test_multicast_is_refused_where_there_is_none() -> None:
    memory = torch.zeros(64, device="cuda")
    if C.cuda.multimem_supported(0):
        pytest.skip("this device multicasts, but has no multicast memory here")
    with pytest.raises(RuntimeError, match="device 0 does not multicast"):
        C.cuda.multimem_reduce(0, memory.data_ptr(), memory.data_ptr(), "float32", 16)


@pytest.mark.parametrize("tool", ["none", "memcheck", "racecheck"])
def test_all_kernels_by_themselves(tool: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("native_check.py"))]
    if tool != "none":
        if (sanitizer := shutil.which("compute-sanitizer")) is None:
            pytest.skip("no compute-sanitizer on PATH")
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
