"""Ulysses around any attention function: tokens are exchanged for heads before it, and heads for tokens after it.

For users with projections of their own; :func:`~odysseus_kernels.ops.linear_all_to_all` and
:func:`~odysseus_kernels.ops.all_to_all_linear` fuse the same exchanges with the projections.  Buffers, streams and who
may run beside the operator are the transport's contract (``comm/exchange.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm.arguments import check_config, check_tensors, under_autocast
from odysseus_kernels.comm.groups import resolve_group
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops._heads import all_to_all, check_head_counts
from odysseus_kernels.ops._validate import group_by_name

__all__ = ["causal_attention", "ulysses_attention"]

_NAME = "ulysses_attention"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's causal attention; q [B, heads, L, head_dim], k and v with equally many heads or fewer, shared ones."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    attention: Attention = causal_attention,
    config: OverlapConfig | None = None,
) -> Tensor:
    """Runs ``attention`` over the whole sequence, of which each rank has some tokens; differentiable.

    N ranks; B batch, s = L/N tokens of this rank.  Each rank gets heads/N query heads of all L tokens, and kv_heads/N
    key and value heads or, where there are fewer of these than ranks, the one that its query heads use: that head is
    then sent to N / kv_heads ranks, whose gradients add up.

    Args:
        q: [B, heads, s, head_dim], this rank's tokens; equal shapes on all ranks.
        k, v: [B, kv_heads, s, head_dim]; v's head_dim may differ.
        group: the ranks; None is the default group.
        attention: ``attention(q, k, v) -> out`` with q [B, heads/N, L, head_dim], k and v likewise and out
            [B, heads/N, L, any]; causal if not given.
        config: transport, time limit.  There is no product to overlap with: all modes do the same.

    Returns:
        [B, heads, s, any], this rank's tokens.

    Raises:
        ValueError: bad input, before anything is sent; heads that the ranks cannot share out (it says what would do).
        CommunicationError: ranks differ in what they call, or a peer is lost or silent.

    Example:
        >>> q, kv = torch.ones(1, 4, 8, 16), torch.ones(1, 2, 8, 16)  # 4 and 2 heads, 8 of 16 tokens
        >>> def attention(q, k, v):  # over all tokens of this rank's heads
        ...     assert q.shape == (1, 2, 16, 16) and k.shape == v.shape == (1, 1, 16, 16)
        ...     return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        >>> ody.ulysses_attention(q, kv, kv, group=group, attention=attention).shape
        torch.Size([1, 4, 8, 16])
    """
    check_tensors(_NAME, q=q, k=k, v=v)
    key = check_config(config).key()
    q, k, v = under_autocast(q.device, q, k, v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4 or 0 in (tensor.shape[1], tensor.shape[3]):
            raise ValueError(
                f"{_NAME}: expected {name} [batch, heads, tokens, head_dim] with at least one head of at least one "
                f"element, got {list(tensor.shape)}"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{_NAME}: expected {name} of q's dtype {q.dtype} on {q.device}, got {tensor.dtype} on {tensor.device}"
            )
    if not q.shape[0] == k.shape[0] == v.shape[0] or not q.shape[2] == k.shape[2] == v.shape[2]:
        raise ValueError(
            f"{_NAME}: expected q, k and v of one batch and one length, got {list(q.shape)}, {list(k.shape)} and "
            f"{list(v.shape)}"
        )
    if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{_NAME}: expected as many key as value heads, and a multiple of query heads, got {q.shape[1]} query, "
            f"{k.shape[1]} key and {v.shape[1]} value heads"
        )
    resolved = resolve_group(group)
    world = resolved.size()
    _, sharers = check_head_counts(_NAME, (q.shape[1], k.shape[1]), world)
    if sharers > 1:
        k, v = (tensor.repeat_interleave(sharers, 1) for tensor in (k, v))
    whole = torch.ops.odysseus.tokens_to_heads([q, k, v], resolved.group_name, key, "forward")
    out = attention(*whole)
    expected = (q.shape[0], q.shape[1] // world, q.shape[2] * world)
    if not isinstance(out, Tensor) or out.ndim != 4 or out.shape[:3] != expected:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{_NAME}: expected attention to return {[*expected, 'any']}, got {got}")
    (tokens,) = torch.ops.odysseus.heads_to_tokens([out], resolved.group_name, key, "forward")
    return tokens  # type: ignore[no-any-return]


@torch.library.custom_op("odysseus::tokens_to_heads", mutates_args=())
def _tokens_to_heads(tensors: Sequence[Tensor], group_name: str, config_key: str, phase: str) -> list[Tensor]:
    """Each [B, heads, L/N, width] becomes [B, heads/N, L, width]."""
    group = group_by_name(group_name)
    world = group.size()
    outputs = [t.new_empty((t.shape[0], t.shape[1] // world, t.shape[2] * world, t.shape[3])) for t in tensors]
    received = [
        out.view(out.shape[:2].numel(), world, t.shape[2], t.shape[3]).transpose(0, 1)
        for out, t in zip(outputs, tensors, strict=True)
    ]

    def fill(rank: int, made: Sequence[Tensor]) -> None:
        for tensor, block in zip(tensors, made, strict=True):
            heads = tensor.shape[1] // world
            part = tensor[:, rank * heads : (rank + 1) * heads]
            block.view(part.shape).copy_(part)

    _exchange(group, config_key, phase, received, fill, tensors)
    return outputs


@torch.library.custom_op("odysseus::heads_to_tokens", mutates_args=())
def _heads_to_tokens(tensors: Sequence[Tensor], group_name: str, config_key: str, phase: str) -> list[Tensor]:
    """Each [B, heads/N, L, width] becomes [B, heads, L/N, width]."""
    group = group_by_name(group_name)
    world = group.size()
    outputs, received = [], []
    for t in tensors:
        batch, heads, length, width = t.shape
        rows = length // world
        out = t.new_empty((batch, heads * world, rows, width))
        outputs.append(out)
        received.append(out.view(batch, world, heads * rows, width).transpose(0, 1))

    def fill(rank: int, made: Sequence[Tensor]) -> None:
        for tensor, block in zip(tensors, made, strict=True):
            rows = tensor.shape[2] // world
            part = tensor[:, :, rank * rows : (rank + 1) * rows]
            block.view(part.shape).copy_(part)

    _exchange(group, config_key, phase, received, fill, tensors)
    return outputs


def _exchange(
    group: dist.ProcessGroup,
    config_key: str,
    phase: str,
    received: Sequence[Tensor],
    fill: Callable[[int, Sequence[Tensor]], None],
    tensors: Sequence[Tensor],
) -> None:
    assert phase in ("forward", "backward")
    config, shapes = OverlapConfig.from_key(config_key), f"tensors {[list(tensor.shape) for tensor in tensors]}"
    all_to_all(_NAME, "forward" if phase == "forward" else "backward", group, config, received, fill, shapes)


@_tokens_to_heads.register_fake
def _(tensors: Sequence[Tensor], group_name: str, config_key: str, phase: str) -> list[Tensor]:
    world = group_by_name(group_name).size()
    return [t.new_empty((t.shape[0], t.shape[1] // world, t.shape[2] * world, t.shape[3])) for t in tensors]


@_heads_to_tokens.register_fake
def _(tensors: Sequence[Tensor], group_name: str, config_key: str, phase: str) -> list[Tensor]:
    world = group_by_name(group_name).size()
    return [t.new_empty((t.shape[0], t.shape[1] * world, t.shape[2] // world, t.shape[3])) for t in tensors]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, ctx.group_name, ctx.config_key, _ = inputs


def _tokens_to_heads_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    return torch.ops.odysseus.heads_to_tokens(grads, ctx.group_name, ctx.config_key, "backward"), None, None, None


def _heads_to_tokens_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    return torch.ops.odysseus.tokens_to_heads(grads, ctx.group_name, ctx.config_key, "backward"), None, None, None


_tokens_to_heads.register_autograd(_tokens_to_heads_backward, setup_context=_setup_context)
_heads_to_tokens.register_autograd(_heads_to_tokens_backward, setup_context=_setup_context)
