"""Unfused twins of the operators: a raw collective, then a plain matrix product, with autograd.

They share nothing with the transports, so that a test against them cannot inherit a transport's bug, and they are what
a user would write: the baseline that benchmarks call ``torch``.  Partial sums are added by the backend, in the tensors'
own type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..comm.backend import all_gather_single, reduce_scatter_single
from ..comm.groups import resolve_group

__all__ = ["all_gather_linear_reference", "linear_reduce_scatter_reference", "zero3_linear_reference"]

Group = dist.ProcessGroup | DeviceMesh | None


def _all_gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    front = x.movedim(dim, 0).contiguous()
    out = front.new_empty((group.size() * front.shape[0], *front.shape[1:]))
    all_gather_single(out, front, group)
    return out.movedim(0, dim)


def _reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    front = x.movedim(dim, 0).contiguous()
    out = front.new_empty((front.shape[0] // group.size(), *front.shape[1:]))
    reduce_scatter_single(out, front, group=group)
    return out.movedim(0, dim)


class _AllGather(torch.autograd.Function):
    """Forward all-gather along ``dim``, backward reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    """Forward reduce-scatter along ``dim``, backward all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad, ctx.dim, ctx.group), None, None


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over the ranks: a replicated parameter used on each rank's own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def all_gather_linear_reference(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    group: Group,
    dim: int = -2,
) -> Tensor | tuple[Tensor, ...]:
    """Unfused :func:`~odysseus_kernels.ops.all_gather_linear`; same shapes, the gathered x is kept by autograd."""
    full = _AllGather.apply(x, dim % x.ndim, resolve_group(group))
    if isinstance(weight, Tensor):
        assert bias is None or isinstance(bias, Tensor)
        return F.linear(full, weight, bias)
    biases = [None] * len(weight) if bias is None else bias
    return tuple(F.linear(full, one, its_bias) for one, its_bias in zip(weight, biases, strict=True))


def linear_reduce_scatter_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: Group, dim: int = -2
) -> Tensor:
    """Unfused :func:`~odysseus_kernels.ops.linear_reduce_scatter`; same shapes."""
    resolved = resolve_group(group)
    y = _ReduceScatter.apply(F.linear(x, weight), dim % x.ndim, resolved)
    return y if bias is None else y + _SumGradient.apply(bias, resolved)


def zero3_linear_reference(
    x: Tensor, weight_shard: Tensor, bias_shard: Tensor | None = None, *, group: Group
) -> Tensor:
    """Unfused :func:`~odysseus_kernels.ops.zero3_linear`; same shapes, the whole weight is kept by autograd."""
    resolved = resolve_group(group)
    bias = None if bias_shard is None else _AllGather.apply(bias_shard, 0, resolved)
    return F.linear(x, _AllGather.apply(weight_shard, 0, resolved), bias)
