"""Feed-forward networks: on each rank's own tokens with ZeRO-3 weights, or cut along the intermediate size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from odysseus_kernels import ops
from odysseus_kernels.nn.adapters import add_column_parallel, add_own_tokens, base_of, row_parallel_product
from odysseus_kernels.nn.ahead import GathersWeights, Shards, ahead_in_backward, ahead_in_forward, shard_of
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.parameters import local_parameter, sharded_parameter, token_parameter
from odysseus_kernels.nn.tiled_mlp import ShardedWeights, TensorParallelWeights, TiledNetwork, tiled

__all__ = ["MLPSpec", "SequenceParallelMLP", "TensorParallelMLP", "Zero3MLP"]


@dataclasses.dataclass(frozen=True)
class MLPSpec:
    """Names of the parts of a feed-forward module.

    Attributes:
        gate: the gate projection, or None in a plain feed-forward network.
        up: projection to the intermediate size.
        down: projection back to the hidden size.
        activation: attribute that holds the activation function.
        dropout: attribute with the probability of a dropout after the network, or None.
    """

    gate: str | None
    up: str
    down: str
    activation: str
    dropout: str | None = None


class _MLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))`` without a gate."""

    sequence_group: SequenceGroup
    mlp_spec: MLPSpec

    def _dropped(self, y: torch.Tensor) -> torch.Tensor:
        name = self.mlp_spec.dropout
        return y if name is None else nn.functional.dropout(y, getattr(self, name), self.training)

    def _activated(self, projected: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The intermediate, from what gate and up, or up alone, have given."""
        activation = getattr(self, self.mlp_spec.activation)
        first = activation(projected[0])
        return first if len(projected) == 1 else first * projected[1]

    def _in_tiles(self, network: TiledNetwork, x: torch.Tensor, parameters: Callable[[str, str], Any]) -> torch.Tensor:
        """The network some tokens at a time; ``parameters`` gives what the operators take of a layer's parameter."""
        spec = self.mlp_spec
        inner = [name for name in (spec.gate, spec.up) if name is not None]
        for name in (*inner, spec.down):
            if base_of(getattr(self, name)) is not getattr(self, name):
                raise ValueError(
                    f"tile_rows: expected None with adapters in the feed-forward network, got one around {name}, which "
                    f"tiles would leave out: leave {name} out of target_modules, or tile_rows out of OverlapConfig"
                )
        found = [parameters(name, kind) for kind in ("weight", "bias") for name in inner]
        return self._dropped(tiled(network, x, [*found, *(parameters(spec.down, kind) for kind in ("weight", "bias"))]))

    def _inner(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...] | None]:
        """Column-parallel weights and biases of gate and up, or of up alone."""
        spec, group = self.mlp_spec, self.sequence_group
        layers = [base_of(getattr(self, name)) for name in (spec.gate, spec.up) if name is not None]
        weights = tuple(sharded_parameter(layer.weight, group) for layer in layers)
        biases = tuple(sharded_parameter(layer.bias, group) for layer in layers)
        return tuple(w for w in weights if w is not None), None if all(b is None for b in biases) else biases

    def _adapted(self, projected: tuple[torch.Tensor, ...], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs of gate and up, or of up alone, for this rank's features, and what adapters add to them."""
        spec, group = self.mlp_spec, self.sequence_group
        layers = [getattr(self, name) for name in (spec.gate, spec.up) if name is not None]
        rows = [self._features(y) for y in projected]
        return add_column_parallel(projected, layers, x, rows, group)

    def _features(self, hidden: torch.Tensor) -> tuple[int, int]:
        """(first, number) of this rank's intermediate features, which ``hidden`` has."""
        return self.sequence_group.rank * hidden.shape[-1], hidden.shape[-1]

    def _down(self, hidden: torch.Tensor, project: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """``project`` of the down projection's layer, and what adapters add to it; theirs comes first."""
        group, layer = self.sequence_group, getattr(self, self.mlp_spec.down)
        added = row_parallel_product(layer, hidden, self._features(hidden), group)
        result = project(base_of(layer))
        return self._dropped(result if added is None else (result + added).to(result.dtype))


class Zero3MLP(_MLP, GathersWeights):
    """Feed-forward network on this rank's tokens.

    Shapes: input and output [..., s, d] with s tokens of this rank; all weights are DTensors cut into rows over all
    ranks that share the sequence.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the network to this rank's tokens."""
        spec = self.mlp_spec
        activation = getattr(self, spec.activation)
        self.note_changes()
        if self.sequence_group.config.tile_rows is not None:
            return self._tiled(x, self.sequence_group.config.tile_rows)
        # Each product names the weights that travel next.  Backward goes the other way: down, up, gate.
        before, inner = ahead_in_backward(self, x), x.requires_grad
        if spec.gate is None:
            hidden = activation(self._project(spec.up, x, self._shard(spec.down), before))
        else:
            gate = activation(self._project(spec.gate, x, self._shard(spec.up), before))
            hidden = gate * self._project(spec.up, x, self._shard(spec.down), self._shard(spec.gate) if inner else None)
        self.note_backward(hidden)
        following = ahead_in_forward(self, last=True)
        return self._dropped(self._project(spec.down, hidden, following, self._shard(spec.up) if inner else None))

    def _tiled(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        group, following = self.sequence_group, ahead_in_forward(self, last=True)
        self.note_backward(x)
        network = ShardedWeights(self._activated, rows, group.everyone, group.config, following=following)
        return self._in_tiles(network, x, lambda name, kind: local_parameter(getattr(getattr(self, name), kind)))

    def _project(self, name: str, x: torch.Tensor, following: Shards, preceding: Shards) -> torch.Tensor:
        """One projection, while the weights of the next one (in backward: of the one before) are on their way."""
        layer, group = getattr(self, name), self.sequence_group
        base = base_of(layer)
        y = ops.zero3_linear(
            x,
            local_parameter(base.weight),
            local_parameter(base.bias),
            group=group.everyone,
            config=group.config,
            prefetch=following,
            prefetch_backward=preceding,
        )
        return add_own_tokens(y, layer, x, group)

    def _shard(self, name: str) -> torch.Tensor:
        return local_parameter(base_of(getattr(self, name)).weight)

    def first_gathered(self) -> Shards:
        spec = self.mlp_spec
        return shard_of(base_of(getattr(self, spec.up if spec.gate is None else spec.gate)))

    def first_gathered_in_backward(self) -> Shards:
        if not self.gathers_in_backward:
            return None
        # Tiles are computed again before they are differentiated.
        if self.sequence_group.config.tile_rows:
            return self.first_gathered()
        return shard_of(base_of(getattr(self, self.mlp_spec.down)))


class SequenceParallelMLP(_MLP):
    """Tokens cut over the ranks outside, the intermediate size inside (TP-SP).

    Shapes: input and output [B, s, d]; gate and up are column-parallel (rows over seq) after one all-gather, down is
    row-parallel (columns over seq) before a reduce-scatter.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the network to the tokens of all ranks."""
        group = self.sequence_group
        if group.config.tile_rows is not None:
            network = TensorParallelWeights(
                self._activated, group.config.tile_rows, group.group, group.config, cut=True
            )
            return self._in_tiles(network, x, self._parameter)
        weights, biases = self._inner()
        projected = ops.all_gather_linear(x, weights, biases, group=group.group, config=group.config)
        hidden = self._activated(self._adapted(projected, x))

        def project(down: Any) -> torch.Tensor:
            weight, bias = sharded_parameter(down.weight, group), sharded_parameter(down.bias, group)
            assert weight is not None
            return ops.linear_reduce_scatter(hidden, weight, bias, group=group.group, config=group.config)

        return self._down(hidden, project)

    def _parameter(self, name: str, kind: str) -> torch.Tensor | None:
        return sharded_parameter(getattr(getattr(self, name), kind), self.sequence_group)


class TensorParallelMLP(_MLP):
    """Tokens on all ranks, the intermediate size cut over them, followed by an all-reduce (classical TP).

    Shapes: input and output [B, T, d], equal on all ranks of seq; weights as in :class:`SequenceParallelMLP`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the network to the tokens that all ranks have."""
        group = self.sequence_group
        if group.config.tile_rows is not None:
            rows = group.config.tile_rows * group.size  # of all tokens, that is as many for each rank
            network = TensorParallelWeights(self._activated, rows, group.group, group.config, cut=False)
            return self._in_tiles(network, x, self._parameter)
        group = self.sequence_group
        weights, biases = self._inner()
        projected = ops.column_parallel_linear(x, weights, biases, group=group.group, config=group.config)
        hidden = self._activated(self._adapted(projected, x))

        def project(down: Any) -> torch.Tensor:
            weight, bias = sharded_parameter(down.weight, group), token_parameter(down.bias, group)
            assert weight is not None
            return ops.linear_all_reduce(hidden, weight, bias, group=group.group, config=group.config)

        return self._down(hidden, project)

    def _parameter(self, name: str, kind: str) -> torch.Tensor | None:
        parameter = getattr(getattr(self, name), kind)
        whole = kind == "bias" and name == self.mlp_spec.down
        return (token_parameter if whole else sharded_parameter)(parameter, self.sequence_group)
