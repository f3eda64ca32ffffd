"""Attention of some queries to some keys on one device, with its log-sum-exp, so that parts can be merged.

:func:`attend` gives what these keys alone would give; :func:`attend_backward` takes the output and log-sum-exp over
*all* keys that the queries see and gives the gradients' share of these keys.  Both keep memory bounded: kernels of
PyTorch or flash-attn where they serve, else products over blocks of queries.  Nothing here communicates.

The calls of CUDA kernels follow their documentation and have not been run yet.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from odysseus_kernels.attention.dropout import Dropout
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.errors import FallbackWarning

__all__ = ["RING_KERNELS", "attend", "attend_backward", "check_attention_kernel"]

RING_KERNELS = ("sdpa", "flash_attention_2")
"""Attention functions, by transformers' names, that Ring attention has a kernel for."""
# Probabilities that exist at one time where no kernel serves.
_MOST_PROBABILITIES = 1 << 21
_FEWEST_ROWS = 128
# Elements of queries that are held in fp32 at one time where a kernel's operands are widened.
_MOST_WIDENED = 1 << 22
_FLASH_WIDTHS = 256  # largest head dimension of flash kernels on CUDA

aten = torch.ops.aten


def check_attention_kernel(name: str) -> None:
    """Raises ValueError unless the attention ``name`` (transformers' names) gives a log-sum-exp and can be had.

    Ring attention merges what blocks of keys give by their log-sum-exp: ``"sdpa"`` stands for PyTorch's flash kernels,
    ``"flash_attention_2"`` for the package flash-attn.
    """
    if name not in RING_KERNELS:
        raise ValueError(
            f'attention: expected "sdpa" or "flash_attention_2", got {name!r}: Ring attention needs a kernel that '
            f"gives the log-sum-exp of its scores"
        )
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            'attention: "flash_attention_2" needs the package flash-attn, which cannot be imported; expected "sdpa"'
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: Dropout | None = None,
    kernel: str = "sdpa",
) -> tuple[Tensor, Tensor]:
    """softmax(q @ k.T * scale) @ v and the log-sum-exp of the scores.

    Args:
        q: [B, Hq, Sq, D].
        k: [B, Hkv, Sk, D]; Hkv divides Hq.
        v: [B, Hkv, Sk, Dv].
        scale: of the scores.
        causal: query n sees keys 0 to n; Sq = Sk.
        mask: bool [B or 1, Sq, Sk], True where a query sees a key; not together with ``causal``.
        dropout: of the probabilities; the log-sum-exp is that without.
        kernel: see :func:`check_attention_kernel`.

    Returns:
        out [B, Hq, Sq, Dv] in q's type or wider, zero where a query sees nothing; log-sum-exp [B, Hq, Sq] in fp32
        (fp64 for fp64), -inf where a query sees nothing.
    """
    q, k, v = (_dense_rows(x) for x in (q, k, v))
    reason = _why_products(q, v, mask, dropout)
    if reason is not None:
        _warn_of_products(kernel, reason)
        return _attend_by_products(q, k, v, scale, _with_causal(mask, causal, q, k), dropout)
    if q.is_cuda:
        return _attend_cuda(q, k, v, scale, causal, kernel)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=_additive(mask, q.dtype), scale=scale
    )
    if mask is not None:
        # What the kernel gives for a row without keys is unspecified (zeros in torch 2.13).
        blind = ~mask.any(-1)[:, None]
        out, lse = out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, -math.inf)
    return out, lse


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: Dropout | None = None,
    kernel: str = "sdpa",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): the share of these keys in the gradients, in q's type or wider.

    Args:
        grad: [B, Hq, Sq, Dv], of the output over all keys.
        out, lse: over all keys; ``lse`` is finite.
        q, k, v, scale, causal, mask, dropout, kernel: as in :func:`attend`.
    """
    grad, q, k, v, out = (_dense_rows(x) for x in (grad, q, k, v, out))
    if _why_products(q, v, mask, dropout) is not None:
        return _backward_by_products(grad, q, k, v, out, lse, scale, _with_causal(mask, causal, q, k), dropout)
    if q.is_cuda:
        return _backward_cuda(grad, q, k, v, out, lse, scale, causal, kernel)
    return _backward_cpu(grad, q, k, v, out, lse, scale, causal, mask)


def _backward_cpu(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """In fp32 for 16 bits, some key/value heads at a time.

    The kernel gives gradients in its operands' type: shares of many ranks, each rounded to 16 bits, would add up to
    less than an unsharded run gives.  (Without instructions for 16 bits it is several times slower in them, too.)
    """
    wide = accumulator_dtype(q.dtype)
    additive = _additive(mask, wide)

    def run(*operands: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *operands, 0.0, causal, attn_mask=additive, scale=scale
        )
        return found

    if wide == q.dtype:
        return run(grad, q, k, v, out, lse)
    dq, dk, dv = (torch.empty_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q, k, v))
    shared, head = q.shape[1] // k.shape[1], q[:, 0].numel()
    some = max(1, _MOST_WIDENED // (shared * head))
    for first in range(0, k.shape[1], some):
        groups = slice(first, min(first + some, k.shape[1]))
        heads = slice(groups.start * shared, groups.stop * shared)
        parts = [x[:, heads].to(wide) for x in (grad, q)] + [x[:, groups].to(wide) for x in (k, v)]
        shares = run(*parts, out[:, heads].to(wide), lse[:, heads])
        dq[:, heads], dk[:, groups], dv[:, groups] = shares
    return dq, dk, dv


def _dense_rows(x: Tensor) -> Tensor:
    """``x``, copied unless its rows follow one another in memory.

    Kernels assume, unchecked, that a row's elements are adjacent and that the distance of rows is a leading dimension:
    where that does not hold they read other memory.
    """
    return x if x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] else x.contiguous()


def _why_products(q: Tensor, v: Tensor, mask: Tensor | None, dropout: Dropout | None) -> str | None:
    """Why no kernel serves; None where one does."""
    width = q.shape[-1]
    if dropout is not None:
        return "no kernel draws dropout by head and position"
    if width != v.shape[-1]:
        return f"kernels take values as wide as keys, got {v.shape[-1]} and {width}"
    if q.device.type == "cpu":
        return None
    if not q.is_cuda:
        return f"there is no kernel for {q.device.type} tensors"
    if mask is not None:
        return "no CUDA kernel that gives a log-sum-exp takes a mask, as packed documents, padding and windows need"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"CUDA kernels take float16 and bfloat16, got {q.dtype}"
    if width % 8 or width > _FLASH_WIDTHS:
        return f"CUDA kernels take heads whose width divides by 8, of at most {_FLASH_WIDTHS}, got {width}"
    return None


@functools.cache
def _warn_of_products(kernel: str, reason: str) -> None:
    """Once for each kernel and reason: results are the same, times are not."""
    warnings.warn(
        f'attention under Ring runs as plain matrix products instead of kernel "{kernel}", which is slower: {reason}',
        FallbackWarning,
        stacklevel=2,
    )


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B or 1, 1, Sq, Sk] for PyTorch's kernels: 0 where seen, else -inf."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)[:, None]


def _with_causal(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    if not causal:
        return mask
    assert mask is None
    rows = torch.arange(q.shape[2], device=q.device)
    return (rows[:, None] >= rows[None, : k.shape[2]])[None]


# ---- by products: any type, any device, dropout --------------------------------------------------------------------


def _parts(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """(key/value heads, query heads, rows) such that few probabilities exist at one time."""
    batch, heads, rows, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    shared = heads // kv_heads
    row = max(1, batch * shared * keys)
    some = max(1, min(kv_heads, _MOST_PROBABILITIES // (row * min(rows, _FEWEST_ROWS))))
    step = max(1, _MOST_PROBABILITIES // (row * some))
    for head in range(0, kv_heads, some):
        end = min(head + some, kv_heads)
        for start in range(0, rows, step):
            yield slice(head, end), slice(head * shared, end * shared), slice(start, min(start + step, rows))


def _scores(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """[B, Hkv, shared, rows, Sk] of q [B, Hkv, shared, rows, D] and k [B, Hkv, Sk, D]."""
    scores = torch.matmul(q.flatten(2, 3), k.mT).view(*q.shape[:-1], k.shape[2]).mul_(scale)
    return scores if mask is None else scores.masked_fill_(~mask[:, None, None], -math.inf)


def _grouped(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[B, Hq, ...] as [B, groups, Hq / groups, ...] in ``dtype``."""
    return x.to(dtype).unflatten(1, (groups, -1))


