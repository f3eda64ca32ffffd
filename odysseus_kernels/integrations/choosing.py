"""``strategy="auto"``: which strategy the ranks of a mesh agree on for a length, by what each of them predicts.

A rank predicts a step's seconds under every strategy (``planner/planning/choice.py``).  Ranks need not be of one
opinion: their devices, or the lengths of replicas' batches, may differ.  So predictions are gathered, and what counts
is that of the slowest rank, for which all others wait; a strategy that one rank cannot have is out for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.nn.group import DATA_DIMENSION, SequenceGroup
from odysseus_kernels.planner.cost_model import LINK_SHARE, MODEL_MARGIN
from odysseus_kernels.planner.planning.choice import machine_of_device, on_mesh
from odysseus_kernels.planner.planning.machines import Machine, machine_for
from odysseus_kernels.planner.planning.plan import SplitPlan
from odysseus_kernels.strategies import STRATEGIES

__all__ = ["AUTO", "Choice", "Wanted", "check_wanted", "choose"]

AUTO = "auto"
"""What is given in a strategy's place."""

_OPERATOR = "choose_strategy"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """For what a strategy is chosen.

    Attributes:
        sequence_length: tokens of each sequence.
        batch_size: sequences of a step on each rank of ``"dp"``.
        hardware: a machine's name, as :func:`odysseus_kernels.plan` takes it.
    """

    sequence_length: int
    batch_size: int
    hardware: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """What all ranks agreed on.

    Attributes:
        wanted: for what.
        mesh: its dimensions, in words.
        strategy: that was chosen.
        seconds: of a step, by strategy, as the slowest rank predicts it; infinite where a rank cannot have it.
        moving: seconds that a change of strategy takes before; 0 where nothing moves.
        refused: why this rank cannot have a strategy.
        own: what this rank would have chosen alone.
        reason: why it was chosen.
    """

    wanted: Wanted
    mesh: str
    strategy: str
    seconds: Mapping[str, float]
    moving: Mapping[str, float]
    refused: Mapping[str, str]
    own: str
    reason: str

    def explain(self) -> str:
        """The predicted times, and the reason."""
        wanted = self.wanted
        lines = [
            f"strategy {self.strategy!r} was chosen for {wanted.batch_size} x {wanted.sequence_length:,} tokens on "
            f"{self.mesh} of {wanted.hardware}; seconds of a step, as the slowest rank predicts them:"
        ]
        width = max(map(len, self.seconds))
        for name in sorted(self.seconds, key=lambda one: self.seconds[one]):
            if math.isfinite(self.seconds[name]):
                moved = f", and {self.moving[name]:.3g} before it to move weights" if self.moving[name] else ""
                lines.append(f"  {name:<{width}}  {self.seconds[name]:.3g}{moved}")
            else:
                lines.append(f"  {name:<{width}}  not possible: {self.refused.get(name, 'another rank refuses it')}")
        lines.append(f"because {self.reason}")
        if self.own != self.strategy:
            lines.append(f"this rank alone would have chosen {self.own!r}")
        return "\n".join(lines)


