"""Keys and values of all ranks at once, for attention functions that cannot take them one rank's after another's."""

from __future__ import annotations

from typing import Any

import torch

from odysseus_kernels.attention import layout
from odysseus_kernels.comm.functional import all_gather, reduce_scatter
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.nn.cut import RING_LAYOUT
from odysseus_kernels.nn.derivatives import first_derivative
from odysseus_kernels.nn.group import SequenceGroup

__all__ = ["GatheredKeyValue"]

_OPERATOR = "gathered_key_value"


class GatheredKeyValue(torch.autograd.Function):
    """Keys and values of the whole sequence, in its order, for the queries of each rank.

    Shapes: key [B, H, s, D] and value [B, H, s, Dv] of this rank's tokens, in zigzag order; whole [B, H, L, D] and
    [B, H, L, Dv] on every rank, L = W * s.

    forward: one all-gather of key and value side by side
    gradients: one reduce-scatter of what each rank's queries make for all keys, in the accumulator's type (fp32, or
        fp64), as under Ring attention
    """

    @staticmethod
    def forward(
        ctx: Any, key: torch.Tensor, value: torch.Tensor, group: SequenceGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns whole keys and values."""
        ctx.group, ctx.widths, ctx.dtype = group, (key.shape[-1], value.shape[-1]), key.dtype
        joined = torch.cat((key, value), dim=-1)
        whole = all_gather(joined, group.zigzag, operator=_OPERATOR, dim=2, config=group.config)
        order = layout.inverse(group.zigzag_size, whole.shape[2], RING_LAYOUT, whole.device)
        keys, values = whole[:, :, order].split(ctx.widths, dim=-1)
        return keys.contiguous(), values.contiguous()

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Returns the gradients of this rank's keys and values, complete."""
        group, size = ctx.group, ctx.group.zigzag_size
        joined = torch.cat(grad_outputs, dim=-1).to(accumulator_dtype(ctx.dtype))
        length = joined.shape[2]
        order = torch.cat([layout.positions(rank, size, length, RING_LAYOUT, joined.device) for rank in range(size)])
        own = reduce_scatter(
            joined[:, :, order], group.zigzag, operator=_OPERATOR, dim=2, phase="backward", config=group.config
        )
        key, value = own.to(ctx.dtype).split(ctx.widths, dim=-1)
        return key, value, None
