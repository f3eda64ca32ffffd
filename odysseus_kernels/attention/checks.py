"""What operators with attention inside check before anything is sent."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from odysseus_kernels.attention.layout import block_count, check_layout
from odysseus_kernels.attention.local import check_attention_kernel
from odysseus_kernels.config import OverlapConfig

__all__ = ["check_ids", "check_number", "check_ring_attention", "check_scores"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_NAME = "ring_attention"


def check_ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    world: int,
    causal: bool,
    layout: str,
    documents: Tensor | None,
    key_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    dropout: float,
    dropout_seed: int | None,
    first_head: int,
    kernel: str,
    config: OverlapConfig,
) -> None:
    """Raises ValueError, naming what was expected and given."""
    _check_tensors(q, k, v)
    check_layout(layout)
    batch, _, rows, _ = q.shape
    per_rank = block_count(world, layout) // world
    if rows % per_rank:
        raise ValueError(
            f'{_NAME}: expected an even number of tokens on each rank with layout="zigzag" (the sequence is cut into '
            f"{2 * world} blocks), got {rows}; pad the sequence to a multiple of {2 * world}"
        )
    if documents is not None:
        check_ids(_NAME, "documents", documents, _INTEGERS, q, [batch, rows * world])
    if key_mask is not None:
        check_ids(_NAME, "key_mask", key_mask, (torch.bool, *_INTEGERS), q, [batch, rows * world])
    check_scores(_NAME, q, window, causal, scale, dropout, dropout_seed, first_head, kernel, config)


def check_number(name: str, what: str, value: object, *, whole: bool = False) -> None:
    """Raises ValueError unless ``value`` is a number: no tensor, whose value would be read from the device."""
    kinds = (int, numbers.Integral, torch.SymInt) if whole else (int, float, numbers.Real, torch.SymFloat, torch.SymInt)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name}: expected {what} to be a {'whole ' if whole else ''}number, got {value!r}")


def check_scores(
    name: str,
    x: Tensor,
    window: int | None,
    causal: bool,
    scale: float | None,
    dropout: float,
    dropout_seed: int | None,
    first_head: int,
    kernel: str,
    config: OverlapConfig,
) -> None:
    """Raises ValueError for settings of operator ``name`` that no attention on ``x``'s device has."""
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int | torch.SymInt) or window < 1:
            raise ValueError(f"{name}: expected window to be a whole number of tokens of at least 1, got {window!r}")
        if not causal:
            raise ValueError(
                f"{name}: expected causal=True with window={window}: a window looks back, got causal=False"
            )
    if scale is not None:
        check_number(name, "scale", scale)
        if not 0 < scale < math.inf:
            raise ValueError(f"{name}: expected scale above 0, and finite, got {scale!r}")
    check_number(name, "dropout", dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"{name}: expected dropout from 0 to below 1, got {dropout!r}")
    if dropout and dropout_seed is None:
        raise ValueError(
            f"{name}: expected dropout_seed with dropout={dropout}, the same whole number on all ranks, got None: "
            f"what is dropped must not depend on which rank computes it"
        )
    if dropout_seed is not None:
        check_number(name, "dropout_seed", dropout_seed, whole=True)
    if dropout_seed is not None and not -(1 << 63) <= dropout_seed < 1 << 63:
        raise ValueError(f"{name}: expected dropout_seed to fit 64 bits, got {dropout_seed}")
    if first_head < 0:
        raise ValueError(f"{name}: expected first_head of at least 0, got {first_head}")
    check_attention_kernel(kernel)
    if kernel == "flash_attention_2" and not x.is_cuda:
        raise ValueError(f'{name}: kernel="flash_attention_2" expects CUDA tensors, got {x.device}; use "sdpa"')
    if config.mode == "tiles":
        raise ValueError(
            f'{name}: expected mode "auto", "fused" or "unfused", got "tiles": no tile kernel does attention'
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{_NAME}: expected {name} to be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(
                f"{_NAME}: expected {name} [batch, heads, tokens, width] without empty dimensions, "
                f"got shape {list(tensor.shape)}"
            )
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{_NAME}: expected {name} of dtype float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{_NAME}: expected {name} of q's dtype {q.dtype} on {q.device}, got {tensor.dtype} on {tensor.device}"
            )
    batch, heads, rows, width = q.shape
    if k.shape[0] != batch or k.shape[2:] != (rows, width):
        raise ValueError(
            f"{_NAME}: expected k [{batch}, heads, {rows}, {width}] beside q {list(q.shape)}, got {list(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{_NAME}: expected v {[*k.shape[:3], 'any width']} beside k, got {list(v.shape)}")
    if heads % k.shape[1]:
        raise ValueError(
            f"{_NAME}: expected query heads that divide by the key/value heads, got {heads} and {k.shape[1]}"
        )


def check_ids(
    operator: str, name: str, ids: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor, shape: list[int]
) -> None:
    """Raises ValueError unless ``ids`` are integers of ``dtypes`` and ``shape`` on the device of ``like``."""
    if not isinstance(ids, Tensor) or ids.dtype not in dtypes:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        wanted = "booleans or integers" if torch.bool in dtypes else "integers"
        raise ValueError(f"{operator}: expected {name} to be a tensor of {wanted}, got {got}")
    if list(ids.shape) != shape:
        raise ValueError(
            f"{operator}: expected {name} [batch, whole length] = {shape}: those of the whole sequence on every rank, "
            f"got {list(ids.shape)}"
        )
    if ids.device != like.device:
        raise ValueError(f"{operator}: expected {name} on the device of the tokens, {like.device}, got {ids.device}")
