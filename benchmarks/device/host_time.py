"""What the host takes to enqueue a schedule, without a GPU: ``python -m benchmarks.device.host_time``.

Every program of a call is lowered as for a device and enqueued on a stub that only counts, three ways: each operation
by a call of its own from Python, the runs of operations between two products by one call each, and the whole schedule
by one call that comes back to Python for products alone.  Products are empty.  What a driver takes for each launch
comes on top, and is the same all three ways.

The last column is a whole call of the transport on such a stub, empty products and the second of two equal calls: it
leases windows, finds the program it made before, and enqueues it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.measure import median
from odysseus_kernels import _ext
from odysseus_kernels.comm.device.lowering import WINDOWS, Plan
from odysseus_kernels.comm.device.transport import SymmetricDeviceTransport
from odysseus_kernels.comm.transport import Call, Gather, Scatter
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.testing.rehearsal import BASE_ADDRESSES, STREAM_HANDLES, RehearsedCall, rehearsed
from odysseus_kernels.testing.simulated_device import SimulatedDevice, SimulatedMachine

__all__ = ["LIMIT_US", "measure", "table"]

LIMIT_US = 5.0
"""Microseconds of host time that one operation of a schedule may take."""

CALLS = (
    RehearsedCall("gather", pieces=2),
    RehearsedCall("scatter", pieces=8),
    RehearsedCall("gather+scatter", pieces=4),
    RehearsedCall("gather", layout="ranks", pieces=1),
)


def _nothing() -> None:
    """A product that costs the host nothing."""


def _ways(operations: Any, plan: Plan) -> dict[str, Callable[[], None]]:
    callbacks = [None if action.step is None else _nothing for action in plan.actions]

    def one_by_one() -> None:
        for action, callback in zip(plan.actions, callbacks, strict=True):
            for index in range(action.first, action.last):
                operations.run(index, index + 1, STREAM_HANDLES, BASE_ADDRESSES, 1.0)
            if callback is not None:
                callback()

    def run_by_run() -> None:
        for action, callback in zip(plan.actions, callbacks, strict=True):
            if action.last > action.first:
                operations.run(action.first, action.last, STREAM_HANDLES, BASE_ADDRESSES, 1.0)
            if callback is not None:
                callback()

    def at_once() -> None:
        operations.play(plan.stops, callbacks, STREAM_HANDLES, BASE_ADDRESSES, 1.0)

    return {"one by one": one_by_one, "run by run": run_by_run, "one call": at_once}


class _StubDevice(SimulatedDevice):
    """A device that takes everything and does nothing."""

    def operations(self) -> Any:
        return _ext.load().cuda.host_side.Rehearsal(lists=False)

    def call(self, callback: Callable[[], None]) -> None:
        callback()

    def scratch(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)


def _transport_call(call: RehearsedCall) -> Callable[[], None]:
    """One call of the symmetric transport of devices, of small chunks in as many pieces."""
    transport = SymmetricDeviceTransport(_StubDevice(SimulatedMachine(call.world), call.rank), call.rank, call.world)
    chunk = torch.zeros(1, 64, 128, dtype=torch.bfloat16)
    gather = Gather(chunk, lambda source, start, stop, block: None) if "gather" in call.program else None
    scatter = Scatter(chunk, lambda target, start, stop, block: None) if "scatter" in call.program else None
    made = Call("stub", "forward", OverlapConfig(mode="fused", chunks_per_rank=call.pieces), gather, scatter)
    if call.layout == "ranks":
        whole = torch.zeros(call.world, *chunk.shape, dtype=chunk.dtype)
        return lambda: transport.all_gather(made, whole)
    return lambda: transport.execute(made)


def measure(call: RehearsedCall, rounds: int) -> dict[str, float]:
    """Median seconds of the host for ``call`` each way, and under ``"operations"`` how many there are.

    The ways take turns, so that what else the machine does meets all of them.
    """
    operations = _ext.load().cuda.host_side.Rehearsal(lists=False)
    plan = rehearsed(call, operations)
    ways = {**_ways(operations, plan), "transport": _transport_call(call)}
    for _ in range(2 * WINDOWS):  # every window has its program
        ways["transport"]()
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            samples[name].append(time.perf_counter() - begin)
    return {"operations": len(operations), **{name: median(values) for name, values in samples.items()}}


def table(rows: list[tuple[RehearsedCall, dict[str, float]]]) -> str:
    """Markdown: for each call the microseconds of an operation each way."""
    names = [name for name in rows[0][1] if name != "operations"]
    lines = [
        f"| program | operations | {' | '.join(f'{name} us/operation' for name in names)} | transport us |",
        f"| --- |{' ---: |' * (len(names) + 2)}",
    ]
    for call, found in rows:
        count = found["operations"]
        what = f"{call.program}, {call.layout}, {call.world} ranks, {call.pieces} pieces"
        cells = " | ".join(f"{found[name] / count * 1e6:.3f}" for name in names)
        lines.append(f"| {what} | {count:.0f} | {cells} | {found['transport'] * 1e6:.1f} |")
    return "\n".join(lines)


def main() -> int:
    """Prints the table; 0, 1 if a transport's call took longer than it may, 2 without the CUDA part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500, help="rounds that are measured (default 500)")
    arguments = parser.parse_args()
    if not _ext.has_cuda():
        print(_ext.why_no_cuda(), file=sys.stderr)
        return 2
    rows = [(call, measure(call, arguments.repeats)) for call in CALLS]
    print(table(rows))
    slow = [call for call, found in rows if found["transport"] / found["operations"] > LIMIT_US * 1e-6]
    outcome = "MISSED" if slow else "reached"
    print(f"\nA stub counts, no driver is below. A transport's call: at most {LIMIT_US} us an operation: {outcome}.")
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
