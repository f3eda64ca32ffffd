"""What each rank does for a timeline: steps of every variant in a trace, of which the one of median length is kept.

The variants take turns within each round.  A variant with a wrong result has no timeline.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import odysseus_kernels as ody
from benchmarks.common.measure import slowest_rank
from benchmarks.common.ranks import gather_texts, largest_over_ranks
from benchmarks.layers.cases import LayerCase, Variant
from benchmarks.layers.workload import LayerWorkload
from benchmarks.operators.cases import Case
from benchmarks.operators.workload import Workload
from benchmarks.timeline.intervals import merge_events

__all__ = ["TimelineSettings", "run_timeline"]

_MODES = ("unfused", "fused")
_SEED = 1


@dataclasses.dataclass(frozen=True)
class TimelineSettings:
    """What all ranks must agree on.

    Attributes:
        operator, layer: what is drawn of each level.
        variants: of the layer; the operator's are unfused and fused.
        transport: of the operator, as of the variants.
        dtype: of all tensors.
        repeats: rounds.
        warm_up: rounds before them.
    """

    operator: Case
    layer: LayerCase
    variants: tuple[Variant, ...]
    transport: str
    dtype: str
    repeats: int
    warm_up: int = 1


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of a variant on this rank: begin and end in microseconds since 1970, and what was traced."""

    begin: float
    end: float
    document: dict[str, Any]
    result: Any


def run_timeline(rank: int, world_size: int, settings: TimelineSettings) -> list[dict[str, Any]]:
    """Traces every variant; returns the panels, the same on all ranks.

    A panel has ``level``, ``what``, ``name``, ``samples_s`` (each round's slowest rank), ``drawn`` (the round that the
    rest is of), ``spans`` and ``events`` (``intervals.py``), or ``refused`` or ``wrong`` (why it has none of these).
    """
    return [*_operator_panels(settings), *_layer_panels(settings)]


def _operator_panels(settings: TimelineSettings) -> list[dict[str, Any]]:
    case, transport = settings.operator, settings.transport
    dtype, device = getattr(torch, settings.dtype), torch.device("cpu")
    work = Workload(case, dtype=dtype, device=device, transports=(transport,), seed=_SEED)
    work.truth  # noqa: B018 - takes long the first time, which must not fall between two steps
    calls = {mode: (lambda mode=mode: work.operate(mode, transport)) for mode in _MODES}

    def why_wrong(name: str, results: tuple[Tensor, ...]) -> str:
        errors = largest_over_ranks(work.errors(results))
        return "" if all(error <= work.tolerance for error in errors.values()) else f"errors {errors}"

    named = {"level": "operator", "what": f"{case.operator}, {case.label} {case.shape}, {case.part}"}
    return [{**named, **panel} for panel in _panels(calls, why_wrong, settings)]


def _layer_panels(settings: TimelineSettings) -> list[dict[str, Any]]:
    work = LayerWorkload(settings.layer, dtype=getattr(torch, settings.dtype), seed=_SEED)
    runnables, refused = {}, []
    for variant in settings.variants:
        try:
            runnables[variant.name] = work.make(variant)
        except ValueError as error:  # on every rank alike, before anything is sent
            refused.append({"name": variant.name, "refused": str(error)})
    work.truth  # noqa: B018
    work.limits  # noqa: B018

    def why_wrong(name: str, output: Tensor) -> str:
        errors = largest_over_ranks(work.errors(runnables[name], output))
        return f"errors {errors}" if work.is_wrong(errors) else ""

    calls = {name: runnable.step for name, runnable in runnables.items()}
    named = {"level": "layer", "what": f"one decoder layer, {settings.layer.sizes}, forward and backward"}
    return [{**named, **panel} for panel in (*_panels(calls, why_wrong, settings), *refused)]


def _panels(
    calls: dict[str, Callable[[], Any]], why_wrong: Callable[[str, Any], str], settings: TimelineSettings
) -> list[dict[str, Any]]:
    steps: dict[str, list[_Step]] = {name: [] for name in calls}
    wrong = {}
    for index in range(settings.warm_up + settings.repeats):
        for name in [name for name in calls if name not in wrong]:
            step = _traced(calls[name])
            if index in (0, settings.warm_up + settings.repeats - 1) and (why := why_wrong(name, step.result)):
                wrong[name] = why  # the same on all ranks
            if index >= settings.warm_up:
                steps[name].append(dataclasses.replace(step, result=None))
    panels: list[dict[str, Any]] = [{"name": name, "wrong": why} for name, why in wrong.items()]
    return [*(_panel(name, taken) for name, taken in steps.items() if name not in wrong), *panels]


def _traced(call: Callable[[], Any]) -> _Step:
    with tempfile.TemporaryDirectory(prefix="odysseus-trace-") as folder:
        dist.barrier()
        with ody.trace(Path(folder) / "step.json") as traced:
            begin = time.time_ns()
            result = call()
            end = time.time_ns()
        document = json.loads(traced.path.read_text())
    return _Step(begin / 1000, end / 1000, document, result)


def _panel(name: str, steps: Sequence[_Step]) -> dict[str, Any]:
    samples = [(step.end - step.begin) / 1e6 for step in steps]
    samples = slowest_rank({name: samples}, dist.get_world_size())[name]
    drawn = samples.index(statistics.median_low(samples))
    step = steps[drawn]
    own = {"span": [step.begin, step.end], "document": step.document}
    everyone = [json.loads(text) for text in gather_texts(json.dumps(own))]
    return {
        "name": name,
        "samples_s": samples,
        "drawn": drawn,
        "spans": [one["span"] for one in everyone],
        "events": merge_events([one["document"] for one in everyone]),
    }
