"""The feed-forward network of Odysseus: tokens stay where they are, weights travel."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from odysseus_kernels import ops
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.parameters import local_parameter

__all__ = ["MLPSpec", "Zero3MLP"]


@dataclasses.dataclass(frozen=True)
class MLPSpec:
    """Names of the parts of a feed-forward module.

    Attributes:
        gate: the gate projection, or None in a plain feed-forward network.
        up: projection to the intermediate size.
        down: projection back to the hidden size.
        activation: attribute that holds the activation function.
    """

    gate: str | None
    up: str
    down: str
    activation: str


class Zero3MLP(nn.Module):
    """Feed-forward network with ZeRO-3 weights, gated or plain.

    Shapes: input and output [..., s, d] with s = L/N tokens of this rank; all weights are DTensors cut into rows.

    gated: ``down(activation(gate(x)) * up(x))``; plain: ``down(activation(up(x)))``
    """

    sequence_group: SequenceGroup
    mlp_spec: MLPSpec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the network to this rank's tokens."""
        spec = self.mlp_spec
        activation = getattr(self, spec.activation)
        # Each product names the weights that travel next. Backward goes the other way: down, up, gate.
        if spec.gate is None:
            hidden = activation(self._project(spec.up, x, following=spec.down))
            return self._project(spec.down, hidden, preceding=spec.up)
        gate = activation(self._project(spec.gate, x, following=spec.up))
        hidden = gate * self._project(spec.up, x, following=spec.down, preceding=spec.gate)
        return self._project(spec.down, hidden, preceding=spec.up)

    def _project(
        self, name: str, x: torch.Tensor, *, following: str | None = None, preceding: str | None = None
    ) -> torch.Tensor:
        """One projection, while the weights of the next one (in backward: of the one before) are on their way."""
        layer, group = getattr(self, name), self.sequence_group
        return ops.zero3_linear(
            x,
            local_parameter(layer.weight),
            local_parameter(layer.bias),
            group=group.group,
            config=group.config,
            prefetch=self._shard(following),
            prefetch_backward=self._shard(preceding),
        )

    def _shard(self, name: str | None) -> torch.Tensor | None:
        return None if name is None else local_parameter(getattr(self, name).weight)
