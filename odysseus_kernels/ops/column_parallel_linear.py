"""Tensor parallelism's first half: a column-parallel linear layer, whose input gradient is all-reduced.

The mirror of ``linear_all_reduce``: nothing is sent forward, and backward the input gradient's rows leave as they are
produced.  Buffers, streams and who may run beside the operator are the transport's contract
(``comm/host/transport.py``, ``comm/collective/transport.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm.arguments import check_config, refuse_second_derivative
from odysseus_kernels.comm.groups import resolve_group
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops import _several
from odysseus_kernels.ops._all_reduce import sum_rows
from odysseus_kernels.ops._heads import check_mode
from odysseus_kernels.ops._products import WeightGradient, multiply, multiply_lines
from odysseus_kernels.ops._validate import check_several, group_by_name

__all__ = ["column_parallel_linear"]

_NAME = "column_parallel_linear"


@overload
def column_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    config: OverlapConfig | None = None,
) -> Tensor: ...


@overload
def column_parallel_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    config: OverlapConfig | None = None,
) -> tuple[Tensor, ...]: ...


def column_parallel_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    config: OverlapConfig | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """``y = x @ weight.T + bias`` of an x that all ranks have, column-parallel, differentiable.

    N ranks; K input features, n this rank's output features.

    forward:          y [..., n]       = x [..., K] @ weight [n, K].T + bias [n]; nothing is sent
    input gradient:   dx [..., K]      = AR(dy [..., n] @ weight), added in fp32, the same bits on all ranks
    weight gradient:  dweight [n, K]   = dy.T @ x
    bias gradient:    dbias [n]        = sum of dy over all but the last dimension

    The weight gradient is computed while the last of the input gradient's rows travel.

    Args:
        x: [..., K], the same on all ranks.
        weight: [n, K], this rank's rows, or a tuple of them: one all-reduce then sums the input gradient of all.
        bias: [n] or None; with several weights a tuple of these.
        group: the ranks; None is the default group.
        config: mode, transport, pieces, time limit.

    Returns:
        [..., n], or a tuple of them.

    Raises:
        ValueError: bad input, before anything is sent.
        CommunicationError: ranks differ in what they call, or a peer is lost or silent.

    Example:
        >>> x = torch.ones(5, 16, requires_grad=True)  # the same on both ranks
        >>> gate, up = ody.column_parallel_linear(x, (torch.ones(6, 16), torch.ones(6, 16)), group=group)
        >>> (gate.sum() + up.sum()).backward()
        >>> x.grad[0, 0].item()  # 12 rows on each of 2 ranks
        24.0
    """
    single = isinstance(weight, Tensor)
    config = check_config(config)
    x, weights, biases = check_several(_NAME, x, weight, bias)
    check_mode(_NAME, config)
    resolved = resolve_group(group)
    present, has_bias = _several.present_biases(biases)
    outputs = torch.ops.odysseus.column_parallel_linear(
        x, weights, present, has_bias, resolved.group_name, config.key()
    )
    return outputs[0] if single else tuple(outputs)


@torch.library.custom_op("odysseus::column_parallel_linear", mutates_args=())
def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    has_bias: Sequence[bool],
    group_name: str,
    config_key: str,
) -> list[Tensor]:
    """``biases`` holds one for each weight that ``has_bias``: lists of optional tensors have no gradients."""
    lines = x.reshape(-1, x.shape[-1])
    outputs = []
    for weight, bias in zip(weights, _several.biases_of_weights(biases, has_bias), strict=True):
        out = x.new_empty((lines.shape[0], weight.shape[0]))
        multiply_lines(out, lines, weight.t(), bias)
        outputs.append(out.view(*x.shape[:-1], weight.shape[0]))
    return outputs


@_forward.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    has_bias: Sequence[bool],
    group_name: str,
    config_key: str,
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


@torch.library.custom_op("odysseus::column_parallel_linear_backward", mutates_args=())
def _backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    group_name: str,
    config_key: str,
    input_needed: bool,
    weights_needed: Sequence[bool],
    biases_needed: Sequence[bool],
) -> list[Tensor]:
    """[dx, dweights..., dbiases...]; an empty tensor stands for a gradient that is not needed."""
    config = OverlapConfig.from_key(config_key)
    lines = x.reshape(1, -1, x.shape[-1])
    incoming = [grad.reshape(1, -1, weight.shape[0]).contiguous() for grad, weight in zip(grads, weights, strict=True)]
    sums: list[WeightGradient] = []

    def produce(start: int, stop: int, block: Tensor, bias: Tensor | None) -> None:
        for index, (grad, weight) in enumerate(zip(incoming, weights, strict=True)):
            multiply(block.unsqueeze(0), grad[:, start:stop], weight, add=index > 0)

    def add_weights() -> None:
        sums.clear()
        for grad, weight, needed, bias_needed in zip(incoming, weights, weights_needed, biases_needed, strict=True):
            sums.append(WeightGradient(weight, weight_needed=needed, bias_needed=bias_needed))
            sums[-1].add(grad, lines)

    dx = x.new_empty(0)
    if input_needed:
        total = sum_rows(
            _NAME,
            "backward",
            x,
            lines.shape[1],
            x.shape[-1],
            produce,
            group_by_name(group_name),
            config,
            flops=2 * x.numel() * sum(weight.shape[0] for weight in weights) * (1 + any(weights_needed)),
            shapes=f"x {list(x.shape)}, {any(weights_needed)}",
            own=str([weight.shape[0] for weight in weights]),
            meanwhile=add_weights,
        )
        dx = total.view(x.shape)
    else:
        add_weights()
    results = [*(total.weight() for total in sums), *(total.bias() for total in sums)]
    return [dx, *(x.new_empty(0) if grad is None else grad for grad in results)]


@_backward.register_fake
def _(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    group_name: str,
    config_key: str,
    input_needed: bool,
    weights_needed: Sequence[bool],
    biases_needed: Sequence[bool],
) -> list[Tensor]:
    return [
        x.new_empty(x.shape if input_needed else (0,)),
        *_several.empty_gradients(weights, weights_needed, biases_needed),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, has_bias, ctx.group_name, ctx.config_key = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *weights)
    ctx.shapes = [one.shape for one in output]
    _several.note_needed(ctx, weights, biases, has_bias)


def _autograd_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    incoming = [x.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, ctx.shapes, strict=True)]
    dx, *rest = torch.ops.odysseus.column_parallel_linear_backward(
        incoming,
        x,
        weights,
        ctx.group_name,
        ctx.config_key,
        ctx.needs_input_grad[0],
        ctx.weights_needed,
        ctx.biases_needed,
    )
    dweights, dbiases = _several.wanted_gradients(ctx, rest)
    return dx if ctx.needs_input_grad[0] else None, dweights, dbiases, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, _NAME)
