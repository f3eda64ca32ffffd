"""Sums and conversions of the compiled module, bit by bit against torch, on every instruction set of this machine."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from odysseus_kernels import _ext

C = _ext.load()
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65520.0, -65519.9, 6e-8, 2.9e-8, 6.1e-5, 3.4e38, 1e-45)


@pytest.fixture(params=["avx512", "avx2", "baseline"], autouse=True)
def simd(request: pytest.FixtureRequest) -> Iterator[None]:
    before, threads = C.simd(), torch.get_num_threads()
    try:
        C.use_simd(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    torch.set_num_threads(1)  # for arrays this small, waking a second thread is most of the time
    assert C.simd() == request.param
    yield
    C.use_simd(before)
    torch.set_num_threads(threads)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def reduce_into(out: Tensor, sources: list[Tensor], count: int | None = None) -> None:
    C.reduce(
        out.data_ptr(),
        name_of(out.dtype),
        [source.data_ptr() for source in sources],
        [name_of(source.dtype) for source in sources],
        out.numel() if count is None else count,
    )


def expected(sources: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The specification: the sources added in order, in fp32 or (with any fp64) fp64, then one cast."""
    fp64 = torch.float64 in (dtype, *(source.dtype for source in sources))
    total = sources[0].to(torch.float64 if fp64 else torch.float32, copy=True)
    for source in sources[1:]:
        total += source.to(total.dtype)
    return total.to(dtype)


def assert_same_bits(actual: Tensor, wanted: Tensor) -> None:
    """Equal bits, signs of zeros included; a NaN only has to be a NaN, since its payload depends on operand order."""
    assert torch.equal(actual.isnan(), wanted.isnan())
    bits = BITS[actual.element_size()]
    number = ~wanted.isnan()
    assert torch.equal(actual.view(bits)[number], wanted.view(bits)[number])


def values(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of very different sizes, special ones among them."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(count, generator=generator, dtype=torch.float64)
    numbers *= 2.0 ** torch.randint(-20, 15, (count,), generator=generator)
    places = torch.rand(count, generator=generator) < 0.05
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    picks = torch.randint(0, len(SPECIAL), (count,), generator=generator)
    return torch.where(places, special[picks], numbers).to(dtype)


def check_sum(mix: tuple[torch.dtype, ...], out_dtype: torch.dtype, count: int, seed: int) -> None:
    sources = [values(count, dtype, seed + place) for place, dtype in enumerate(mix)]
    out = torch.full((count + 1,), 77.0, dtype=out_dtype)
    reduce_into(out, sources, count)
    assert out[count] == 77.0, "nothing is written beyond the end"
    assert_same_bits(out[:count], expected(sources, out_dtype))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=name_of)
def test_all_type_mixes(out_dtype: torch.dtype) -> None:
    mixes = [(dtype,) for dtype in DTYPES] + list(itertools.product(DTYPES, repeat=2))
    chooser = random.Random(0)
    mixes += [tuple(chooser.choices(DTYPES, k=chooser.randint(3, 6))) for _ in range(10)]
    for index, mix in enumerate(mixes):
        for count in (0, 1, 7, 16, 33, 2047, 2048, 2049, 6000):
            check_sum(mix, out_dtype, count, 7 * index)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=name_of)
def test_all_small_counts(out_dtype: torch.dtype) -> None:
    for count in range(201):
        check_sum((DTYPES[count % 4], DTYPES[count // 4 % 4], torch.float32), out_dtype, count, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_unaligned_addresses(dtype: torch.dtype) -> None:
    size = dtype.itemsize
    for shift, count in itertools.product((1, 2, 3, 5), (1, 31, 200)):
        plain = [values(count, dtype, seed) for seed in (1, 2)]
        raw = [torch.zeros(count * size + 8, dtype=torch.uint8) for _ in range(3)]
        for bytes_, source in zip(raw, plain, strict=False):
            bytes_[shift : shift + count * size] = source.view(torch.uint8)
        name = name_of(dtype)
        addresses = [bytes_.data_ptr() + shift for bytes_ in raw]
        C.reduce(addresses[2], name, addresses[:2], [name, name], count)
        result = raw[2][shift : shift + count * size].clone().view(dtype)
        assert_same_bits(result, expected(plain, dtype))
        assert raw[2][:shift].any() == raw[2][shift + count * size :].any() == False  # noqa: E712 - nothing beside it


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_output_may_be_a_source(dtype: torch.dtype, place: int) -> None:
    for others in DTYPES:
        sources = [values(5000, others, seed) for seed in range(3)]
        sources[place] = values(5000, dtype, 9)
        wanted = expected(sources, dtype)
        reduce_into(sources[place], sources)
        assert_same_bits(sources[place], wanted)
    doubled = values(3000, dtype, 1)
    wanted = expected([doubled, doubled, doubled], dtype)
    reduce_into(doubled, [doubled, doubled, doubled])
    assert_same_bits(doubled, wanted)


def test_every_half_becomes_its_float() -> None:
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype, out_dtype in itertools.product((torch.float16, torch.bfloat16), (torch.float32, torch.float64)):
        source = patterns.view(dtype)
        out = torch.empty(source.shape, dtype=out_dtype)
        reduce_into(out, [source])
        assert_same_bits(out, source.to(out_dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_floats_round_to_nearest_even(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    random_bits = torch.randint(-(2**31), 2**31, (400_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).float().view(torch.int32)
    # Around every value that the type can hold and every tie between two of them.
    step = 2**12 if dtype is torch.float16 else 2**15
    near = torch.cat([halves + offset for offset in (-step - 1, -step, 1 - step, -1, 0, 1, step - 1, step, step + 1)])
    for source in (random_bits.view(torch.float32), near.view(torch.float32)):
        out = torch.empty(source.shape, dtype=dtype)
        reduce_into(out, [source])
        assert_same_bits(out, source.to(dtype))


def test_bad_arguments() -> None:
    data = torch.zeros(100)
    address = data.data_ptr()
    with pytest.raises(ValueError, match="dtype: expected float32, float64, bfloat16 or float16, got int8"):
        C.reduce(address, "int8", [address], ["float32"], 1)
    with pytest.raises(ValueError, match="got 2 and 1: each source has one dtype"):
        C.reduce(address, "float32", [address, address], ["float32"], 1)
    with pytest.raises(ValueError, match="a reduction needs a source"):
        C.reduce(address, "float32", [], [], 1)
    with pytest.raises(ValueError, match="source 1 at .* overlap in 10 elements"):
        C.reduce(address, "float32", [address, address + 36], ["float32"] * 2, 10)
    with pytest.raises(ValueError, match="overlap"):
        C.reduce(address, "float32", [address], ["bfloat16"], 10)
    with pytest.raises(ValueError, match="null pointer"):
        C.reduce(0, "float32", [address], ["float32"], 1)
    C.reduce(address, "float32", [address + 40], ["float32"], 10)
    C.reduce(0, "float32", [0], ["float32"], 0)


def test_copy() -> None:
    source = torch.arange(1000, dtype=torch.int32)
    target = torch.zeros_like(source)
    C.copy(target.data_ptr() + 4, source.data_ptr(), 998 * 4)
    assert torch.equal(target[1:999], source[:998])
    assert target[999] == 0
    with pytest.raises(ValueError, match="source and destination overlap"):
        C.copy(target.data_ptr(), target.data_ptr() + 8, 9)
    C.copy(0, 0, 0)
