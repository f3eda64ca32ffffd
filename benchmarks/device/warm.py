"""Compiles what the benchmark will launch, before anything is timed: ``python -m benchmarks.device.warm``.

Triton keeps what it compiled in its cache (TRITON_CACHE_DIR), where the processes of rows then find it.  Each process
here, of which as many run as there are cores, runs one operator in one shipped configuration of its kernels, on a short
sequence whose sizes compile to the same code as the benchmark's.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import math
import multiprocessing
import os
import sys
import time
from typing import get_args
from unittest import mock

import torch

from benchmarks.device.cases import WORLD, EmulatedCase, make_emulated_cases
from benchmarks.device.workload import EmulatedWorkload, emulate, fake_group
from odysseus_kernels.kernels import launch, tuning
from odysseus_kernels.kernels.configs import Kernel, shipped

__all__ = ["compile_case", "warm_cases", "warm_jobs"]

_TOKENS = 1024 * WORLD
_KERNELS: dict[tuple[str, str], tuple[Kernel, ...]] = {
    ("all_gather_linear", "forward"): ("gather_matmul",),
    ("all_gather_linear", "backward"): ("matmul_scatter", "weight_gradient"),
    ("linear_reduce_scatter", "forward"): ("matmul_scatter",),
    ("linear_reduce_scatter", "backward"): ("gather_matmul", "weight_gradient"),
}


def warm_cases() -> list[EmulatedCase]:
    """One for each operator and phase, over a link on which its kernels can run."""
    cases: dict[tuple[str, str], EmulatedCase] = {}
    for case in make_emulated_cases(("pcie",)):
        if case.tokens == _TOKENS:
            cases.setdefault((case.operator, case.phase), case)
    return list(cases.values())


def warm_jobs() -> list[tuple[EmulatedCase, int]]:
    """Each of :func:`warm_cases` with the number of every configuration that one of its kernels has somewhere."""
    most = {
        kernel: max(len(shipped(kernel, architecture, torch.bfloat16)) for architecture in (80, 90, 100))
        for kernel in get_args(Kernel)
    }
    cases = warm_cases()
    counts = [max(most[kernel] for kernel in _KERNELS[case.operator, case.phase]) for case in cases]
    return [
        (case, index)
        for index in range(max(counts))
        for case, count in zip(cases, counts, strict=True)
        if index < count
    ]


def compile_case(case: EmulatedCase, index: int) -> float:
    """Runs ``case`` once with configuration ``index`` of each kernel alone (modulo their number); returns seconds."""
    begin = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    all_of = tuning.candidates

    def one(*arguments: object) -> list[object]:
        found = all_of(*arguments)  # type: ignore[arg-type]
        return [found[index % len(found)]]

    with (
        mock.patch.object(tuning, "candidates", one),
        mock.patch.object(launch, "candidates", one),
        fake_group(WORLD) as group,
        emulate(device, group, case.link, [case]) as emulation,
    ):
        EmulatedWorkload(case, emulation).run_tiles()
        emulation.transport.synchronize()
    return time.monotonic() - begin


def main() -> int:
    """Compiles; 1 where something could not be compiled, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="give up after so long")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false", file=sys.stderr)
        return 2
    jobs = warm_jobs()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.device.warm"])
    failed = 0
    pool = concurrent.futures.ProcessPoolExecutor(arguments.processes, mp_context=context, max_tasks_per_child=1)
    with pool:
        futures = {pool.submit(compile_case, *job): job for job in jobs}
        for future in concurrent.futures.as_completed(
            futures, None if math.isinf(arguments.limit) else arguments.limit
        ):
            case, index = futures[future]
            name = f"{case.operator} {case.phase}, configuration {index}"
            if (error := future.exception()) is not None:
                failed += 1
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
            else:
                print(f"{name}: {future.result():.1f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
