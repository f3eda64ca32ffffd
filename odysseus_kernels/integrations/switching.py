"""Another strategy for a model that is parallelized already, between two steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.integrations.choosing import Choice, check_wanted, choose
from odysseus_kernels.integrations.inputs import check_attention
from odysseus_kernels.integrations.intact import check_intact
from odysseus_kernels.integrations.model import SequenceCausalLM
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.recut import cut_of
from odysseus_kernels.nn.step import stepped
from odysseus_kernels.strategies import get_strategy
from odysseus_kernels.strategies.base import ModelShape, Part, Strategy, bytes_of_change, change_strategy

__all__ = ["Parallelized", "SwitchableCausalLM", "check_strategy", "set_strategy", "why_fixed", "why_not_strategy"]


@dataclasses.dataclass(frozen=True)
class Parallelized:
    """What ``parallelize`` has found of a model.

    Attributes:
        strategy: that it has.
        shape: its sizes.
        parts: its modules with parameters, by role.
        choice: how the strategy was chosen; None where it was named.
    """

    strategy: Strategy
    shape: ModelShape
    parts: tuple[Part, ...]
    choice: Choice | None = None


def set_strategy(
    model: nn.Module,
    strategy: str,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    hardware: str | None = None,
) -> int:
    """Gives a parallelized model another strategy, between two steps.  Every rank that shares the sequence calls it.

    Losses and gradients are then those of a model that was parallelized so from the start, to the bit. Parameters, and
    what the optimizer keeps beside them, are cut as the new strategy has them; they stay the same objects under the
    same names, so that optimizers and schedulers go on. What is cut alike under both does not move: without a ring,
    between ``"odysseus"`` and ``"ulysses"`` all but biases of output projections, which few models have (and keys and
    values of fewer heads than ranks); between ``"ulysses"`` and ``"tsp"``, with or without one, all but output
    projections; between ``"tp"`` and ``"tp_sp"`` all. What moves is gathered tensor by tensor, and each is whole on
    every rank for a moment.

    Args:
        model: what :func:`parallelize` returned, without FSDP2 around it, which keeps parts of its own.
        strategy: as :func:`parallelize` takes it. Batches are then cut for this one. With ``"auto"`` ranks agree on
            the one that is predicted to be the fastest for ``sequence_length``, the time counted in that it takes to
            move what is cut in another way; the present one stays where no other is faster by more than predictions
            err. ``ody.explain(model)`` shows the predictions.
        optimizer: that trains the model, with state as DTensors of the parameters' shape and numbers. One that is not
            given keeps its state as it was cut before. torch's optimizers compute the same with it, and send it in
            every step; :class:`MasterWeights` does not work then. A later call with it cuts it as the parameters are.
        sequence_length, batch_size, hardware: for ``"auto"``, as :func:`parallelize` takes them; the last two stay as
            they were chosen for before.

    Returns:
        Bytes of parameters and optimizer state that this rank got from others.

    Raises:
        ValueError: for an unknown strategy, sizes that the ranks do not divide under it, gradients that are not None,
            a call within a step, data parallelism around the model, or an optimizer of other parameters or with other
            state. Nothing is changed then.
        RankMismatchError: if ranks ask for different strategies. Nothing is changed then, either.
        CommunicationError: if a rank is lost meanwhile; the model cannot be used any more.

    Example:
        >>> model = ody.parallelize(model, mesh, strategy="odysseus")
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> for strategy in ("odysseus", "ulysses", "tp_sp"):
        ...     received = ody.set_strategy(model, strategy, optimizer=optimizer)
        ...     print(strategy, received > 0)
        ...     model(**ody.shard_sequence(batch, model)).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        odysseus False
        ulysses False
        tp_sp True
    """
    inner: Any = stepped(model)
    found = getattr(inner, "parallelized", None)
    if not isinstance(inner, SequenceCausalLM) or found is None:
        raise ValueError(f"model: expected one that parallelize returned, got {type(model).__name__}")
    group, before = inner.sequence_group, found.choice.wanted if found.choice is not None else None
    wanted = check_wanted(strategy, sequence_length, batch_size, hardware, torch.device(group.mesh.device_type), before)
    named = None if wanted is not None else get_strategy(strategy)
    if group.steps.inside:
        raise ValueError("set_strategy: expected a call between steps, got one within a forward pass or ody.step")
    if named is not None:
        check_strategy(inner, found.shape, named, named.group(group))
    fixed = why_fixed(inner)
    if fixed:
        raise ValueError(fixed)
    for name, parameter in inner.named_parameters():
        if parameter.grad is not None:
            raise ValueError(
                f"{name}: expected no gradient, got one that is cut for strategy {found.strategy.name!r}: call "
                f"optimizer.step() and optimizer.zero_grad() before set_strategy"
            )
    check_intact(inner, group)
    state = {} if optimizer is None else _state_of(optimizer, inner, group)

    def moved(name: str) -> int:
        other = get_strategy(name)
        return bytes_of_change(other, found.shape, found.parts, other.group(group), lambda p: state.get(id(p), ()))

    def why_not(name: str) -> str:
        return why_not_strategy(inner, found.shape, name, group)

    choice = None
    with group.steps.step():
        if wanted is not None:
            choice = choose(inner, wanted, group, why_not=why_not, current=found.strategy.name, moved=moved)
            if choice.strategy == found.strategy.name and not moved(choice.strategy):
                inner.parallelized = dataclasses.replace(found, choice=choice)
                return 0
        chosen = named if choice is None else get_strategy(choice.strategy)
        assert chosen is not None, "it is named or chosen"
        new = chosen.group(group)
        _agree(f"set_strategy to {chosen.name!r}, {sum(map(len, state.values()))} tensors of optimizer state", new)
        received = change_strategy(chosen, found.shape, found.parts, new, lambda p: state.get(id(p), ()))
    inner.sequence_group = inner.base_model.sequence_group = new
    inner.parallelized = dataclasses.replace(found, strategy=chosen, choice=choice)
    return received


def why_fixed(model: Any) -> str:
    """Why a parallelized model keeps its strategy as it is now; empty if :func:`set_strategy` can change it."""
    group = model.sequence_group
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            return (
                f"{name}: expected a parameter as parallelize distributed it, got a plain one: models with adapters "
                f"keep their strategy; parallelize anew, and load what save_pretrained wrote"
            )
        if parameter.device_mesh != group.mesh:
            return (
                f"{name}: expected a parameter as parallelize distributed it, got one of data parallelism around the "
                f"model: save_checkpoint, parallelize anew with the other strategy, wrap, and load_checkpoint"
            )
    return ""


def why_not_strategy(model: Any, shape: ModelShape, strategy: str, group: SequenceGroup) -> str:
    """Why ``strategy`` cannot have the model on the ranks of ``group``; empty if it can."""
    other = get_strategy(strategy)
    try:
        check_strategy(model, shape, other, other.group(group))
    except ValueError as error:
        return str(error)
    return ""


class SwitchableCausalLM(SequenceCausalLM):
    """What ``parallelize`` returns: its strategy can be changed between steps."""

    parallelized: Parallelized

    def set_strategy(self, strategy: str, **settings: Any) -> int:
        """Another strategy from the next step on: see :func:`odysseus_kernels.set_strategy`."""
        return set_strategy(self, strategy, **settings)

    def explain_strategy(self) -> str:
        """How ``strategy="auto"`` chose the present one; empty where it was named."""
        choice = self.parallelized.choice
        return "" if choice is None else choice.explain()


def check_strategy(model: Any, shape: ModelShape, strategy: Strategy, group: SequenceGroup) -> None:
    """Raises ValueError if ``strategy`` cannot have the model on ``group``, which is as the strategy uses it."""
    check_attention(model.config._attn_implementation, group)
    if group.tokens == "replicated":
        _check_nothing_random(model.config, strategy.name)
    try:
        strategy.check(shape, group)
    except ValueError as error:
        raise ValueError(f"{type(model).__name__}, strategy {strategy.name!r}: {error}") from None


def _check_nothing_random(config: Any, strategy: str) -> None:
    """Refuses what would draw different random numbers for the same tokens on different ranks."""
    for name in ("residual_dropout", "embedding_dropout", "router_jitter_noise"):
        if getattr(config, name, 0):
            raise ValueError(
                f"{name}: expected 0 with strategy {strategy!r}, whose ranks compute the same tokens and would draw "
                f"different random numbers for them, got {getattr(config, name)}: set it to 0 in the configuration "
                f"before building the model, or use another strategy"
            )


def _state_of(
    optimizer: torch.optim.Optimizer, model: nn.Module, sequence: SequenceGroup
) -> dict[int, Sequence[DTensor]]:
    """By the identity of a parameter, what an optimizer keeps that is to be cut as the parameter is."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[int, Sequence[DTensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(
                    f"optimizer: expected parameters of the model, got another one of shape {list(parameter.shape)}"
                )
            kept = {}
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, DTensor) and value.shape == parameter.shape:
                    try:
                        cut_of(value, sequence)
                    except ValueError as error:
                        raise ValueError(f"optimizer, {key} of {name}: {error}") from None
                    kept[id(value)] = value
                elif not (value is None or isinstance(value, (int, float, str)) or _is_number(value)):
                    shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                    raise ValueError(
                        f"optimizer: expected state as DTensors of the parameter's shape {list(parameter.shape)} or "
                        f"numbers, got {shape} as {key} of {name}: save_checkpoint, parallelize anew, load_checkpoint"
                    )
            found[id(parameter)] = tuple(kept.values())
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.numel() == 1


def _agree(text: str, group: SequenceGroup) -> None:
    """Raises RankMismatchError unless all ranks that share the sequence say the same."""
    if group.every_size > 1:
        group.withdraw()  # left over from a pass that ended with an error
        nothing = torch.zeros(1, dtype=torch.uint8, device=torch.device(group.mesh.device_type))
        all_gather(nothing, group.everyone, operator="set_strategy", shapes=text, config=group.config)
