"""Low-rank adapters beside projections whose weights are read and multiplied while they travel.

An adapted projection is ``y = x W^T + s (drop(x) A^T) B^T`` with A [r, K], B [n, r] and the scaling s (LoRA, Hu et
al., arXiv:2106.09685; PEFT's ``lora.Linear``).  Communication happens where the product is narrowest, at its r columns,
and W is left alone: if it is frozen, nothing is computed or sent for its gradient.  Pipelined attention, one operator
that takes weights only, gets ``W + s B A`` instead (:func:`effective_weight`).

=============================== ===================================== ==============================================
projection                      low-rank product                      sent in forward (backward: the other way round)
=============================== ===================================== ==============================================
own tokens, ZeRO-3              (drop(x) A^T) B^T                     nothing
tokens to heads, column-cut     AG(drop(x) A^T) B_rows^T              r columns of each token, all projections at once
heads to tokens, row-cut        RS(drop(x) A_columns^T) B^T           r columns of each token
=============================== ===================================== ==============================================

Where ranks hold the same tokens (TP) the all-gather is none, its backward an all-reduce, and the reduce-scatter an
all-reduce.  A and B are whole on every rank; their gradients are added over the ranks, those of all adapters in one
call (``nn/adapter_sums.py``): r (n + K) numbers of each.

Modules are recognised by what they hold, not by their class: this package's integrations say which classes may come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odysseus_kernels import ops
from odysseus_kernels.nn.adapter_sums import VALUES, AdapterValues
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.parameters import head_parameter, sharded_parameter, token_parameter

__all__ = [
    "Adapter",
    "adapters_of",
    "add_column_parallel",
    "add_own_tokens",
    "base_of",
    "effective_bias",
    "effective_weight",
    "row_parallel_product",
]

Range = tuple[int, int]
_Part = Literal["down", "up", "bias"]
_PARTS: tuple[tuple[_Part, str, str], ...] = (
    ("down", "lora_A", "weight"),
    ("up", "lora_B", "weight"),
    ("bias", "lora_B", "bias"),
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter of a projection.

    Attributes:
        down: A [r, K].
        up: B [n, r].
        bias: of B, [n], or None.
        scaling: s.
        dropout: applied to the input.
        casts: whether the input takes the type of A.
        values: of its parameters, where the forward pass adds the gradients of all adapters in one call.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    scaling: float
    dropout: nn.Module
    casts: bool
    values: Mapping[str, AdapterValues] = dataclasses.field(default_factory=dict)

    def of_tokens(self, part: _Part, group: SequenceGroup) -> Tensor | None:
        """A parameter for this rank's own tokens."""
        if part not in self.values:
            return token_parameter(getattr(self, part), group)
        whole, over = self.values[part].tokens, group.token_group
        # The same operations as in a layer that is computed again, which selective checkpointing counts.
        return whole if over is None or over.size() == 1 else whole.view_as(whole)

    def of_heads(self, part: _Part, group: SequenceGroup, rows: Range | None, *, dim: int = 0) -> Tensor | None:
        """A parameter, or some rows of it, for this rank's own heads or features."""
        if part not in self.values:
            return head_parameter(getattr(self, part), group, rows, dim=dim)
        whole = self.values[part].heads
        return whole.view_as(whole) if rows is None else whole.narrow(dim, *rows)

    @property
    def drops(self) -> bool:
        """Whether it draws random numbers now."""
        return self.dropout.training and getattr(self.dropout, "p", 0) > 0

    def input(self, x: Tensor) -> Tensor:
        """drop(x), in the type of A."""
        return self.dropout(x.to(self.down.dtype) if self.casts else x)


def base_of(layer: Any) -> Any:
    """The linear layer within a projection that adapters are wrapped around; the projection itself if none are."""
    return layer._modules.get("base_layer", layer)


def adapters_of(layer: Any) -> list[Adapter]:
    """The adapters that count in a call now: the active ones, unless they are disabled or merged into the weight."""
    if "base_layer" not in layer._modules or layer.disable_adapters or layer.merged:
        return []
    values = getattr(layer, VALUES, {})
    return [
        Adapter(
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.lora_B[name].bias,
            layer.scaling[name],
            layer.lora_dropout[name],
            getattr(layer, "cast_input_dtype_enabled", True),
            {part: values[kind, name, which] for part, kind, which in _PARTS if (kind, name, which) in values},
        )
        for name in layer.active_adapters
        if name in layer.lora_A
    ]


def add_own_tokens(y: Tensor, layer: Any, x: Tensor, group: SequenceGroup) -> Tensor:
    """``y`` [..., n] and what ``layer``'s adapters make of this rank's own tokens ``x`` [..., K]; nothing is sent."""
    total = y
    for adapter in adapters_of(layer):
        inner = F.linear(adapter.input(x), _known(adapter.of_tokens("down", group)))
        total = total + _up(inner, adapter, group)
    return total.to(y.dtype)


