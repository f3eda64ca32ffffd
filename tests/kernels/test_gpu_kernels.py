"""The kernels on a GPU: every configuration against fp64, words that come late from another stream, and aborts."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

pytest.importorskip("triton")

from kernel_cases import GatherCase, ScatterCase, check_product, word

from odysseus_kernels._ext import CONTROL_WORDS
from odysseus_kernels.kernels.configs import DTYPES, TileConfig, shipped
from odysseus_kernels.kernels.launch import target_of

pytestmark = pytest.mark.gpu

_DEVICE = "cuda"
_LAYOUTS: dict[str, dict[str, object]] = {
    "small": {},
    "padded": {"rows": 300, "depth": 520, "padding": 8},
    "deep": {"rows": 256, "depth": 512, "deep": True},
    "exact-out": {"rows": 130, "depth": 200, "out_dtype": torch.float32, "bias": False},
    "one-row": {"rows": 1, "world": 2, "rank": 0, "depth": 64},
    "one-rank": {"world": 1, "rank": 0, "rows": 190, "depth": 256},
    "unaligned": {"rows": 77, "depth": 101, "padding": 3},
}
# float16 is compiled to the code of bfloat16 with another type of operands, and float32 has one configuration: most
# layouts would only compile once more what others have shown.
_CASES = [
    pytest.param(dtype, _LAYOUTS[name], id=f"{dtype}-{name}")
    for dtype, names in (
        (torch.bfloat16, tuple(_LAYOUTS)),
        (torch.float16, ("padded",)),
        (torch.float32, ("padded", "deep", "unaligned")),
    )
    for name in names
]


@pytest.fixture(scope="module", autouse=True)
def _all_kernels_loaded() -> None:
    """A kernel's first launch loads it, which may wait for a kernel of this file that spins until it is launched."""
    parts = torch.zeros(3, 256, 256, dtype=torch.bfloat16, device=_DEVICE)  # type and size choose the kernels
    torch.cuda._sleep(1)
    torch.stack([part.isnan().all() for part in parts])
    torch.cuda.synchronize()


def _make_tables(case: ScatterCase) -> None:
    """Makes the tables of addresses for the next call now: copies from the host wait for a kernel that spins on the
    same stream, and cannot be captured."""
    tensors = case.parts, list(case.credits.split(1)), list(case.arrived.split(1))
    made = iter([case.table(each) for each in tensors])
    case.table = lambda tensors: next(made)  # type: ignore[method-assign]


def _configs(kernel: str, dtype: torch.dtype) -> list[TileConfig]:
    target = target_of(torch.device(_DEVICE, torch.cuda.current_device()))
    return list(shipped(kernel, target.architecture, dtype))  # type: ignore[arg-type]


# Fewer programs than multiprocessors: what sets words in the tests below are kernels, and need room.
_WAITING: dict[str, TileConfig] = {
    "pointers": TileConfig(64, 64, 32, warps=4, stages=2, sms=16),
    "descriptors": TileConfig(64, 64, 32, warps=4, stages=2, descriptors=True, sms=16),
    **{
        config.schedule: dataclasses.replace(config, sms=16)
        for config in shipped("gather_matmul", 90, torch.bfloat16)
        if config.specialized
    },
}


@pytest.fixture(params=_WAITING)
def waiting(request: pytest.FixtureRequest) -> TileConfig:
    """A configuration in which a kernel waits for words."""
    config = _WAITING[request.param]
    architecture = target_of(torch.device(_DEVICE, 0)).architecture
    if config.descriptors and architecture < 90:
        pytest.skip("descriptors need compute capability 9.0")
    if config.specialized and architecture != 90:
        pytest.skip("warp-specialized kernels are for compute capability 9")
    return config


@pytest.mark.parametrize(("dtype", "layout"), _CASES)
def test_gather_matmul(dtype: torch.dtype, layout: dict[str, object]) -> None:
    for config in _configs("gather_matmul", dtype):
        # Specialized ones have no variant without descriptors: the launch takes another configuration.
        for chosen in (config,) if config.specialized else (config, dataclasses.replace(config, descriptors=False)):
            case = GatherCase(device=_DEVICE, dtype=dtype, **layout)  # type: ignore[arg-type]
            case.deliver()
            case.multiply(chosen)
            case.check()


