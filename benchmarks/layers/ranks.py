"""What each rank does for ``--level layer`` and ``--level model``: one case after another, as plain values.

Every variant of a case is made, stepped, and checked against the single process; its bytes and memory are taken outside
of the timing; then all take turns within each round (``measure.py``).  A variant with a wrong result has no time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common.measure import slowest_rank, take_turns
from benchmarks.common.ranks import bytes_on_interface, largest_over_ranks, with_progress, worse
from benchmarks.layers import peers
from benchmarks.layers.cases import LayerCase, Variant
from benchmarks.layers.checks import measure_checks
from benchmarks.layers.memory import expected_saved, measure_memory_of_step
from benchmarks.layers.runnable import Runnable
from benchmarks.layers.workload import LayerWorkload
from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.planner import formulas

__all__ = ["LayerSettings", "expected_traffic", "run_layer_rows"]

Bytes = dict[str, int]
_OPERATORS = (
    "all_gather_linear",
    "linear_reduce_scatter",
    "column_parallel_linear",
    "linear_all_reduce",
    "zero3_linear",
    "linear_all_to_all",
    "all_to_all_linear",
    "ring_attention",
    "replicated_parameter",
    "zero3_linear_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "sequence_loss",
    "pipelined_attention",
    "pipelined_ulysses",
)
"""Operators that the formulas are about; positions and masks are counted beside them."""


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """What all ranks must agree on."""

    rows: tuple[LayerCase, ...]
    variants: tuple[Variant, ...]
    dtype: str
    repeats: int
    warm_up: int = 1
    seed: int = 1
    memory: bool = True
    check_calls: int = 200
    """How often each of the checks of a step is timed by itself (checks.py)."""
    interface: str = ""
    """Network interface by whose counter every variant's bytes are taken, too; empty: by none."""


def run_layer_rows(rank: int, world_size: int, settings: LayerSettings) -> list[dict[str, Any]]:
    """Measures every case; returns what is written to the JSON file, the same on all ranks."""
    return [_measure(case, settings) for case in with_progress(settings.rows, visible=rank == 0)]


def _measure(case: LayerCase, settings: LayerSettings) -> dict[str, Any]:
    dtype = getattr(torch, settings.dtype)
    work = LayerWorkload(case, dtype=dtype, seed=settings.seed)
    runnables: dict[str, Runnable] = {}
    refused: dict[str, str] = {}
    for variant in settings.variants:
        try:
            runnables[variant.name] = (
                peers.make_peer(variant.name, work) if variant.kind == "peer" else work.make(variant)
            )
        except ValueError as error:  # raised on every rank alike, before anything is sent
            refused[variant.name] = str(error)
    variants = {v.name: v for v in settings.variants if v.name in runnables}
    checked = [name for name, v in variants.items() if v.kind != "alone"]
    work.truth  # noqa: B018 - takes long the first time, which must not fall between two timed calls
    work.limits  # noqa: B018
    errors: dict[str, dict[str, float]] = {}

    def check(name: str, output: Tensor) -> None:
        if name in checked:
            found = largest_over_ranks(work.errors(runnables[name], output))
            before = errors.get(name, {})
            errors[name] = {what: worse(before.get(what, 0.0), error) for what, error in found.items()}

    def wrong() -> list[str]:
        return [name for name in checked if work.is_wrong(errors[name])]

    def turns(names: list[str], rounds: int) -> dict[str, list[float]]:
        calls: dict[str, Callable[[], Tensor]] = {name: runnables[name].step for name in names}
        return take_turns(calls, rounds=rounds, barrier=dist.barrier, synchronize=lambda: None, last=check)

    turns(list(runnables), settings.warm_up)
    first_wrong = wrong()
    sent, memory, on_interface = {}, {}, {}

    def counted_step(name: str) -> None:
        if settings.interface:
            on_interface[name] = bytes_on_interface(settings.interface, runnables[name].step)
        else:
            runnables[name].step()

    for name, variant in variants.items():
        if variant.kind == "ours" and name not in first_wrong:
            sent[name] = _bytes(case, variant, work, functools.partial(counted_step, name), dtype)
        elif variant.kind == "peer" and settings.interface and name not in first_wrong:
            counted_step(name)
        if settings.memory and name not in first_wrong:
            dist.barrier()
            memory[name] = _memory(case, variant, work, runnables[name], dtype)
    samples = turns([name for name in runnables if name not in first_wrong], settings.repeats)
    samples = slowest_rank(samples, work.world)
    ours = [name for name in samples if variants[name].kind == "ours"]
    checks = {name: measure_checks(work.batch, runnables[name], settings.check_calls) for name in ours}
    return {
        **dataclasses.asdict(case),
        "sizes": case.sizes,
        "flops_per_rank": case.flops(work.world),
        "world": work.world,
        "variants": {name: {**dataclasses.asdict(v), "alone": v.alone} for name, v in variants.items()},
        "refused": refused,
        "truth": str(work.truth.dtype).removeprefix("torch."),
        "limits": dataclasses.asdict(work.limits),
        "loss": work.truth.output.item() if case.level == "model" else None,
        "errors": errors,
        "wrong": wrong(),
        "bytes": sent,
        "peer_bytes": {
            name: _peer_bytes(case, v, work.world, dtype) for name, v in variants.items() if v.kind == "peer"
        },
        "interface_bytes": on_interface,
        "memory": memory,
        "checks": checks,
        # A time of a wrong result is no time.
        "samples_s": {name: values for name, values in samples.items() if name not in wrong()},
    }


