"""What the public operators check before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from odysseus_kernels.comm.arguments import check_tensors, under_autocast

__all__ = ["check_bias", "check_dim", "check_experts", "check_linear", "check_several", "group_by_name"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def group_by_name(name: str) -> torch.distributed.ProcessGroup:
    """The process group that a custom operator was called with; they take names, since they cannot take groups."""
    return torch._C._distributed_c10d._resolve_process_group(cast(Any, name))


def check_linear(operator: str, x: Tensor, weight: Tensor, name: str = "weight", input_name: str = "x") -> None:
    """x [..., K] and weight [n, K]: floating, same dtype, same device, same K."""
    for what, tensor in ((input_name, x), (name, weight)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{operator}: expected {what} to be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{operator}: expected {what} of dtype float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
    if weight.ndim != 2:
        raise ValueError(f"{operator}: expected {name} [out_features, in_features], got shape {list(weight.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"{operator}: expected {name} with at least one row and column, got {list(weight.shape)}")
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{operator}: expected the last dimension of {input_name} to be {name}'s in_features {weight.shape[1]}, "
            f"got {input_name} {list(x.shape)} and {name} {list(weight.shape)}"
        )
    _same(operator, x, weight, name, input_name)


def check_bias(
    operator: str, x: Tensor, weight: Tensor, bias: Tensor | None, name: str = "bias", input_name: str = "x"
) -> None:
    """bias [n] beside weight [n, K]."""
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]:
        got = list(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(f"{operator}: expected {name} of shape [{weight.shape[0]}], got {got}")
    _same(operator, x, bias, name, input_name)


def check_several(
    operator: str,
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None,
    name: str = "weight",
    bias_name: str = "bias",
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """x, the weights [n, K] of one or several projections and a bias or None for each, as autocast has them."""
    weights: list[Tensor] = [weight] if isinstance(weight, Tensor) else list(weight)
    if bias is None:
        biases: list[Tensor | None] = [None] * len(weights)
    else:
        biases = [bias] if isinstance(bias, Tensor) else list(bias)
    if not weights or len(biases) != len(weights):
        raise ValueError(f"{operator}: expected as many biases as weights, got {len(biases)} and {len(weights)}")
    check_tensors(operator, x=x)
    for index, (one, its_bias) in enumerate(zip(weights, biases, strict=True)):
        number = "" if isinstance(weight, Tensor) else f"[{index}]"
        check_tensors(operator, **{f"{name}{number}": one, f"{bias_name}{number}": its_bias})
    x, *weights = under_autocast(x.device, x, *weights)
    biases = list(under_autocast(x.device, *biases))
    for one, its_bias in zip(weights, biases, strict=True):
        check_linear(operator, x, one, name)
        check_bias(operator, x, one, its_bias, bias_name)
    return x, weights, biases


def check_dim(operator: str, x: Tensor, dim: int) -> int:
    """``dim`` as a non-negative index; the last dimension holds the features and cannot be cut."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{operator}: expected dim to be a whole number, got {dim!r}")
    if x.ndim < 2:
        raise ValueError(f"{operator}: expected x with at least 2 dimensions, got shape {list(x.shape)}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{operator}: expected dim from {-x.ndim} to {x.ndim - 2}, got {dim}")
    dim %= x.ndim
    if dim == x.ndim - 1:
        raise ValueError(
            f"{operator}: expected dim to name a sequence or batch dimension, got the last one (features) of {x.ndim}"
        )
    return dim


def check_experts(
    operator: str, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_shard: Tensor, down_shard: Tensor
) -> None:
    """x [T, d], index and weights [T, k], gate_up_shard [e, 2i, d] and down_shard [e, d, i], as their names say."""
    named = {
        "x": (x, 2),
        "top_k_index": (top_k_index, 2),
        "top_k_weights": (top_k_weights, 2),
        "gate_up_shard": (gate_up_shard, 3),
        "down_shard": (down_shard, 3),
    }
    for name, (tensor, dimensions) in named.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{operator}: expected {name} to be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != dimensions:
            raise ValueError(f"{operator}: expected {name} with {dimensions} dimensions, got {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{operator}: expected {name} on x's device {x.device}, got {tensor.device}")
    if x.dtype not in _DTYPES or top_k_weights.dtype not in _DTYPES:
        raise ValueError(
            f"{operator}: expected x and top_k_weights of dtype float32, bfloat16, float16 or float64, got {x.dtype} "
            f"and {top_k_weights.dtype}"
        )
    if top_k_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{operator}: expected top_k_index of dtype int64 or int32, got {top_k_index.dtype}")
    for name, chosen in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
        if chosen.shape != (x.shape[0], top_k_index.shape[1]) or 0 in chosen.shape[1:]:
            raise ValueError(
                f"{operator}: expected top_k_index and top_k_weights [{x.shape[0]}, k] for x {list(x.shape)}, got "
                f"{name} {list(chosen.shape)}"
            )
    experts, rows, width = gate_up_shard.shape
    if rows % 2 or width != x.shape[1] or 0 in gate_up_shard.shape:
        raise ValueError(
            f"{operator}: expected gate_up_shard [experts, 2 * intermediate, {x.shape[1]}] for x {list(x.shape)}, got "
            f"{list(gate_up_shard.shape)}"
        )
    if down_shard.shape != (experts, width, rows // 2):
        raise ValueError(
            f"{operator}: expected down_shard {[experts, width, rows // 2]} beside gate_up_shard "
            f"{list(gate_up_shard.shape)}, got {list(down_shard.shape)}"
        )
    for name, shard in (("gate_up_shard", gate_up_shard), ("down_shard", down_shard)):
        _same(operator, x, shard, name)


def _same(operator: str, x: Tensor, other: Tensor, name: str, input_name: str = "x") -> None:
    if x.dtype != other.dtype:
        raise ValueError(
            f"{operator}: expected {name} of {input_name}'s dtype {x.dtype}, got {other.dtype}: give a model's parts "
            f"one dtype, or run it within torch.autocast"
        )
    if x.device != other.device:
        raise ValueError(f"{operator}: expected {name} on {input_name}'s device {x.device}, got {other.device}")