@pytest.mark.parametrize(
    ("dtype", "order"),
    [
        (torch.bfloat16, "ring"),
        (torch.bfloat16, "sequence"),
        (torch.float16, "ring"),
        (torch.float32, "sequence"),
    ],
    ids=str,
)
def test_gather_matmul_of_three_weights(dtype: torch.dtype, order: str) -> None:
    for config in (None, *_configs("gather_matmul", dtype)):
        case = GatherCase(
            world=5,
            rank=3,
            rows=333,
            depth=264,
            widths=(264, 136, 8),
            pieces=4,
            order=order,
            dtype=dtype,
            device=_DEVICE,
        )
        case.deliver()
        case.multiply(config)
        case.check()


@pytest.mark.parametrize(("dtype", "layout"), _CASES)
def test_matmul_scatter(dtype: torch.dtype, layout: dict[str, object]) -> None:
    adapted = {("depths" if name == "depth" else name): value for name, value in layout.items()}
    if "depths" in adapted:
        adapted["depths"] = (adapted["depths"],)
    for config in _configs("matmul_scatter", dtype):
        for chosen in (config, dataclasses.replace(config, descriptors=False)):
            case = ScatterCase(device=_DEVICE, dtype=dtype, **adapted)  # type: ignore[arg-type]
            case.multiply(chosen)
            case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_scatter_of_three_pairs(dtype: torch.dtype) -> None:
    for config in (None, *_configs("matmul_scatter", dtype)):
        case = ScatterCase(
            world=5, rank=3, rows=333, depths=(136, 72, 8), width=264, deep=True, dtype=dtype, device=_DEVICE
        )
        for epoch in (3, 4, 5):  # counters serve call after call
            case.epoch = epoch
            case.epochs.fill_(epoch)
            case.credits.fill_(word(epoch, -1))
            case.multiply(config)
            case.check()


@pytest.mark.parametrize("swapped", [False, True], ids=("straight", "swapped"))
@pytest.mark.parametrize("accumulate", [False, True], ids=("written", "added"))
@pytest.mark.parametrize(("dtype", "layout"), [case for case in _CASES if "bias" not in case.values[1]])
def test_weight_gradient(dtype: torch.dtype, layout: dict[str, object], accumulate: bool, swapped: bool) -> None:
    for config in (None, *_configs("weight_gradient", dtype)):
        case = GatherCase(device=_DEVICE, dtype=dtype, **layout)  # type: ignore[arg-type]
        case.deliver()
        out_dtype = torch.float32 if accumulate else dtype
        case.gradient(config, swapped=swapped, accumulate=accumulate, out_dtype=out_dtype)


