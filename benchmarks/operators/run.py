"""What each rank does: measures the rows one after another and hands back plain values.

Runs in processes that ``overlap.py`` starts, or under torchrun; the process group is there already.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common.measure import host_seconds, slowest_rank, take_turns
from benchmarks.common.ranks import largest_over_ranks, with_progress, worse
from benchmarks.operators.cases import Case
from benchmarks.operators.memory import measure_memory
from benchmarks.operators.predictions import predicted_seconds
from benchmarks.operators.workload import Settings, Workload
from odysseus_kernels.comm.recorder import CommRecorder

__all__ = ["run_rows"]

WARM_UP_ROUNDS = 2


def run_rows(rank: int, world_size: int, settings: Settings) -> list[dict[str, Any]]:
    """Measures every row; returns what is written to the JSON file, the same on all ranks."""
    device = torch.device(settings.device, rank % max(torch.cuda.device_count(), 1))
    if settings.device == "cpu":
        device = torch.device("cpu")
    else:
        torch.cuda.set_device(device)
    measure = measure_memory if settings.memory else measure_time
    return [measure(case, settings, device) for case in with_progress(settings.rows, visible=rank == 0)]


def measure_time(case: Case, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Samples and errors of all variants of one row."""
    work = Workload(
        case, dtype=getattr(torch, settings.dtype), device=device, transports=settings.transports, seed=settings.seed
    )
    calls = {name: call for name, call in work.calls().items() if name == "gemm" or re.search(settings.variants, name)}
    checked = [name for name in calls if work.is_checked(name)]
    errors: dict[str, dict[str, float]] = {name: {} for name in checked}

    def check(name: str, results: Sequence[torch.Tensor]) -> None:
        if name in errors:
            for what, error in work.errors([r.cpu() for r in results]).items():
                errors[name][what] = worse(errors[name].get(what, 0.0), error)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work.truth  # noqa: B018 - takes long the first time, which must not fall between two timed calls
    host_s: dict[str, float] = {}
    predicted_s: dict[str, float] = {}
    if device.type == "cuda":  # elsewhere a call is complete when it returns
        host_s = largest_over_ranks(host_seconds(calls, synchronize))
        predicted_s = predicted_seconds(case, work.world, settings.dtype, torch.cuda.get_device_name(device))
    take_turns(calls, rounds=WARM_UP_ROUNDS, barrier=dist.barrier, synchronize=synchronize, last=check)
    wrong = _wrong(errors, work.tolerance)
    timed = {name: call for name, call in calls.items() if name not in wrong}
    samples = take_turns(timed, rounds=settings.repeats, barrier=dist.barrier, synchronize=synchronize, last=check)
    wrong = _wrong(errors, work.tolerance)
    samples = slowest_rank(samples, dist.get_world_size())
    sent = {}
    if settings.count_bytes:
        for name in (name for name in samples if name.partition(" ")[0] in ("unfused", "fused")):
            dist.barrier()
            with CommRecorder() as record:
                calls[name]()
            sent[name] = largest_over_ranks({"sent": record.bytes()})["sent"]
    return {
        **dataclasses.asdict(case),
        "part": case.part,
        "shape": case.shape,
        "flops_per_rank": case.flops(dist.get_world_size()),
        "tolerance": work.tolerance,
        "errors": _worst_rank(errors),
        "wrong": wrong,
        "no_torch_fused": work.no_torch_fused,
        "bytes": sent,
        "host_s": host_s,
        "predicted_s": predicted_s,
        # A time of a wrong result is no time.
        "samples_s": {name: values for name, values in samples.items() if name not in wrong},
    }


def _wrong(errors: dict[str, dict[str, float]], tolerance: float) -> list[str]:
    """Names of the variants with a wrong result on any rank; the same on all ranks."""
    return [n for n, found in _worst_rank(errors).items() if not all(e <= tolerance for e in found.values())]


def _worst_rank(errors: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    flat = [(name, what) for name, found in errors.items() for what in found]
    mine = torch.tensor([errors[name][what] for name, what in flat], dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    worst = torch.stack(everyone).amax(0).tolist()  # amax keeps NaN
    result: dict[str, dict[str, float]] = {name: {} for name in errors}
    for (name, what), error in zip(flat, worst, strict=True):
        result[name][what] = error
    return result
