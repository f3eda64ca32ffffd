"""Which strategy and mesh to train a model with: every split that it can have, with what it sends, takes and keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from odysseus_kernels.planner.cost_model import MODEL_MARGIN
from odysseus_kernels.planner.formulas import STRATEGIES
from odysseus_kernels.planner.planning.machines import Machine, machine_for
from odysseus_kernels.planner.planning.measured import with_measured
from odysseus_kernels.planner.planning.models import ModelSizes, model_sizes
from odysseus_kernels.planner.planning.pipelining import Form, Pipeline, form_of
from odysseus_kernels.planner.planning.split_bytes import StepTraffic, step_traffic
from odysseus_kernels.planner.planning.split_memory import (
    ESTIMATED,
    SplitMemory,
    elements_of,
    layer_saved,
    split_memory,
)
from odysseus_kernels.planner.planning.split_seconds import SplitSeconds, split_seconds
from odysseus_kernels.planner.planning.splits import Split, largest_seq, possible_splits

__all__ = ["Plan", "SplitPlan", "comparison", "evaluate_split", "plan"]

_ELEMENT_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_BOUND_BY_LINK = 0.1
"""Share of a step from which exposed communication is what binds it."""


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """What a step takes under one split.

    Attributes:
        split: strategy and mesh.
        padded: tokens of each sequence, padding included.
        pieces: in which a pipelined attention gathers it; 1 where it does not.
        head_groups: in which Ulysses' pipelined attention takes each rank's heads; 1 where it does not.
        traffic: bytes that each rank sends.
        seconds: compute and exposed communication.
        memory: bytes of each rank.
        fits: whether that is less than the device has.
        tokens_per_s: of all ranks together, padding not counted.
        binds: ``"memory"`` where it does not fit, ``"link"`` where a tenth of the step or more waits for one within a
            host, ``"network"`` for one between hosts, ``"heads"`` where that is because heads allow no more ranks of
            seq, else ``"compute"``.
    """

    split: Split
    padded: int
    pieces: int
    head_groups: int
    traffic: StepTraffic
    seconds: SplitSeconds
    memory: SplitMemory
    fits: bool
    tokens_per_s: float
    binds: str

    def as_dict(self) -> dict[str, Any]:
        """Numbers and texts only, for JSON."""
        return {
            "strategy": self.split.strategy,
            "seq": self.split.seq,
            "ring": self.split.ring,
            "dp": self.split.dp,
            "padded_length": self.padded,
            "pieces": self.pieces,
            "head_groups": self.head_groups,
            "bytes": self.traffic.by_collective(),
            "seconds": {**dataclasses.asdict(self.seconds), "step": self.seconds.step},
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "fits": self.fits,
            "tokens_per_s": self.tokens_per_s,
            "binds": self.binds,
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """All splits of a model on a machine, the fastest that fits first; those that do not fit follow, fastest first.

    Attributes:
        model, machine: what runs where.
        world_size, seq_len, batch, checkpointing, offload, dtype: as given to :func:`plan`.
        splits: see above.
        refused: why splits were left out, by strategy, each reason once.
        notes: what a reader has to know about the numbers: padding, estimates, measured rates.
    """

    model: ModelSizes
    machine: Machine
    world_size: int
    seq_len: int
    batch: int
    checkpointing: bool
    offload: bool
    dtype: str
    splits: tuple[SplitPlan, ...]
    refused: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    @property
    def best(self) -> SplitPlan | None:
        """The fastest split that fits, or None where none does."""
        return self.splits[0] if self.splits[0].fits else None

    @property
    def why(self) -> str:
        """One sentence: why the first split comes before the second."""
        if self.best is None:
            least = min(self.splits, key=lambda one: one.memory.total)
            return (
                f"Nothing fits: {least.split.name} needs the least, {_gigabytes(least.memory.total)}, and a device has "
                f"{_gigabytes(self.machine.device.memory_bytes)}{_advice(self, least.memory)}."
            )
        if len(self.splits) == 1:
            return f"{self.best.split.name} is the only split."
        return comparison(*self.splits[:2])

    def as_dict(self) -> dict[str, Any]:
        """Numbers and texts only, for JSON."""
        memory = self.machine.device.memory_bytes
        return {
            "model": self.model.name,
            "parameters": self.model.parameters,
            "hardware": self.machine.name,
            "source": self.machine.source,
            "memory_bytes": memory if math.isfinite(memory) else None,
            "world_size": self.world_size,
            "seq_len": self.seq_len,
            "batch": self.batch,
            "checkpointing": self.checkpointing,
            "offload": self.offload,
            "dtype": self.dtype,
            "why": self.why,
            "splits": [one.as_dict() for one in self.splits],
            "refused": {strategy: list(reasons) for strategy, reasons in self.refused.items()},
            "notes": list(self.notes),
        }


def plan(
    model_config: Any,
    world_size: int,
    seq_len: int,
    hardware: str = "h200-nvlink",
    batch: int = 1,
    checkpointing: bool = False,
    offload: bool = False,
    dtype: str = "bfloat16",
    measured: str | Path | None = None,
    strategies: tuple[str, ...] = STRATEGIES,
    pipeline: Pipeline = "auto",
) -> Plan:
    """Predicts a training step under every strategy and mesh that a model can have on so many ranks.

    Nothing runs: bytes and what backward keeps are the package's formulas, which its recorder and an allocator confirm;
    seconds are a model's, from data sheets or from ``measured`` rates (see ``planner/planning/split_seconds.py``), and
    weights, gradients and Adam are counted as strategies place them. Ranks are numbered along seq, then ring, then dp,
    hosts hold as many as the machine says, and a group that spans hosts goes at the network's rate. dp is
    ``fully_shard`` around the parallelized model. There is no gradient accumulation: all of the batch is one step.

    Args:
        model_config: a bundled name (``"llama-3.1-8b"``), the path of a ``config.json`` or of its folder, its contents,
            or a configuration of transformers.
        world_size: ranks, all of which are used.
        seq_len: tokens of each sequence; padded as :func:`shard_sequence` pads.
        hardware: ``"h200-nvlink"``, ``"a100-pcie+100g"``, ``"cpu"``, a link of the scale model (``"h100-nvlink@8"``)
            and so on.
        batch: sequences of a step, in all.
        checkpointing: whether each decoder layer is recomputed in backward.
        offload: whether layers' inputs go to the host's memory meanwhile (:func:`offload_activations`); with
            ``checkpointing`` only.
        dtype: of weights and activations; ``"bfloat16"`` and ``"float16"`` have fp32 gradients and master weights.
        measured: a results file of ``benchmarks/overlap.py``, whose rates replace those of the table.
        strategies: which to look at.
        pipeline: as in :class:`OverlapConfig`, which decides how attention is taken; where that cannot be had, whole. A
            note says which form each strategy has.

    Returns:
        The splits in order, the sentence ``why``, and ``as_dict()`` for JSON; ``python -m odysseus_kernels plan``
        prints it as a table.

    Raises:
        ValueError: an unknown model, machine, strategy or type, numbers that are not positive, a results file that
            does not fit, or a model of which no split is possible.

    Example:
        >>> found = ody.plan("llama-3.1-8b", world_size=8, seq_len=65536, hardware="h200-nvlink", checkpointing=True)
        >>> found.best.split.everyone, found.best.fits
        (8, True)
        >>> sorted({one.split.strategy for one in found.splits})
        ['odysseus', 'tp', 'tp_sp', 'tsp', 'ulysses']
        >>> found.best.seconds.step == min(one.seconds.step for one in found.splits if one.fits)
        True
    """
    for name, number in (("world_size", world_size), ("seq_len", seq_len), ("batch", batch)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: expected a whole number above 0, got {number!r}")
    dtype = dtype.removeprefix("torch.")
    if dtype not in _ELEMENT_SIZES:
        raise ValueError(f"dtype: expected one of {', '.join(_ELEMENT_SIZES)}, got {dtype!r}")
    unknown = [name for name in strategies if name not in STRATEGIES]
    if unknown or not strategies:
        raise ValueError(f"strategies: expected some of {', '.join(STRATEGIES)}, got {', '.join(unknown) or 'none'}")
    if offload and not checkpointing:
        raise ValueError("offload: expected checkpointing=True: what goes to the host are the inputs that it keeps")
    model, machine = model_sizes(model_config), machine_for(hardware)
    notes = [f"predictions: differences below {MODEL_MARGIN:.0%} are within the model's error", *_notes(model)]
    if measured is not None:
        machine, from_file = with_measured(machine, measured, dtype)
        notes += from_file
    found: list[SplitPlan] = []
    refused: dict[str, list[str]] = {}
    for split, reason in possible_splits(model, world_size, batch, tuple(strategies)):
        if reason:
            refused.setdefault(split.strategy, []).append(f"{split.name}: {reason}")
        else:
            found.append(evaluate_split(model, split, machine, seq_len, batch, checkpointing, offload, dtype, pipeline))
    if not found:
        raise ValueError(
            f"{model.name}: no split of {world_size} ranks for a batch of {batch} is possible: {_summary(refused)}"
        )
    notes.append(_forms(found, pipeline))
    found.sort(key=lambda one: (not one.fits, one.seconds.step))
    if world_size > machine.node > 1:
        notes.append(
            "network: a group that spans hosts goes at the network's rate throughout; collectives in two levels, which "
            "send each host its part once, are not modelled"
        )
    padded = found[0].padded
    if padded != seq_len:
        notes.append(f"seq_len: {seq_len:,} is padded to {padded:,} under {found[0].split.name}")
    return Plan(
        model,
        machine,
        world_size,
        seq_len,
        batch,
        checkpointing,
        offload,
        dtype,
        tuple(found),
        {strategy: tuple(reasons) for strategy, reasons in refused.items()},
        tuple(notes),
    )


def evaluate_split(
    model: ModelSizes,
    split: Split,
    machine: Machine,
    seq_len: int,
    batch: int,
    checkpointing: bool,
    offload: bool,
    dtype: str,
    pipeline: Pipeline = "auto",
) -> SplitPlan:
    """One split's prediction; arguments as those of :func:`plan`, and what it has made of them."""
    size, form = _ELEMENT_SIZES[dtype], form_of(model, split, machine, length=seq_len, dtype=dtype, pipeline=pipeline)
    padded = split.padded(seq_len, form.pieces)
    tokens = padded * (batch // split.dp)
    sent = step_traffic(
        model,
        split,
        elements_of(model, split),
        tokens=tokens,
        element_size=size,
        checkpointing=checkpointing,
        length=padded,
    )
    kept = layer_saved(model, split, tokens=tokens, element_size=size)
    memory = split_memory(model, split, tokens=tokens, element_size=size, checkpointing=checkpointing, offload=offload)
    moved = layer_saved(model, split, tokens=tokens, element_size=size, checkpointing=True) if offload else 0
    seconds = split_seconds(
        model,
        split,
        sent,
        machine,
        tokens=tokens,
        length=padded,
        dtype=dtype,
        layer_bytes=kept,
        checkpointing=checkpointing,
        form=form,
        offloaded_layer=moved,
    )
    fits = memory.total <= machine.device.memory_bytes
    speed, binds = batch * seq_len / seconds.step, _binds(model, split, machine, seconds, fits)
    return SplitPlan(split, padded, form.pieces, form.head_groups, sent, seconds, memory, fits, speed, binds)


def _binds(model: ModelSizes, split: Split, machine: Machine, seconds: SplitSeconds, fits: bool) -> str:
    if not fits:
        return "memory"
    if seconds.exposed < _BOUND_BY_LINK * seconds.step:
        return "compute"
    held_back = split.ring > 1 and split.seq == largest_seq(model, split.strategy, split.everyone)
    if held_back and split.seq < machine.node:
        return "heads"
    return "network" if split.everyone * split.dp > machine.node else "link"


def _notes(model: ModelSizes) -> list[str]:
    present = {"qk_norm": model.layer.qk_norm, "experts": model.experts > 0}
    return [text for name, text in ESTIMATED.items() if present[name]]


def _forms(splits: Sequence[SplitPlan], pipeline: Pipeline) -> str:
    """How attention is taken, and under which strategies; a split of one of them can have it whole even so."""
    forms = [(Form(one.pieces, one.head_groups), one.split.strategy) for one in splits]
    said = sorted({f"{strategy} {form.name}" for form, strategy in forms if form != Form()})
    if any(form == Form() for form, _ in forms):
        said.append("all others whole" if said else "whole")
    return f"attention with pipeline={pipeline!r}: {', '.join(said)}"


def _summary(refused: Mapping[str, Sequence[str]]) -> str:
    """One reason for each strategy, and each reason once."""
    by_reason: dict[str, list[str]] = {}
    for strategy, reasons in refused.items():
        by_reason.setdefault(reasons[0].partition(": ")[2], []).append(strategy)
    return "; ".join(f"{', '.join(strategies)}: {reason}" for reason, strategies in by_reason.items())


def _advice(found: Plan, least: SplitMemory) -> str:
    states = least.weights + least.gradients + least.optimizer
    if states > found.machine.device.memory_bytes:
        return f"; weights, gradients and Adam alone take {_gigabytes(states)}"
    if not found.checkpointing:
        return "; checkpointing keeps less"
    return "" if found.offload else "; offload keeps less"


def comparison(first: SplitPlan, second: SplitPlan) -> str:
    """One sentence: why ``first`` comes before ``second``, which follows it in a plan."""
    names = f"{first.split.name} before {second.split.name}"
    if not second.fits:
        kept, needed = _gigabytes(first.memory.total), _gigabytes(second.memory.total)
        return f"{names}: it fits, in {kept}; the other needs {needed}."
    one, other = first.seconds, second.seconds
    if other.exposed - one.exposed >= other.compute - one.compute:
        sent, others = first.traffic.total, second.traffic.total
        reason = (
            f"{one.exposed:.3g} s of communication stay exposed instead of {other.exposed:.3g} s "
            f"({'as' if sent <= others else 'although'} each rank sends {_gigabytes(sent)} instead of "
            f"{_gigabytes(others)})"
        )
    else:
        reason = f"it computes for {one.compute:.3g} s instead of {other.compute:.3g} s"
    return f"{names}: {other.step / one.step:.3f} times as fast; {reason}."


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