def check_wanted(
    strategy: str,
    sequence_length: int | None,
    batch_size: int | None,
    hardware: str | None,
    device: torch.device,
    before: Wanted | None = None,
) -> Wanted | None:
    """For what a strategy is wanted; None where one is named.

    Args:
        strategy: a strategy's name, or ``"auto"``.
        sequence_length, batch_size, hardware: as users gave them, or None.
        device: that the model is on.
        before: of an earlier choice, whose batch size and hardware stay where none are given.

    Raises:
        ValueError: for ``"auto"`` without a length, numbers that are not positive, an unknown machine, or any of them
            beside a strategy's name.
    """
    given = {"sequence_length": sequence_length, "batch_size": batch_size, "hardware": hardware}
    if strategy != AUTO:
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name}: expected None beside a strategy that is named, got {value!r} beside {strategy!r}: it "
                    f'says for what strategy="auto" chooses one'
                )
        return None
    if sequence_length is None:
        raise ValueError(
            'sequence_length: expected the tokens of each sequence beside strategy="auto", which chooses by it, got '
            "None"
        )
    for name in ("sequence_length", "batch_size"):
        value = given[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected a whole number above 0, got {value!r}")
    if hardware is not None and not isinstance(hardware, str):
        raise ValueError(f"hardware: expected a machine's name, got {hardware!r}")
    if batch_size is None:
        batch_size = 1 if before is None else before.batch_size
    if hardware is None:
        hardware = _machine_of(device) if before is None else before.hardware
    machine_for(hardware)
    return Wanted(sequence_length, batch_size, hardware)


def choose(
    model: Any,
    wanted: Wanted,
    group: SequenceGroup,
    *,
    why_not: Callable[[str], str],
    current: str | None = None,
    moved: Callable[[str], int] = lambda _: 0,
) -> Choice:
    """The strategy that is predicted to be the fastest, the same on all ranks.  All ranks of the mesh call it.

    Those that fit into the device's memory come first; if none does, the one that needs the least.  A model keeps the
    strategy that it has unless a step with another one, and moving what is cut in another way before it, is predicted
    to be faster by more than such predictions err.

    Args:
        model: a stock or parallelized model; its configuration, dtype and checkpointing are read.
        wanted: for what.
        group: its ranks, as any strategy uses them.
        why_not: why the model cannot have a strategy; empty if it can.
        current: the strategy that it has.
        moved: bytes of weights and optimizer state that this rank would get from others for another strategy.

    Raises:
        ValueError: if no strategy is possible.
        RankMismatchError: if ranks that share a sequence want one for different lengths; names the ranks that differ.
    """
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    data = group.whole.get_group(DATA_DIMENSION) if DATA_DIMENSION in (group.whole.mesh_dim_names or ()) else None
    sizes = {"seq": group.size, "ring": group.ring_size, "dp": 1 if data is None else data.size()}
    found = on_mesh(
        model.config,
        **sizes,
        seq_len=wanted.sequence_length,
        batch=wanted.batch_size,
        hardware=wanted.hardware,
        checkpointing=any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        dtype=dtype,
        strategies=tuple(STRATEGIES),
        pipeline=group.config.pipeline,
    )
    refused, machine, rows = {}, machine_for(wanted.hardware), []
    for name, one in found.items():
        reason = why_not(name) or (one if isinstance(one, str) else "")
        if reason:
            refused[name] = reason
        rows.append(_row(machine, "" if reason else one, 0 if reason else moved(name), group.every_size))
    own = torch.tensor(rows, dtype=torch.float64)
    agreed = _slowest(own, wanted, group, data)
    names = list(found)
    best = _best(names, agreed, current)
    if best is None:
        listed = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise ValueError(f'strategy: expected a model that one of them can have beside "auto": {listed}')
    mesh = " x ".join(f"{name} {size}" for name, size in reversed(sizes.items()) if size > 1 or name == "seq")
    seconds, moving, _ = (dict(zip(names, column, strict=True)) for column in agreed.T.tolist())
    return Choice(
        wanted,
        mesh,
        best,
        seconds,
        moving,
        refused,
        _best(names, own, current) or "none",
        _reason(best, names, agreed, current),
    )


def _row(machine: Machine, one: SplitPlan | str, received: int, ranks: int) -> tuple[float, float, float]:
    """(seconds of a step, seconds to move weights before it, bytes that are more than the device has)."""
    if isinstance(one, str):
        return math.inf, 0.0, 0.0
    rate, _ = machine.link(ranks, one.split.everyone * one.split.dp)
    too_many = max(0.0, one.memory.total - machine.device.memory_bytes)
    return one.seconds.step, received / (rate * LINK_SHARE), too_many


def _slowest(own: torch.Tensor, wanted: Wanted, group: SequenceGroup, data: Any) -> torch.Tensor:
    """The largest of all ranks' numbers."""
    agreed = own.to(torch.device(group.mesh.device_type))
    if group.every_size > 1:
        group.withdraw()  # left over from a pass that ended with an error
        said = f"a strategy for {wanted.batch_size} x {wanted.sequence_length} tokens"
        rows = all_gather(agreed[None], group.everyone, operator=_OPERATOR, shapes=said, config=group.config)
        agreed = rows.amax(0)
    if data is not None and data.size() > 1:
        agreed = all_gather(agreed[None], data, operator=_OPERATOR, config=group.config).amax(0)
    return agreed.cpu()


def _best(names: list[str], table: torch.Tensor, current: str | None) -> str | None:
    """By (seconds, moving, memory) of each; None if none is possible."""
    rows = {name: row for name, row in zip(names, table.tolist(), strict=True) if math.isfinite(row[0])}
    if not rows:
        return None
    least = min(row[2] for row in rows.values())
    fitting = {name: row[0] + row[1] for name, row in rows.items() if row[2] == least}
    best = min(fitting, key=lambda name: fitting[name])
    if current in fitting and fitting[current] <= fitting[best] * (1 + MODEL_MARGIN):
        return current
    return best


def _reason(best: str, names: list[str], table: torch.Tensor, current: str | None) -> str:
    rows = {name: row for name, row in zip(names, table.tolist(), strict=True) if math.isfinite(row[0])}
    if len(rows) == 1:
        return f"{best} is the only one that is possible"
    missing = rows[best][2]
    if missing:
        return f"none fits into a device's memory, and {best} needs the least, {missing / 1e9:.3g} GB too much"
    others = {name: row for name, row in rows.items() if name != best and not row[2]}
    if not others:
        return f"{best} is the only one that fits into a device's memory"
    total = {name: row[0] + row[1] for name, row in rows.items()}
    second = min(others, key=lambda name: total[name])
    if total[second] < total[best]:
        return (
            f"the model has {best}, and {second} would be {total[best] / total[second]:.3f} times as fast, which is "
            f"within the error of such predictions ({MODEL_MARGIN:.0%})"
        )
    kept = ", as before" if best == current else ""
    return f"{best}{kept} is predicted to be {total[second] / total[best]:.3f} times as fast as {second}"


def _machine_of(device: torch.device) -> str:
    return machine_of_device("cpu" if device.type == "cpu" else torch.cuda.get_device_name(device))
