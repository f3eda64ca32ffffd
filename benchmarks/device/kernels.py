"""The kernels against the library on one GPU: ``python -m benchmarks.device.kernels``.

- the GEMM whose tiles wait, with every chunk there, against cuBLAS on the gathered operand: what waiting costs;
- the reduction of partial results against a copy within the device, counting what each reads and writes.

Results are checked before they are timed.  ``benchmarks/device/emulated.py`` runs this and writes its rows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.measure import EventTimer, host_seconds, median, take_turns
from benchmarks.device.cases import WORLD, gather_shapes
from odysseus_kernels import _ext
from odysseus_kernels.planner.cost_model import MEMORY_SHARE, TILE_LOSS, Work, product_seconds
from odysseus_kernels.planner.hardware import Hardware, hardware_for
from odysseus_kernels.testing.compare import relative_error, rounding_tolerance

__all__ = [
    "Measured",
    "gather_problem",
    "measure",
    "measure_named",
    "measure_problem",
    "note_multicast",
    "predicted_product",
    "predicted_sum",
    "problem_names",
    "reduce_problem",
]

_SAMPLES = 256
_REDUCE_SOURCES = (2, 8)
_REDUCE_COUNT = 64 << 20
_LENGTHS = (1024, 2048, 4096, 8192)  # rows of a chunk
Calls = dict[str, Callable[[], Any]]


@dataclasses.dataclass
class Measured:
    """What a run has: rows for the JSON file, rows that failed or were left out, and remarks."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failed: list[dict[str, str]] = dataclasses.field(default_factory=list)
    not_run: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row: a kernel's call and the library's, a check of the kernel's result, and how speed is computed.

    Attributes:
        amount, library_amount: operations or bytes of a call.
        unit: of ``amount`` a second, and by what to divide it.
        predicted_s: seconds of both calls by the planner's cost model.
        tried: of a kernel whose configuration is chosen by timing: the seconds of each, by its name.
    """

    kernel: str
    shape: str
    calls: Calls
    error: Callable[[], float]
    tolerance: float
    amount: float
    library_amount: float
    unit: tuple[str, float]
    predicted_s: dict[str, float]
    tried: dict[str, float] = dataclasses.field(default_factory=dict)


def predicted_product(hardware: Hardware, flops: float) -> dict[str, float]:
    """Seconds of the library's product in bf16, and of the kernel whose tiles wait."""
    library = product_seconds(Work(flops=flops, world=1), hardware)
    return {"kernel": library * (1 + TILE_LOSS), "library": library}


def predicted_sum(hardware: Hardware, moved: float) -> dict[str, float]:
    """Seconds in which a sum, and a copy, read and write ``moved`` bytes."""
    seconds = moved / (hardware.memory_bytes_per_s * MEMORY_SHARE)
    return {"kernel": seconds, "library": seconds}


def _hardware(device: torch.device) -> Hardware:
    return hardware_for(torch.cuda.get_device_name(device))


def gather_problem(device: torch.device, rows: int, depth: int, width: int, world: int = WORLD) -> Problem:
    """The GEMM whose tiles wait, [world * rows, depth] @ [depth, width] in bf16, all chunks there; and torch.mm."""
    from odysseus_kernels.kernels.configs import Problem as Product
    from odysseus_kernels.kernels.configs import TileConfig
    from odysseus_kernels.kernels.gather_matmul import gather_matmul
    from odysseus_kernels.kernels.tuning import Signals, fastest, run_seconds

    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(scale)

    whole, weight = normal(world * rows, depth), normal(width, depth, scale=depth**-0.5)
    local, gathered = whole[:rows], whole[rows:].view(world - 1, rows, depth)  # as rank 0 visits the ring
    out, expected = (torch.full((world * rows, width), torch.nan, device=device, dtype=whole.dtype) for _ in range(2))
    signals = Signals(world, device)
    tried: dict[str, float] = {}
    latest: list[TileConfig] = []

    def kernel(config: TileConfig | None) -> None:
        if config is not None:
            latest[:] = [config]
        gather_matmul(
            [out],
            local,
            gathered,
            [weight],
            [None],
            rank=0,
            world=world,
            words=signals.words[: world - 1],
            epoch=signals.epoch,
            aborted=signals.aborted,
            control=signals.control,
            config=config,
        )

    # As the operators take it: the fastest of those that are shipped.
    def timed(run: Callable[[], None]) -> float:
        taken = run_seconds(run)
        tried[latest[0].label] = taken
        return taken

    config = fastest("gather_matmul", Product(world, rows, (width,), depth), local, lambda: kernel, seconds=timed)

    def error() -> float:
        checked = torch.randperm(world * rows, generator=generator, device=device)[:_SAMPLES]
        return relative_error(out[checked], whole[checked].float() @ weight.t().float())

    flops = 2.0 * world * rows * depth * width
    return Problem(
        "gather_matmul",
        f"M{world * rows} K{depth} n{width} bf16",
        {"kernel": lambda: kernel(config), "library": lambda: torch.mm(whole, weight.t(), out=expected)},
        error,
        rounding_tolerance(torch.bfloat16, terms=depth),
        flops,
        flops,
        ("TFLOP/s", 1e12),
        predicted_product(_hardware(device), flops),
        tried,
    )