def _factors(dropout: Dropout | None, q: Tensor, heads: slice, rows: slice) -> Tensor | None:
    if dropout is None:
        return None
    return _grouped(dropout.factors(q.shape[0], heads, rows, q.dtype), q.shape[1], q.dtype)


def _attend_by_products(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    wide = accumulator_dtype(q.dtype)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=wide)
    lse = q.new_empty(q.shape[:-1], dtype=wide)
    for groups, heads, rows in _parts(q, k):
        keys, values = k[:, groups].to(wide), v[:, groups].to(wide)
        queries = _grouped(q[:, heads, rows], keys.shape[1], wide)
        scores = _scores(queries, keys, scale, None if mask is None else mask[:, rows])
        total = torch.logsumexp(scores, -1)
        # A row without keys has -inf everywhere: exp(-inf - 0) is 0, exp(-inf + inf) would not be a number.
        probabilities = scores.sub_(total.masked_fill(total == -math.inf, 0)[..., None]).exp_()
        factors = _factors(dropout, queries, heads, rows)
        if factors is not None:
            probabilities.mul_(factors)
        result = torch.matmul(probabilities.flatten(2, 3), values)
        out[:, heads, rows] = result.view(*queries.shape[:-1], -1).flatten(1, 2)
        lse[:, heads, rows] = total.flatten(1, 2)
    return out, lse