def test_chunks_that_come_late_from_another_stream(waiting: TileConfig) -> None:
    """The kernel starts before anything has arrived, and reads what copies bring meanwhile, piece by piece."""
    rows, pieces, config = 512, 4, waiting
    for attempt in range(5):
        case = GatherCase(
            world=3, rank=attempt % 3, rows=rows, depth=256, widths=(256,), pieces=pieces, device=_DEVICE, seed=attempt
        )
        warm = GatherCase(world=3, rank=attempt % 3, rows=rows, depth=256, widths=(256,), device=_DEVICE)
        warm.deliver()
        warm.multiply(config)  # compiles
        values = [
            torch.full((1,), case.wanted(piece + 1), dtype=torch.int32, device=_DEVICE) for piece in range(pieces)
        ]
        sources = [(case.rank + visit) % 3 for visit in (1, 2)]
        torch.cuda.synchronize()
        copies = torch.cuda.Stream()
        began = torch.cuda.Event(enable_timing=True)
        ended = torch.cuda.Event(enable_timing=True)
        began.record()
        case.multiply(config)
        ended.record()
        assert case.gathered is not None
        with torch.cuda.stream(copies):
            for slot, source in enumerate(sources):
                for piece in range(pieces):
                    torch.cuda._sleep(2_000_000)  # about a millisecond
                    part = slice(rows * piece // pieces, rows * (piece + 1) // pieces)
                    case.gathered[slot, part].copy_(case.chunks[source][part])
                    case.words[slot : slot + 1].copy_(values[piece])
        torch.cuda.synchronize()
        assert began.elapsed_time(ended) > 4  # it did wait
        case.check()


def test_credit_that_comes_late() -> None:
    config = TileConfig(64, 64, 32, warps=4, stages=2, sms=16)
    case = ScatterCase(world=3, rank=0, rows=256, depths=(256,), width=256, device=_DEVICE)
    case.multiply(config)
    torch.cuda.synchronize()
    case.check()
    for part in case.parts:
        part.fill_(float("nan"))
    case.arrived.fill_(-1)
    case.credits.fill_(word(case.epoch, -2))
    granted = torch.full_like(case.credits, word(case.epoch, -1))
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    case.multiply(config)
    with torch.cuda.stream(other):
        torch.cuda._sleep(50_000_000)
        before = torch.stack([part.isnan().all() for part in case.parts])
        case.credits.copy_(granted)
    torch.cuda.synchronize()
    assert before.all()
    case.check()


def test_aborted_ends_all_waits() -> None:
    config = TileConfig(64, 64, 32, warps=4, stages=2, sms=16)
    gather = GatherCase(world=2, rank=0, rows=128, device=_DEVICE)
    scatter = ScatterCase(world=3, rank=0, rows=128, device=_DEVICE)
    for case in (GatherCase(world=2, rank=0, rows=128, device=_DEVICE), ScatterCase(world=3, rows=128, device=_DEVICE)):
        if isinstance(case, GatherCase):
            case.deliver()
        case.multiply(config)  # compiles
    scatter.credits[2] = word(scatter.epoch, -2)
    _make_tables(scatter)
    one = torch.ones(1, dtype=torch.int32, device=_DEVICE)
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    began = time.perf_counter()
    gather.multiply(config)
    scatter.aborted = gather.aborted
    scatter.multiply(config)
    with torch.cuda.stream(other):
        torch.cuda._sleep(20_000_000)
        gather.aborted.copy_(one)
    torch.cuda.synchronize()
    assert time.perf_counter() - began < 10
    check_product(gather.outs[0][:128], gather.local, gather.weights[0].mT, gather.biases[0])
    assert scatter.parts[2].isnan().all()
    assert scatter.arrived.tolist() == [-1, -1, -1]
    assert (scatter.counters == 0).all()


@pytest.mark.parametrize("end", ("late", "stopped"))
def test_a_word_that_never_comes_ends_its_waits(end: str, waiting: TileConfig) -> None:
    """At the limit, or when the host says so; the block says which wait it was, and later ones end at once."""
    config = waiting
    ready = GatherCase(world=2, rank=0, rows=128, device=_DEVICE)
    ready.deliver()
    ready.multiply(config)  # compiles
    case = GatherCase(world=2, rank=0, rows=128, device=_DEVICE)
    case.timeout_s, case.tag = (0.5 if end == "late" else 30.0), 40
    torch.cuda.synchronize()
    began = time.perf_counter()
    case.multiply(config)
    if end == "stopped":
        stop = torch.full((1,), 7, dtype=torch.int32).pin_memory()
        with torch.cuda.stream(torch.cuda.Stream()):
            case.control.words[CONTROL_WORDS["abort"] :][:1].copy_(stop, non_blocking=True)
    torch.cuda.synchronize()
    taken = time.perf_counter() - began
    assert 0.45 < taken < 5 if end == "late" else taken < 5
    assert case.aborted.item() == 1
    expected, seen = (value % 2**32 for value in (case.wanted(1), case.wanted(-1)))
    assert case.control.error() == (1 if end == "late" else 7, 40, 0, expected, seen)
    began = time.perf_counter()
    case.multiply(config)
    torch.cuda.synchronize()
    assert time.perf_counter() - began < 0.4
    check_product(case.outs[0][:128], case.local, case.weights[0].mT, case.biases[0])


def test_captured_calls_follow_the_epoch() -> None:
    """Nothing of a call but its values is a constant: a graph is replayed as the epoch goes on."""
    case = ScatterCase(world=3, rank=2, rows=128, depths=(128,), device=_DEVICE)
    case.multiply(None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    _make_tables(case)
    with torch.cuda.graph(graph):
        case.multiply(None)
    for epoch in (7, 8, 2**23 - 1):
        case.epoch = epoch
        case.epochs.fill_(epoch)
        case.credits.fill_(word(epoch, -1))
        for part in case.parts:
            part.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        case.check()
