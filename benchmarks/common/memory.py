"""What a call allocates through torch and holds at one moment, and what its process does."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["AllocationEvent", "peak_of_others", "process_growth", "record_allocations"]


@dataclasses.dataclass(frozen=True)
class AllocationEvent:
    """An allocation (``size`` > 0) or release (``size`` < 0) of ``size`` bytes at ``address``."""

    time: float
    address: int
    size: int


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
