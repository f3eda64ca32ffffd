"""Tensor parallelism's second half: a row-parallel linear layer fused with the all-reduce that follows it.

Parts of other ranks' rows leave as they are produced, and the summed rows come back.  Buffers, streams and who may run
beside the operator are the transport's contract (``comm/host/transport.py``, ``comm/collective/transport.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm.arguments import check_config, check_tensors, refuse_second_derivative, under_autocast
from odysseus_kernels.comm.groups import resolve_group
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops._all_reduce import sum_rows
from odysseus_kernels.ops._heads import check_mode
from odysseus_kernels.ops._products import multiply_lines
from odysseus_kernels.ops._validate import check_bias, check_linear, group_by_name

__all__ = ["linear_all_reduce"]

_NAME = "linear_all_reduce"


def linear_all_reduce(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    config: OverlapConfig | None = None,
) -> Tensor:
    """``y = all_reduce(x @ weight.T) + bias``, row-parallel, differentiable, the same bits on all ranks.

    N ranks; k this rank's input features, n output features.

    forward:          y [..., n]       = AR(x [..., k] @ weight [n, k].T) + bias [n], added in fp32
    input gradient:   dx [..., k]      = dy @ weight
    weight gradient:  dweight [n, k]   = dy.T @ x
    bias gradient:    dbias [n]        = sum of dy over all but the last dimension

    y is the same on all ranks, and so is dy: nothing is sent in backward.

    Args:
        x: [..., k]; the dimensions other than k are equal on all ranks; N need not divide them.
        weight: [n, k], this rank's columns.
        bias: [n], the same on all ranks; added once, not once for each rank.
        group: the ranks; None is the default group.
        config: mode, transport, pieces, time limit; ``reduce="nvls"`` lets the NVLink switch add and copy.

    Returns:
        [..., n].

    Raises:
        ValueError: bad input, before anything is sent.
        CommunicationError: ranks differ in what they call, or a peer is lost or silent.

    Example:
        >>> x, weight, bias = torch.ones(5, 8), torch.ones(3, 8), torch.ones(3)
        >>> y = ody.linear_all_reduce(x, weight, bias, group=group)
        >>> y[0]  # 8 features on each of 2 ranks, and the bias once
        tensor([17., 17., 17.])
    """
    check_tensors(_NAME, x=x, weight=weight, bias=bias)
    config = check_config(config)
    x, weight, bias = under_autocast(x.device, x, weight, bias)
    check_linear(_NAME, x, weight)
    check_bias(_NAME, x, weight, bias)
    check_mode(_NAME, config)
    resolved = resolve_group(group)
    return torch.ops.odysseus.linear_all_reduce(x, weight, bias, resolved.group_name, config.key())


@torch.library.custom_op("odysseus::linear_all_reduce", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, group_name: str, config_key: str) -> Tensor:
    config = OverlapConfig.from_key(config_key)
    lines = x.reshape(-1, x.shape[-1])
    width = weight.shape[0]

    def produce(start: int, stop: int, block: Tensor, bias: Tensor | None) -> None:
        multiply_lines(block, lines[start:stop], weight.t(), bias)

    y = sum_rows(
        _NAME,
        "forward",
        x,
        lines.shape[0],
        width,
        produce,
        group_by_name(group_name),
        config,
        flops=2 * x.numel() * width,
        shapes=f"x {[*x.shape[:-1], '*']}, weight {[width, '*']}, bias {bias is not None}",
        own=str(weight.shape[1]),
        bias=bias,
        switched=config.reduce == "nvls",
    )
    return y.view(*x.shape[:-1], width)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, group_name: str, config_key: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("odysseus::linear_all_reduce_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, input_needed: bool, weight_needed: bool, bias_needed: bool
) -> list[Tensor]:
    """[dx, dweight, dbias]; an empty tensor stands for a gradient that is not needed.

    A separate operator although nothing is sent: torch would differentiate plain products again, without the sums over
    the ranks that second derivatives need.
    """
    lines, nothing = grad.reshape(-1, grad.shape[-1]), x.new_empty(0)
    return [
        (lines @ weight).view(x.shape) if input_needed else nothing,
        lines.t() @ x.reshape(-1, x.shape[-1]) if weight_needed else nothing.clone(),
        lines.sum(0) if bias_needed else nothing.clone(),
    ]


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, input_needed: bool, weight_needed: bool, bias_needed: bool
) -> list[Tensor]:
    return [
        x.new_empty(x.shape if input_needed else (0,)),
        weight.new_empty(weight.shape if weight_needed else (0,)),
        weight.new_empty(weight.shape[:1] if bias_needed else (0,)),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *_ = inputs
    ctx.save_for_backward(x, weight)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    results = torch.ops.odysseus.linear_all_reduce_backward(grad, *ctx.saved_tensors, *needed)
    gradients = (result if wanted else None for result, wanted in zip(results, needed, strict=True))
    return *gradients, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, _NAME)