def reduce_problem(device: torch.device, sources: int, count: int) -> Problem:
    """The sum of ``sources`` buffers of ``count`` bf16 elements; and a copy that moves as many bytes."""
    generator = torch.Generator(device).manual_seed(1)
    parts = torch.randn(sources, count, generator=generator, device=device, dtype=torch.bfloat16)
    out = torch.full((count,), torch.nan, device=device, dtype=parts.dtype)
    moved = (sources + 1) * count * parts.element_size()
    origin = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    copy = torch.empty_like(origin)
    native, addresses = _ext.load().cuda, [part.data_ptr() for part in parts]

    def kernel() -> None:
        stream = torch.cuda.current_stream(device).cuda_stream
        native.reduce(stream, out.data_ptr(), "bfloat16", addresses, "bfloat16", count)

    def error() -> float:
        checked = torch.randint(count, (1 << 20,), generator=generator, device=device)
        return relative_error(out[checked], parts[:, checked].float().sum(0))

    return Problem(
        "reduce",
        f"{sources} x {count >> 20} Mi bf16",
        {"kernel": kernel, "library": lambda: copy.copy_(origin)},
        error,
        rounding_tolerance(torch.bfloat16, terms=sources, roundings=1),
        moved,
        2 * origin.numel(),
        ("TB/s", 1e12),
        predicted_sum(_hardware(device), moved),
    )


def _problems(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], Problem]]]:
    for sources in _REDUCE_SOURCES:
        yield f"reduce of {sources}", functools.partial(reduce_problem, device, sources, _REDUCE_COUNT)
    for rows in _LENGTHS[2:3] if quick else _LENGTHS:
        for label, depth, width in gather_shapes(WORLD):
            yield f"gather_matmul {label}, {rows} rows", functools.partial(gather_problem, device, rows, depth, width)


def problem_names(quick: bool) -> list[str]:
    """All rows, by name."""
    return [name for name, _ in _problems(torch.device("cuda", 0), quick)]


def measure_named(name: str, rounds: int, quick: bool) -> dict[str, Any]:
    """One row on the current device, in a process that measures no other."""
    device = torch.device("cuda", torch.cuda.current_device())
    problem = dict(_problems(device, quick))[name]()
    return measure_problem(problem, EventTimer(device), rounds, lambda: torch.cuda.synchronize(device))


def measure(
    device: torch.device,
    *,
    rounds: int,
    quick: bool = False,
    deadline: float = math.inf,
    measured: Measured | None = None,
) -> Measured:
    """All rows that begin before ``deadline`` (of ``time.monotonic``), added to ``measured`` one by one."""
    measured, timer = measured or Measured(), EventTimer(device)
    for name, make in _problems(device, quick):
        if time.monotonic() > deadline:
            measured.not_run.append(name)
            continue
        try:
            measured.rows.append(measure_problem(make(), timer, rounds, lambda: torch.cuda.synchronize(device)))
        except Exception as error:  # noqa: BLE001  # Triton's errors have no other base; the next row may do better
            measured.failed.append({"name": name, "failed": f"{type(error).__name__}: {error}"})
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):  # the device may be what failed; the next row will say so
            torch.cuda.empty_cache()
    measured.notes.append(note_multicast(device.index))
    return measured


def note_multicast(device: int) -> str:
    """Why one kernel has no row."""
    supported = _ext.load().cuda.multimem_supported(device)
    several = "needs several GPUs behind a switch: torchrun --nproc-per-node <GPUs> -m benchmarks.device.switch"
    return f"multimem_reduce: not measured; it {several if supported else 'is not supported by this device'}."


def measure_problem(problem: Problem, timed: Any, rounds: int, synchronize: Callable[[], None]) -> dict[str, Any]:
    """Samples of both calls of a row; the share of the library's speed is None where the result is wrong."""
    host_s = host_seconds(problem.calls, synchronize)
    if isinstance(timed, EventTimer):
        timed.stay_ahead(max(host_s.values()))
    samples = take_turns(problem.calls, rounds=rounds, barrier=lambda: None, synchronize=synchronize, timed=timed)
    error = problem.error()
    right = error <= problem.tolerance
    times = {name: median(values) for name, values in samples.items()}
    unit, scale = problem.unit
    speed, library = problem.amount / times["kernel"], problem.library_amount / times["library"]
    return {
        "kernel": problem.kernel,
        "shape": problem.shape,
        "error": error,
        "tolerance": problem.tolerance,
        "host_s": host_s,
        "samples_s": samples if right else {"library": samples["library"]},
        "speed": f"{speed / scale:.3g} {unit}" if right else "WRONG",
        "library": f"{library / scale:.3g} {unit}",
        "share": speed / library if right else None,
        "medians_s": times if right else {"library": times["library"]},
        "host / kernel": host_s["kernel"] / times["kernel"] if right else None,
        "predicted_s": problem.predicted_s,
        "tried_s": problem.tried,
    }


def main() -> int:
    """Prints the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one length for each shape")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are measured")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    measured = measure(device, rounds=arguments.repeats, quick=arguments.quick)
    print(json.dumps(dataclasses.asdict(measured), indent=1))
    return int(bool(measured.failed) or any(row["share"] is None for row in measured.rows))


if __name__ == "__main__":
    sys.exit(main())
