"""What a strategy is: tables from the roles of parameters and modules to placements and classes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.distributed.tensor import DTensor

from odysseus_kernels.errors import FallbackWarning
from odysseus_kernels.nn.ahead import link_modules
from odysseus_kernels.nn.attention import AttentionSpec
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.mlp import MLPSpec
from odysseus_kernels.nn.moe import ExpertsSpec
from odysseus_kernels.nn.parameters import Cut, distribute_parameter
from odysseus_kernels.nn.recut import bytes_of_recut, recut
from odysseus_kernels.nn.swap import restore_class, swap_class

__all__ = [
    "LayerRole",
    "ModelShape",
    "ModuleRole",
    "Part",
    "PlacementRule",
    "Strategy",
    "apply_strategy",
    "bytes_of_change",
    "change_strategy",
]

# What forwards of the swapped classes, and the links between them, leave behind in a module.
_NOTES = ("neighbours", "gathers_in_backward", "checkpointed", "sent", "upcoming", "tokens", "_input_needed")

ModuleRole = Literal["attention", "mlp", "experts", "router", "embedding", "norm", "head_norm", "head"]
LayerRole = Literal[
    "query",
    "key",
    "value",
    "output",
    "gate",
    "up",
    "down",
    "experts",
    "router",
    "embedding",
    "norm",
    "head_norm",
    "head",
]


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes that decide whether and how a model is cut.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width inside the feed-forward network.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: width of a head.
        vocabulary: rows of the embedding.
        tied: whether the head's weight is the embedding's.
        experts: experts of each feed-forward network; 0 where it has none.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    experts: int = 0


@dataclasses.dataclass(frozen=True)
class PlacementRule:
    """How the parameters of a layer with some role are distributed.

    Attributes:
        weight: cut of the weight, and of all parameters that are no bias.
        bias: cut of the bias.
    """

    weight: Cut
    bias: Cut


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way to distribute a model over the ranks of a sequence.

    Attributes:
        name: what users call it.
        tokens: whether ranks of seq hold different tokens outside of attention, or the same.
        check: raises ValueError where a shape cannot be cut for a group.
        placements: for a shape and a group, the rule of each layer role.
        modules: for a shape and a group, the class that each module role's forward comes from.
        folded: whether ranks of seq go on with the ring; see :class:`~odysseus_kernels.nn.group.SequenceGroup`.
    """

    name: str
    tokens: Literal["sharded", "replicated"]
    check: Callable[[ModelShape, SequenceGroup], None]
    placements: Callable[[ModelShape, SequenceGroup], Mapping[LayerRole, PlacementRule]]
    modules: Callable[[ModelShape, SequenceGroup], Mapping[ModuleRole, type[nn.Module]]]
    folded: bool = False

    def group(self, group: SequenceGroup) -> SequenceGroup:
        """``group`` as this strategy uses it."""
        return dataclasses.replace(group, tokens=self.tokens, folded=self.folded)


@dataclasses.dataclass(frozen=True)
class Part:
    """A module that gets a strategy's forward, with the layers whose parameters it uses.

    Attributes:
        role: role of the module.
        module: the stock module.
        layers: by role, the modules that own the parameters: projections, or the module itself.
        spec: names of an attention's or feed-forward network's parts.
    """

    role: ModuleRole
    module: nn.Module
    layers: Mapping[LayerRole, nn.Module]
    spec: AttentionSpec | MLPSpec | ExpertsSpec | None = None


def apply_strategy(strategy: Strategy, shape: ModelShape, parts: Sequence[Part], group: SequenceGroup) -> None:
    """Distributes the parameters of ``parts`` and swaps the modules' classes, in place.  Nothing is sent.

    Every rank's parameters must be full and identical.  A parameter that two layers share stays shared.
    """
    placements = strategy.placements(shape, group)
    _warn_of_a_whole_head(shape, placements)
    # By the identity of the full parameter, which is kept alive here so that no id is used twice.
    distributed: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for part in parts:
        for role, layer in part.layers.items():
            for name, parameter in layer.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    continue  # a shared module, done already
                if id(parameter) not in distributed:
                    cut = _cut(placements[role], name)
                    distributed[id(parameter)] = (parameter, distribute_parameter(parameter, group, cut))
                setattr(layer, name, distributed[id(parameter)][1])
    _swap_modules(strategy, shape, parts, group)