def add_column_parallel(
    ys: Sequence[Tensor], layers: Sequence[Any], x: Tensor, rows: Sequence[Range], group: SequenceGroup
) -> tuple[Tensor, ...]:
    """Outputs [..., T, n/N] of projections of ``x`` to this rank's features, and what their adapters add.

    The narrow products of all projections travel in one call.

    Args:
        ys: an output for each projection.
        layers: the projections.
        x: this rank's tokens [..., s, K], or all T of them where ranks hold the same.
        rows: (first, number) of the output features that this rank has of each projection.
        group: the ranks.
    """
    found = [adapters_of(layer) for layer in layers]
    flat = [adapter for adapters in found for adapter in adapters]
    if not flat:
        return tuple(ys)
    inner = [F.linear(adapter.input(x), _known(adapter.of_tokens("down", group))) * adapter.scaling for adapter in flat]
    joined = torch.cat(inner, dim=-1)
    width, before = joined.shape[-1], 0
    weights, biases, places = [], [], []
    for place, (adapters, own_rows) in enumerate(zip(found, rows, strict=True)):
        if not adapters:
            continue
        ups = [_known(adapter.of_heads("up", group, own_rows)) for adapter in adapters]
        columns = sum(up.shape[1] for up in ups)
        # Zeros meet the columns of other projections: one gather serves all of them.
        weights.append(F.pad(torch.cat(ups, dim=1), (before, width - before - columns)))
        biases.append(_scaled_bias(adapters, own_rows, group))
        places.append(place)
        before += columns
    given = None if all(bias is None for bias in biases) else tuple(biases)
    product: Any = ops.all_gather_linear if group.tokens == "sharded" else ops.column_parallel_linear
    added = product(joined, tuple(weights), given, group=group.group, config=group.config)
    totals = list(ys)
    for place, one in zip(places, added, strict=True):
        totals[place] = (ys[place] + one).to(ys[place].dtype)
    return tuple(totals)


def row_parallel_product(layer: Any, x: Tensor, columns: Range, group: SequenceGroup) -> Tensor | None:
    """What adapters add to this rank's tokens of a projection of ``x``, of which this rank has some input features.

    Args:
        layer: the projection.
        x: all T tokens of this rank's features, [..., T, k].
        columns: (first, number) of these features.
        group: the ranks.

    Returns:
        [..., s, n], or [..., T, n] where ranks hold the same tokens; None without adapters.
    """
    total: Tensor | None = None
    product: Any = ops.linear_reduce_scatter if group.tokens == "sharded" else ops.linear_all_reduce
    for adapter in adapters_of(layer):
        down = _known(adapter.of_heads("down", group, columns, dim=1))
        inner = product(adapter.input(x), down, group=group.group, config=group.config)
        made = _up(inner, adapter, group)
        total = made if total is None else total + made
    return total


def effective_weight(
    weight: Tensor, layer: Any, group: SequenceGroup, *, rows: Range | None = None, columns: Range | None = None
) -> Tensor:
    """This rank's part of a weight with its adapters in it, for an operator that takes weights only.

    ``weight`` holds the ``rows`` or the ``columns`` (first, number) of the whole one.  The gradient of the whole part
    is computed on this rank, and not sent.

    Raises:
        ValueError: if an adapter drops inputs.
    """
    for adapter in adapters_of(layer):
        if adapter.drops:
            raise ValueError(
                f"lora_dropout: expected 0 where attention is pipelined, which multiplies by one weight for the layer "
                f"and its adapter, got {getattr(adapter.dropout, 'p', 0)}: set it to 0, or pipeline=None in "
                f"OverlapConfig"
            )
        up = _known(adapter.of_heads("up", group, rows))
        down = _known(adapter.of_heads("down", group, columns, dim=1))
        weight = (weight + adapter.scaling * (up @ down)).to(weight.dtype)
    return weight


def effective_bias(bias: Tensor | None, layer: Any, group: SequenceGroup, rows: Range | None = None) -> Tensor | None:
    """The same for a bias: ``rows`` of it; the whole, whose gradient the operator completes over seq, if None."""
    adapters = adapters_of(layer)
    if rows is not None:
        added = _scaled_bias(adapters, rows, group)
    else:
        added = None
        for adapter in adapters:
            own = sharded_parameter(adapter.bias, group)
            if own is not None:
                added = own * adapter.scaling if added is None else added + own * adapter.scaling
    if added is None or bias is None:
        return bias if added is None else added
    return (bias + added).to(bias.dtype)


def _up(inner: Tensor, adapter: Adapter, group: SequenceGroup) -> Tensor:
    up, bias = _known(adapter.of_tokens("up", group)), adapter.of_tokens("bias", group)
    return F.linear(inner, up, bias) * adapter.scaling


def _scaled_bias(adapters: Sequence[Adapter], rows: Range, group: SequenceGroup) -> Tensor | None:
    total: Tensor | None = None
    for adapter in adapters:
        bias = adapter.of_heads("bias", group, rows)
        if bias is not None:
            total = bias * adapter.scaling if total is None else total + bias * adapter.scaling
    return total


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "an adapter has both weights"
    return tensor
