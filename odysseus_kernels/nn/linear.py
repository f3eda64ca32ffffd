"""A linear layer on this rank's tokens whose weight is cut into rows."""

from __future__ import annotations

import torch
from torch import nn

from odysseus_kernels import ops
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.parameters import local_parameter

__all__ = ["Zero3Linear"]


class Zero3Linear(nn.Module):
    """``nn.Linear`` with ZeRO-3 weights: rows are gathered as they are multiplied, the weight is never whole.

    Shapes: input [..., K], weight [n, K] and bias [n] as DTensors with placement Shard(0), output [..., n].
    """

    sequence_group: SequenceGroup
    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Applies the layer to this rank's tokens."""
        weight, bias = local_parameter(self.weight), local_parameter(self.bias)
        group = self.sequence_group
        return ops.zero3_linear(input, weight, bias, group=group.group, config=group.config)