def change_strategy(
    strategy: Strategy,
    shape: ModelShape,
    parts: Sequence[Part],
    group: SequenceGroup,
    state: Callable[[nn.Parameter], Sequence[DTensor]],
) -> int:
    """The same for parts that :func:`apply_strategy` has distributed: from one strategy to another.

    Args:
        strategy: the new one.
        shape, parts: as they were given to :func:`apply_strategy`.
        group: as the new strategy uses it.
        state: what belongs to a parameter and is cut as it is: an optimizer's.

    Returns:
        Bytes that this rank got from others.
    """
    _warn_of_a_whole_head(shape, strategy.placements(shape, group))
    received = sum(recut(tensor, cut, group) for tensor, cut in _recuts(strategy, shape, parts, group, state))
    for part in parts:
        restore_class(part.module)
        for name in _NOTES:
            vars(part.module).pop(name, None)
    _swap_modules(strategy, shape, parts, group)
    return received


def bytes_of_change(
    strategy: Strategy,
    shape: ModelShape,
    parts: Sequence[Part],
    group: SequenceGroup,
    state: Callable[[nn.Parameter], Sequence[DTensor]],
) -> int:
    """What :func:`change_strategy` would return; nothing is sent or changed."""
    return sum(bytes_of_recut(tensor, cut, group) for tensor, cut in _recuts(strategy, shape, parts, group, state))


def _recuts(
    strategy: Strategy,
    shape: ModelShape,
    parts: Sequence[Part],
    group: SequenceGroup,
    state: Callable[[nn.Parameter], Sequence[DTensor]],
) -> Iterator[tuple[DTensor, Cut]]:
    """Each parameter once, followed by its state, and how the strategy cuts them."""
    placements, done = strategy.placements(shape, group), set[int]()
    for part in parts:
        for role, layer in part.layers.items():
            for name, parameter in layer.named_parameters(recurse=False):
                if id(parameter) in done:
                    continue
                done.add(id(parameter))
                assert isinstance(parameter, DTensor), "apply_strategy has distributed it"
                for tensor in (parameter, *state(parameter)):
                    yield tensor, _cut(placements[role], name)


def _cut(rule: PlacementRule, name: str) -> Cut:
    return rule.bias if name == "bias" else rule.weight


def _warn_of_a_whole_head(shape: ModelShape, placements: Mapping[LayerRole, PlacementRule]) -> None:
    if placements["head"].weight.dim is None and not shape.tied:
        warnings.warn(
            f"the ranks do not divide a vocabulary of {shape.vocabulary}: every rank holds the language head whole and "
            f"its gradient is added over them; call model.resize_token_embeddings(pad_to_multiple_of=...) before "
            f"parallelize to have it cut",
            FallbackWarning,
            stacklevel=4,
        )


def _swap_modules(strategy: Strategy, shape: ModelShape, parts: Sequence[Part], group: SequenceGroup) -> None:
    """Gives stock modules, whose parameters are distributed, the strategy's classes."""
    classes = strategy.modules(shape, group)
    for part in parts:
        for layer in part.layers.values():
            # What the layer's forward relies on: a parameter that it gets later may be cut in another way.
            vars(layer)["sequence_placements"] = {
                name: tuple(parameter.placements)
                for name, parameter in layer.named_parameters(recurse=False)
                if isinstance(parameter, DTensor)
            }
        swap_class(part.module, classes[part.role])
        module: Any = part.module  # has the attributes of its new class
        module.sequence_group = group
        if isinstance(part.spec, AttentionSpec):
            module.attention_spec = part.spec
        elif isinstance(part.spec, MLPSpec):
            module.mlp_spec = part.spec
        elif isinstance(part.spec, ExpertsSpec):
            module.experts_spec = part.spec
        if hasattr(module, "setup_sequence"):
            module.setup_sequence()
    order = [part for part in parts if part.role in ("attention", "mlp", "experts", "head")]
    link_modules([part.module for part in order], [part.module for part in order if part.role == "attention"], group)
