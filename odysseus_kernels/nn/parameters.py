"""Parameters as DTensors: how they are made from full copies, and how a layer gets at the numbers on this rank.

Every gradient that leaves these functions is *complete*: the sum over all ranks of the global loss's gradient, in the
placement of its parameter, so that optimizers, gradient clipping and checkpoints need to know nothing about it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from odysseus_kernels.comm.arguments import refuse_second_derivative
from odysseus_kernels.comm.functional import all_reduce
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.nn.dtensor import complete_dtensor
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.ops._validate import group_by_name

__all__ = [
    "Cut",
    "distribute_parameter",
    "head_parameter",
    "local_parameter",
    "sharded_parameter",
    "token_parameter",
]

# DTensors of torch before 2.12 lose how a gradient was made; later ones keep it, and its derivative is an error of the
# operators.
_DROPS_GRAPHS = tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 12)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a parameter is cut over the ranks that share a sequence.

    Attributes:
        dim: dimension that is cut, or None for a whole copy on every rank.
        over: ``"everyone"`` cuts over ring and seq (ZeRO-3), ``"seq"`` leaves copies on the ring.
    """

    dim: int | None = None
    over: Literal["everyone", "seq"] = "seq"

    def placements(self, group: SequenceGroup) -> list[Placement]:
        """The DTensor placements on ``group.mesh``."""
        inner: Placement = Replicate() if self.dim is None else Shard(self.dim)
        outer = inner if self.over == "everyone" else Replicate()
        return [inner] if group.mesh.ndim == 1 else [outer, inner]

    def part(self, group: SequenceGroup) -> tuple[int, int]:
        """(index, number) of this rank's part along ``dim``."""
        return (group.every_rank, group.every_size) if self.over == "everyone" else (group.rank, group.size)


def distribute_parameter(parameter: nn.Parameter, group: SequenceGroup, cut: Cut) -> nn.Parameter:
    """The DTensor parameter whose full value every rank already has in ``parameter``; nothing is sent.

    Args:
        parameter: the full parameter, identical on every rank.
        group: the ranks to distribute it over.
        cut: how; the ranks it is cut over divide ``parameter.shape[cut.dim]``.
    """
    complete_dtensor()
    full = parameter.detach()
    local = full
    if cut.dim is not None:
        index, count = cut.part(group)
        rows, rest = divmod(full.shape[cut.dim], count)
        assert rest == 0, f"{tuple(full.shape)} cannot be cut into {count} along dimension {cut.dim}"
        # A copy, not a view: a view would keep the whole parameter in memory on every rank.
        local = full.narrow(cut.dim, index * rows, rows).clone(memory_format=torch.contiguous_format)
    distributed = DTensor.from_local(
        local, group.mesh, cut.placements(group), run_check=False, shape=full.shape, stride=full.stride()
    )
    return nn.Parameter(distributed, requires_grad=parameter.requires_grad)


@overload
def local_parameter(parameter: torch.Tensor) -> torch.Tensor: ...


@overload
def local_parameter(parameter: torch.Tensor | None) -> torch.Tensor | None: ...


