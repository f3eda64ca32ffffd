"""Unfused twins of the operators: a raw collective, then a plain matrix product, with autograd.

They share nothing with the transports, so that a test against them cannot inherit a transport's bug, and they are what
a user would write: the baseline that benchmarks call ``torch``.  Partial sums are added by the backend, in the tensors'
own type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm.groups import resolve_group
from odysseus_kernels.comm.meeting.backend import all_gather_single, reduce_scatter_single

__all__ = [
    "all_gather_linear_reference",
    "all_to_all_linear_reference",
    "column_parallel_linear_reference",
    "linear_all_reduce_reference",
    "linear_all_to_all_reference",
    "linear_reduce_scatter_reference",
    "ulysses_attention_reference",
    "zero3_linear_reference",
]

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


class _SumRanks(torch.autograd.Function):
    """Sum over the ranks, on all of them; the gradient, which is the same on all, passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllToAll(torch.autograd.Function):
    """Part r of [N, ...] goes to rank r, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None


def _tokens_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., L/N, n] of this rank's tokens becomes [..., L, n/N] of its heads."""
    blocks = x.unflatten(-1, (group.size(), -1)).movedim(-2, 0)
    return _AllToAll.apply(blocks, group).movedim(0, -3).flatten(-3, -2)  # type: ignore[no-any-return]


def _heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., L, n/N] of this rank's heads becomes [..., L/N, n] of its tokens."""
    blocks = x.unflatten(-2, (group.size(), -1)).movedim(-3, 0)
    return _AllToAll.apply(blocks, group).movedim(0, -2).flatten(-2)  # type: ignore[no-any-return]


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


def linear_all_to_all_reference(
    x: Tensor,
    weight_shard: Sequence[Tensor],
    bias_shard: Sequence[Tensor | None] | None = None,
    *,
    group: Group,
    heads: Sequence[int] | None = None,
    zero3_group: Group = None,
) -> tuple[Tensor, ...]:
    """Unfused :func:`~odysseus_kernels.ops.linear_all_to_all`; same shapes, the whole weights are kept by autograd."""
    resolved = resolve_group(group)
    owners = resolved if zero3_group is None else resolve_group(zero3_group)
    biases = [None] * len(weight_shard) if bias_shard is None else bias_shard
    counts = [resolved.size()] * len(weight_shard) if heads is None else heads
    outputs = []
    for weight, bias, count in zip(weight_shard, biases, counts, strict=True):
        whole_bias = None if bias is None else _AllGather.apply(bias, 0, owners)
        y = F.linear(x, _AllGather.apply(weight, 0, owners), whole_bias)
        if count < resolved.size():
            y = y.unflatten(-1, (count, -1)).repeat_interleave(resolved.size() // count, -2).flatten(-2)
        outputs.append(_tokens_to_heads(y, resolved))
    return tuple(outputs)


def all_to_all_linear_reference(
    x: Tensor, weight_shard: Tensor, bias_shard: Tensor | None = None, *, group: Group, zero3_group: Group = None
) -> Tensor:
    """Unfused :func:`~odysseus_kernels.ops.all_to_all_linear`; same shapes, the whole weight is kept by autograd."""
    resolved = resolve_group(group)
    owners = resolved if zero3_group is None else resolve_group(zero3_group)
    bias = None if bias_shard is None else _AllGather.apply(bias_shard, 0, owners)
    return F.linear(_heads_to_tokens(x, resolved), _AllGather.apply(weight_shard, 1, owners), bias)


def linear_all_reduce_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: Group) -> Tensor:
    """Unfused :func:`~odysseus_kernels.ops.linear_all_reduce`; same shapes."""
    y = _SumRanks.apply(F.linear(x, weight), resolve_group(group))
    return y if bias is None else y + bias


def column_parallel_linear_reference(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None] | None = None, *, group: Group
) -> tuple[Tensor, ...]:
    """Unfused :func:`~odysseus_kernels.ops.column_parallel_linear`; same shapes."""
    same = _SumGradient.apply(x, resolve_group(group))
    biases = [None] * len(weight) if bias is None else bias
    return tuple(F.linear(same, one, its_bias) for one, its_bias in zip(weight, biases, strict=True))


def ulysses_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, group: Group, attention: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """:func:`~odysseus_kernels.ops.ulysses_attention` by raw collectives; same shapes."""
    resolved = resolve_group(group)
    world = resolved.size()

    def heads_of(x: Tensor) -> Tensor:
        shared = x.repeat_interleave(max(1, world // x.shape[1]), 1)
        return (
            _tokens_to_heads(shared.transpose(1, 2).flatten(2), resolved)
            .unflatten(-1, (-1, x.shape[3]))
            .transpose(1, 2)
        )

    out = attention(heads_of(q), heads_of(k), heads_of(v))
    tokens = _heads_to_tokens(out.transpose(1, 2).flatten(2), resolved)
    return tokens.unflatten(-1, (-1, out.shape[3])).transpose(1, 2)
