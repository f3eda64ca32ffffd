"""Sums and copies by the NVLink switch beside those from rank to rank: ``reduce="nvls"`` and ``gather="nvls"``.

Run on all GPUs of a machine with NVLink switches::

    torchrun --nproc-per-node 8 -m benchmarks.device.switch --output switch.json

Where no switch adds (one GPU, GPUs without one, CPU ranks) nothing is measured: it says why, and ranks exit with 77.
Every row is one operator's forward pass, unfused and fused, each with and without the switch; what is wrong has no
time.  Beside a row stand the bytes that a rank sends and what the cost model predicts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import odysseus_kernels as ody
from benchmarks.common.measure import EventTimer, median, slowest_rank, take_turns
from benchmarks.common.ranks import largest_over_ranks
from odysseus_kernels.ops import reference
from odysseus_kernels.planner.cost_model import Work, predict
from odysseus_kernels.planner.hardware import hardware_for
from odysseus_kernels.testing.compare import relative_error, rounding_tolerance

__all__ = ["NOT_RUN", "SwitchCase", "main", "measure_case", "switch_cases", "why_not"]

NOT_RUN = 77
_DTYPE = torch.bfloat16
_SETTINGS = {"linear_reduce_scatter": "reduce", "linear_all_reduce": "reduce", "all_gather_linear": "gather"}


@dataclasses.dataclass(frozen=True)
class SwitchCase:
    """One operator's forward pass.

    Attributes:
        operator: its name.
        label: the model whose projection it is.
        tokens: of the whole sequence.
        inner, outer: input and output features as one rank has them.
    """

    operator: str
    label: str
    tokens: int
    inner: int
    outer: int

    @property
    def name(self) -> str:
        return f"{self.operator} {self.label} L{self.tokens} {self.inner}>{self.outer}"


def switch_cases(world: int, tokens: Sequence[int] = (8192, 32768)) -> list[SwitchCase]:
    """Projections of Llama 3 70B: attention's output, scattered or reduced to all, and queries, keys and values."""
    hidden, key_values = 8192, 2048
    return [
        case
        for length in tokens
        for case in (
            SwitchCase("linear_reduce_scatter", "Llama-3-70B output", length, hidden // world, hidden),
            SwitchCase("linear_all_reduce", "Llama-3-70B output", length, hidden // world, hidden),
            SwitchCase("all_gather_linear", "Llama-3-70B QKV", length, hidden, (hidden + key_values) // world),
        )
    ]


def why_not(device: torch.device) -> str:
    """Why no switch adds for the default group's ranks; empty if one does.  All ranks call it."""
    x, weight = torch.ones(8 * dist.get_world_size(), 8, device=device), torch.ones(8, 8, device=device)
    try:
        ody.linear_reduce_scatter(x, weight, group=None, config=ody.OverlapConfig(mode="fused", reduce="nvls"))
        ody.synchronize()
    except ValueError as error:
        return str(error)
    return "" if dist.get_world_size() > 1 else "there is one rank, whose sums need no switch"


def measure_case(
    case: SwitchCase, device: torch.device, rounds: int, movers: Sequence[str] = ("ranks", "nvls")
) -> dict[str, Any]:
    """Samples in seconds of every variant of a row, by ``"mode mover"``, and how exact each is."""
    world, gathers = dist.get_world_size(), case.operator == "all_gather_linear"
    generator = torch.Generator(device).manual_seed(100 + dist.get_rank())

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(shape[-1] ** -0.25).to(_DTYPE)

    x = normal(case.tokens // world if gathers else case.tokens, case.inner)
    weight = normal(case.outer, case.inner)
    operator = getattr(ody, case.operator)

    def variant(mode: Any, mover: str) -> Callable[[], Tensor]:
        config = ody.OverlapConfig(mode=mode, **{_SETTINGS[case.operator]: mover})  # type: ignore[arg-type]
        return lambda: operator(x, weight, group=None, config=config)

    calls = {f"{mode} {mover}": variant(mode, mover) for mode in ("unfused", "fused") for mover in movers}
    truth = getattr(reference, f"{case.operator}_reference")(x.float(), weight.float(), group=dist.group.WORLD)
    host_s, errors, sent = dict[str, float](), dict[str, float](), dict[str, int]()
    for name, call in calls.items():
        for _ in range(3):  # windows of all leases exist afterwards
            with ody.CommRecorder() as record:
                begin = time.perf_counter()
                found = call()
            host_s[name] = time.perf_counter() - begin  # at the last time: the first ones compile and load
            ody.synchronize()
        errors[name], sent[name] = relative_error(found, truth), record.bytes()
    errors = largest_over_ranks(errors)
    timer = EventTimer(device) if device.type == "cuda" else None
    if timer is not None:
        timer.stay_ahead(max(host_s.values()))
    host_s = largest_over_ranks(host_s)
    samples = slowest_rank(
        take_turns(calls, rounds=rounds, barrier=dist.barrier, synchronize=ody.synchronize, timed=timer), world
    )
    terms = case.inner if gathers else case.inner * world
    tolerance = rounding_tolerance(_DTYPE, terms=terms, roundings=2)
    right = {name: bool(errors[name] <= tolerance) for name in calls}
    return {
        "name": case.name,
        "errors": errors,
        "tolerance": tolerance,
        "sent_bytes": sent,
        # Where a call is complete when it returns, that is no time of the host's own.
        "host_s": host_s if device.type == "cuda" else {},
        "predicted_s": {name: _predicted(case, world, device, *name.split()) for name in calls},
        "samples_s": {name: values for name, values in samples.items() if right[name]},
        "median_s": {name: median(values) for name, values in samples.items() if right[name]},
    }


def _predicted(case: SwitchCase, world: int, device: torch.device, mode: str, mover: str) -> float:
    moved = case.tokens // world * (case.inner if case.operator == "all_gather_linear" else case.outer)
    work = Work(
        flops=2.0 * case.tokens * case.inner * case.outer,
        world=world,
        gathered_bytes=0 if case.operator == "linear_reduce_scatter" else moved * _DTYPE.itemsize,
        scattered_bytes=0 if case.operator == "all_gather_linear" else moved * _DTYPE.itemsize,
        switched=mover == "nvls",
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return predict(work, hardware_for(name), (mode,))[mode]


def main() -> int:
    """Prints a table, and writes all samples where it is told to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="lengths of the whole sequence")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are measured")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file of all samples")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        device = torch.device("cuda", dist.get_node_local_rank(0)) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        reason, first = why_not(device), dist.get_rank() == 0
        if reason:
            if first:
                print(f"not run: {reason}")
            return NOT_RUN
        rows = []
        for case in switch_cases(dist.get_world_size(), arguments.tokens):
            rows.append(measure_case(case, device, arguments.repeats))
            if first:
                print(_line(rows[-1]), flush=True)
        if first and arguments.output is not None:
            arguments.output.write_text(json.dumps({"world": dist.get_world_size(), "rows": rows}, indent=1) + "\n")
        return int(any(len(row["median_s"]) < len(row["errors"]) for row in rows))
    finally:
        dist.destroy_process_group()


def _line(row: dict[str, Any]) -> str:
    return f"{row['name']}: {', '.join(_time(row, name) for name in row['errors'])}"


def _time(row: dict[str, Any], name: str) -> str:
    if name not in row["median_s"]:
        return f"{name} WRONG ({row['errors'][name]:.1e})"
    beside = f"predicted {row['predicted_s'][name] * 1e3:.3f}{_host(row, name)}"
    return f"{name} {row['median_s'][name] * 1e3:.3f} ms ({beside})"


def _host(row: dict[str, Any], name: str) -> str:
    """The host's time over the device's: above 1 the device waits for the host."""
    enqueued = row["host_s"].get(name)
    return "" if enqueued is None else f", host/device {enqueued / row['median_s'][name]:.2f}"


if __name__ == "__main__":
    sys.exit(main())