def local_parameter(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """This rank's part of a DTensor parameter, for an operator that returns complete gradients for it."""
    if not isinstance(parameter, DTensor):
        return parameter
    local = parameter.to_local()
    if _DROPS_GRAPHS and local.requires_grad and not torch.compiler.is_compiling():
        local.register_hook(_refuse_graph)
    return local


def _refuse_graph(grad: torch.Tensor) -> None:
    """A hook on a local part: RuntimeError where its gradient is made to be differentiated, and could not be."""
    if torch.is_grad_enabled() and grad.requires_grad:
        raise RuntimeError(
            f"a parallelized parameter has no second derivative, and torch {torch.__version__} would leave it out of "
            f"gradients made with create_graph=True without a word: expected create_graph=False; penalties on "
            f"gradients need an unparallelized model"
        )


def sharded_parameter(parameter: torch.Tensor | None, group: SequenceGroup) -> torch.Tensor | None:
    """This rank's part of a parameter that is cut over seq, for an operator that completes gradients over seq.

    Ranks of the ring hold the same part and use it for other tokens; their gradients are added.
    """
    return _summed(parameter, group, group.ring, None)


def token_parameter(parameter: torch.Tensor | None, group: SequenceGroup) -> torch.Tensor | None:
    """The value of a replicated parameter that each rank uses for its own tokens; their gradients are added."""
    return _summed(parameter, group, group.token_group, None)


def head_parameter(
    parameter: torch.Tensor | None, group: SequenceGroup, rows: tuple[int, int] | None = None, *, dim: int = 0
) -> torch.Tensor | None:
    """The value of a replicated parameter that each rank uses for its own heads of its ring rank's tokens.

    Args:
        parameter: a DTensor or a plain parameter (an adapter's) that every rank holds whole, or None.
        group: the ranks whose gradients are to be added.
        rows: (first row, number of rows) that this rank uses; all if None.
        dim: of the rows; 1: they are columns.

    Returns:
        The local tensor ``[rows, ...]``. Its gradient is padded to the full shape and added over all ranks.
    """
    return _summed(parameter, group, group.everyone, rows, dim)


def _summed(
    parameter: torch.Tensor | None,
    group: SequenceGroup,
    over: dist.ProcessGroup | None,
    rows: tuple[int, int] | None,
    dim: int = 0,
) -> torch.Tensor | None:
    if parameter is None:
        return None
    if over is None or (rows is None and over.size() == 1):
        assert rows is None, "rows are used by heads, which are added over all ranks"
        return local_parameter(parameter)
    return SummedParameter.apply(parameter, over.group_name, group.config.key(), rows, dim)  # type: ignore[no-any-return]


class SummedParameter(torch.autograd.Function):
    """This rank's part of a parameter, or some rows of it, of which other ranks hold and use the same part.

    Shapes: local part [n, ...]; each rank uses ``count`` rows (of dimension ``dim``) from ``first`` on.

    forward: local = part[first : first + count]
    parameter gradient: sum over the ranks of ``over`` of their gradients, each put at its rank's rows
    """

    @staticmethod
    def forward(
        ctx: Any, parameter: torch.Tensor, group_name: str, config_key: str, rows: tuple[int, int] | None, dim: int
    ) -> torch.Tensor:
        """Returns the rows, sharing memory with the parameter."""
        local = local_parameter(parameter)
        ctx.over, ctx.rows, ctx.dim, ctx.local_shape = (group_name, config_key), rows, dim, local.shape
        ctx.mesh = None
        if isinstance(parameter, DTensor):
            ctx.mesh, ctx.placements = parameter.device_mesh, parameter.placements
            ctx.shape, ctx.stride = parameter.shape, parameter.stride()
        return local.view_as(local) if rows is None else local.narrow(dim, *rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        """Returns the complete gradient, distributed as the parameter is."""
        (grad,) = grad_outputs
        if ctx.rows is not None:
            rows, grad = grad, grad.new_zeros(ctx.local_shape)
            grad.narrow(ctx.dim, *ctx.rows).copy_(rows)
        total = torch.ops.odysseus.replicated_parameter_backward(grad, *ctx.over)
        if ctx.mesh is None:
            return total, None, None, None, None
        total = DTensor.from_local(total, ctx.mesh, ctx.placements, run_check=False, shape=ctx.shape, stride=ctx.stride)
        return total, None, None, None, None


@torch.library.custom_op("odysseus::replicated_parameter_backward", mutates_args=())
def _complete(grad: torch.Tensor, group_name: str, config_key: str) -> torch.Tensor:
    """The sum over the ranks, as one operator, so that a compiled backward has it in its graph."""
    return all_reduce(
        grad.contiguous(),
        group_by_name(group_name),
        operator="replicated_parameter",
        phase="backward",
        config=OverlapConfig.from_key(config_key),
        keeps_ahead=True,  # it comes between two operators, wherever the engine puts it
    )


@_complete.register_fake
def _(grad: torch.Tensor, group_name: str, config_key: str) -> torch.Tensor:
    return grad.new_empty(grad.shape)


refuse_second_derivative(_complete, "a replicated parameter")
