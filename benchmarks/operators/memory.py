"""Memory that an operator needs beside its inputs, outputs and gradients.

Two parts, both exact: what the call allocates through torch and holds at one moment (taken from the profiler's record
of every allocation and release, results left out by their addresses), and the buffers that the transport keeps for the
group (``reserved_bytes``).  A group of its own for each measurement keeps other rows' buffers out.  What Gloo or NCCL
allocate inside themselves is in neither, so the figures of the collective transport and of torch are lower bounds.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.operators.cases import Case
from benchmarks.operators.workload import Workload
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.config import OverlapConfig

if TYPE_CHECKING:
    from benchmarks.operators.run import Settings

__all__ = ["AllocationEvent", "measure_memory", "peak_of_others", "process_growth", "record_allocations"]

_WARM_UP_CALLS = 3
"""Until the transport's buffers have been used in turn and grow no more."""


@dataclasses.dataclass(frozen=True)
class AllocationEvent:
    """An allocation (``size`` > 0) or release (``size`` < 0) of ``size`` bytes at ``address``."""

    time: float
    address: int
    size: int


def measure_memory(case: Case, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Peak extra bytes of each variant of one row, the largest over the ranks."""
    work = Workload(
        case, dtype=getattr(torch, settings.dtype), device=device, transports=settings.transports, seed=settings.seed
    )
    variants = [(mode, transport) for transport in settings.transports for mode in ("unfused", "fused")]
    variants.append(("torch", "auto"))
    measured = {}
    for mode, transport in variants:
        group = dist.new_group()
        assert isinstance(group, dist.ProcessGroup)

        def call(mode: Any = mode, transport: str = transport, group: Any = group) -> tuple[Tensor, ...]:
            return work.operate(mode, transport, group)

        for _ in range(_WARM_UP_CALLS):
            call()
        dist.barrier()
        results, events = record_allocations(call)
        private, largest = peak_of_others(events, {r.untyped_storage().data_ptr() for r in results})
        del results
        dist.barrier()
        grown = process_growth(call)
        reserved = 0
        if mode != "torch":
            transports = group_transports(group)
            reserved = transports.choose(OverlapConfig(transport=transport), device).reserved_bytes  # type: ignore[arg-type]
            dist.barrier()
            transports.close()
        dist.destroy_process_group(group)
        name = mode if mode == "torch" else f"{mode} {transport}"
        measured[name] = _largest_over_ranks(
            private_peak=private, largest_allocation=largest, reserved=reserved, process_growth=grown
        )
    return {
        **dataclasses.asdict(case),
        "part": case.part,
        "shape": case.shape,
        "chunk_bytes": work.chunk_bytes,
        "gathered_bytes": work.chunk_bytes * dist.get_world_size(),
        "bytes": measured,
    }


def record_allocations(call: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], list[AllocationEvent]]:
    """Runs ``call`` and lists what this thread allocated and released meanwhile, in order of time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    events = [
        AllocationEvent(event["ts"], event["args"]["Addr"], event["args"]["Bytes"])
        for event in trace
        if event.get("name") == "[memory]"
    ]
    return results, sorted(events, key=lambda event: event.time)


def peak_of_others(events: Iterable[AllocationEvent], results: set[int]) -> tuple[int, int]:
    """Most bytes held at one moment that are not results, and the largest single block among them.

    Args:
        events: in order of time; releases of what was allocated before the first event are ignored.
        results: addresses of storages that are alive after the last event.  An address can be used several times;
            only its last block is the result.
    """
    events = list(events)
    last_use = {event.address: index for index, event in enumerate(events) if event.size > 0}
    live: dict[int, int] = {}
    held = peak = largest = 0
    for index, event in enumerate(events):
        if event.size > 0:
            if event.address in results and last_use[event.address] == index:
                continue
            live[event.address] = event.size
            held += event.size
            peak, largest = max(peak, held), max(largest, event.size)
        else:
            held -= live.pop(event.address, 0)
    return peak, largest


def process_growth(call: Callable[[], Sequence[Tensor]]) -> int:
    """Bytes by which this process' peak during ``call`` exceeds what it had before plus the results; -1 if unknown.

    Pages of shared memory that were touched in an earlier call are not growth.
    """
    if sys.platform != "linux":
        return -1
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide new allocations
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    except OSError:
        return -1
    before = _status_bytes("VmRSS")
    results = call()
    return max(0, _status_bytes("VmHWM") - before - sum(result.untyped_storage().nbytes() for result in results))


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {field}"
    return int(found.group(1)) * 1024


def _largest_over_ranks(**values: int) -> dict[str, int]:
    tensor = torch.tensor(list(values.values()), dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    merged = dict(zip(values, tensor.tolist(), strict=True))
    return {**merged, "extra": merged["private_peak"] + merged["reserved"]}
