"""Parameters as DTensors: how they are made from full copies, and how a layer gets at the numbers on this rank.

Every gradient that leaves these functions is *complete*: the sum over all ranks of the global loss's gradient, in the
placement of its parameter, so that optimizers, gradient clipping and checkpoints need to know nothing about it.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from odysseus_kernels.comm.functional import all_reduce
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.ops._validate import group_by_name

__all__ = ["distribute_parameter", "local_parameter", "replicated_parameter"]


def distribute_parameter(parameter: nn.Parameter, group: SequenceGroup, placement: Placement) -> nn.Parameter:
    """The DTensor parameter whose full value every rank already has in ``parameter``; nothing is sent.

    Args:
        parameter: the full parameter, identical on every rank.
        group: the ranks to distribute it over.
        placement: ``Shard(dim)``, where the group's size divides ``parameter.shape[dim]``, or ``Replicate()``.
    """
    full = parameter.detach()
    local = full
    if isinstance(placement, Shard):
        rows, rest = divmod(full.shape[placement.dim], group.size)
        assert rest == 0, f"{tuple(full.shape)} cannot be cut into {group.size} along dimension {placement.dim}"
        # A copy, not a view: a view would keep the whole parameter in memory on every rank.
        local = full.narrow(placement.dim, group.rank * rows, rows).clone(memory_format=torch.contiguous_format)
    distributed = DTensor.from_local(
        local, group.mesh, [placement], run_check=False, shape=full.shape, stride=full.stride()
    )
    return nn.Parameter(distributed, requires_grad=parameter.requires_grad)


@overload
def local_parameter(parameter: torch.Tensor) -> torch.Tensor: ...


@overload
def local_parameter(parameter: torch.Tensor | None) -> torch.Tensor | None: ...


def local_parameter(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """This rank's part of a DTensor parameter, for an operator that returns complete gradients for it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@overload
def replicated_parameter(
    parameter: torch.Tensor, group: SequenceGroup, rows: tuple[int, int] | None = None
) -> torch.Tensor: ...


@overload
def replicated_parameter(
    parameter: torch.Tensor | None, group: SequenceGroup, rows: tuple[int, int] | None = None
) -> torch.Tensor | None: ...


def replicated_parameter(
    parameter: torch.Tensor | None, group: SequenceGroup, rows: tuple[int, int] | None = None
) -> torch.Tensor | None:
    """The value of a replicated DTensor parameter that each rank uses for other tokens or other heads.

    Args:
        parameter: a DTensor with placement Replicate, or None.
        group: the ranks whose gradients are to be added.
        rows: (first row, number of rows) that this rank uses; all if None.

    Returns:
        The local tensor ``[rows, ...]``. Its gradient is padded to the full shape and added over the group, so that
        the parameter's gradient is a complete DTensor with placement Replicate.
    """
    if parameter is None:
        return None
    first, count = rows or (0, parameter.shape[0])
    return ReplicatedParameter.apply(parameter, group, first, count)  # type: ignore[no-any-return]


class ReplicatedParameter(torch.autograd.Function):
    """A replicated parameter's rows on this rank.

    Shapes: parameter [n, ...] on every rank; N ranks, each using ``count`` rows from ``first`` on.

    forward: local = parameter[first : first + count]
    parameter gradient: sum over ranks of the local gradients, each put at its rank's rows
    """

    @staticmethod
    def forward(ctx: Any, parameter: DTensor, group: SequenceGroup, first: int, count: int) -> torch.Tensor:
        """Returns the rows, sharing memory with the parameter."""
        ctx.group, ctx.first, ctx.shape, ctx.stride = group, first, parameter.shape, parameter.stride()
        return parameter.to_local().narrow(0, first, count)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[DTensor, None, None, None]:
        """Returns the complete gradient as a DTensor."""
        (grad,) = grad_outputs
        if grad.shape != ctx.shape:
            rows = grad
            grad = rows.new_zeros(ctx.shape)
            grad.narrow(0, ctx.first, rows.shape[0]).copy_(rows)
        group = ctx.group
        total = torch.ops.odysseus.replicated_parameter_backward(grad, group.group.group_name, group.config.key())
        total = DTensor.from_local(
            total, group.mesh, [Replicate()], run_check=False, shape=ctx.shape, stride=ctx.stride
        )
        return total, None, None, None


@torch.library.custom_op("odysseus::replicated_parameter_backward", mutates_args=())
def _complete(grad: torch.Tensor, group_name: str, config_key: str) -> torch.Tensor:
    """The sum over the ranks, as one operator, so that a compiled backward has it in its graph."""
    return all_reduce(
        grad.contiguous(),
        group_by_name(group_name),
        operator="replicated_parameter",
        phase="backward",
        config=OverlapConfig.from_key(config_key),
    )


@_complete.register_fake
def _(grad: torch.Tensor, group_name: str, config_key: str) -> torch.Tensor:
    return grad.new_empty(grad.shape)