def _backward_by_products(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulator_dtype(q.dtype)
    dq = torch.empty_like(q, dtype=wide, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (k, v))
    for groups, heads, rows in _parts(q, k):
        keys, values = k[:, groups].to(wide), v[:, groups].to(wide)
        count = keys.shape[1]
        queries, grads, outs = (_grouped(x[:, heads, rows], count, wide) for x in (q, grad, out))
        scores = _scores(queries, keys, scale, None if mask is None else mask[:, rows])
        probabilities = scores.sub_(_grouped(lse[:, heads, rows], count, wide)[..., None]).exp_()
        dropped = torch.matmul(grads.flatten(2, 3), values.mT).view_as(probabilities)
        factors = _factors(dropout, queries, heads, rows)
        kept = probabilities
        if factors is not None:
            dropped, kept = dropped.mul_(factors), probabilities * factors
        dv[:, groups] += torch.matmul(kept.flatten(2, 3).mT, grads.flatten(2, 3))
        delta = (grads * outs).sum(-1, keepdim=True)
        dscores = dropped.sub_(delta).mul_(probabilities).mul_(scale).flatten(2, 3)
        dk[:, groups] += torch.matmul(dscores.mT, queries.flatten(2, 3))
        dq[:, heads, rows] = torch.matmul(dscores, keys).view_as(queries).flatten(1, 2)
    return dq, dk, dv


# ---- CUDA: not run yet ---------------------------------------------------------------------------------------------


def _attend_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, kernel: str) -> tuple[Tensor, Tensor]:
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    if kernel == "flash_attention_2":
        from flash_attn.flash_attn_interface import _flash_attn_forward

        out, lse, *_ = _flash_attn_forward(
            queries,
            keys,
            values,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        )
    else:
        out, lse, *_ = aten._flash_attention_forward(
            queries, keys, values, None, None, q.shape[2], k.shape[2], 0.0, causal, False, scale=scale
        )
    return out.transpose(1, 2), lse


def _backward_cuda(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grads, queries, keys, values, outs = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    lse = lse.contiguous()
    if kernel == "flash_attention_2":
        from flash_attn.flash_attn_interface import _flash_attn_backward

        results = tuple(torch.empty_like(x) for x in (queries, keys, values))
        _flash_attn_backward(
            grads.contiguous(),
            queries,
            keys,
            values,
            outs.contiguous(),
            lse,
            *results,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
        )
    else:
        # The state of the random numbers is not used without dropout; the kernel wants tensors all the same.
        unused = torch.zeros(2, dtype=torch.int64, device=q.device)
        results = aten._flash_attention_backward(
            grads.contiguous(),
            queries,
            keys,
            values,
            outs.contiguous(),
            lse,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            unused,
            unused,
            scale=scale,
        )
    dq, dk, dv = (x.transpose(1, 2) for x in results)
    return dq, dk, dv