def expected_traffic(case: LayerCase, variant: Variant, world: int, element_size: int) -> formulas.Traffic:
    """Bytes that the formulas say each rank sends in a step: layers, last norm, and what a model has beside them.

    ``world``: ranks of ring and seq together.
    """
    seq, ring, strategy = world // variant.ring, variant.ring, variant.strategy
    sizes: dict[str, int] = {"ring": ring, "element_size": element_size}
    layer = formulas.traffic(case.shape, strategy, seq, tokens=case.tokens, gathered=variant.gathered, **sizes)  # type: ignore[arg-type]
    parts = [layer] * case.layers + [formulas.replicated_traffic(case.hidden, strategy, seq, **sizes)]
    if case.level == "model":
        parts.append(formulas.replicated_traffic(case.vocabulary * case.hidden, strategy, seq, **sizes))
        head = formulas.head_traffic(case.vocabulary, case.hidden, strategy, seq, tokens=case.tokens, **sizes)
        parts.append(head)
    total: formulas.Traffic = {}
    for part in parts:
        for key, count in part.items():
            total[key] = total.get(key, 0) + count
    return total


def _peer_bytes(case: LayerCase, peer: Variant, world: int, dtype: torch.dtype) -> int:
    """What its collectives have to send in a step: the nearest strategy's, which keeps gathered inputs, as it does."""
    twin = dataclasses.replace(peer, kind="ours", strategy=peer.nearest, gathered="save")
    return sum(expected_traffic(case, twin, world, dtype.itemsize).values())


def _bytes(
    case: LayerCase, variant: Variant, work: LayerWorkload, step: Callable[[], None], dtype: torch.dtype
) -> dict[str, Any]:
    """What the recorder counts in a step, on the rank that sends most, beside the formula."""
    dist.barrier()
    with CommRecorder() as record:
        step()
    pipelined = variant.pipeline is not None
    counted: dict[str, int] = {}
    beside: dict[str, int] = {}
    for row in record.rows():
        place = counted if row["operator"] in _OPERATORS else beside
        name = _traffic_name(str(row["phase"]), str(row["operator"]), str(row["collective"]), pipelined=pipelined)
        place[name] = place.get(name, 0) + int(row["bytes"])
    expected = expected_traffic(case, variant, work.world, dtype.itemsize)
    formula: dict[str, int] = {}
    for key, count in expected.items():
        name = _traffic_name(*key, pipelined=pipelined)
        formula[name] = formula.get(name, 0) + count
    # Every rank must agree with the formula, which is the same for all of them.
    unequal = torch.tensor([int(counted != formula)])
    dist.all_reduce(unequal)
    return {"recorded": counted, "formula": formula, "beside": beside, "equal": unequal.item() == 0}


def _traffic_name(phase: str, operator: str, collective: str, *, pipelined: bool) -> str:
    """A pipelined block is one operator, and sends what its two linear operators would: all three have one name."""
    if pipelined and operator in ("all_gather_linear", "linear_reduce_scatter"):
        operator = "pipelined_attention"
    if pipelined and operator in ("linear_all_to_all", "all_to_all_linear"):
        operator = "pipelined_ulysses"
    return f"{phase} {operator} {collective}"


def _memory(
    case: LayerCase, variant: Variant, work: LayerWorkload, runnable: Runnable, dtype: torch.dtype
) -> dict[str, Any]:
    found: dict[str, Any] = largest_over_ranks(measure_memory_of_step(runnable, variant))
    if variant.kind == "ours" and (variant.pipeline is None or variant.strategy == "ulysses"):
        found["formula"] = expected_saved(case, variant, work.world, dtype.itemsize)
    return found
