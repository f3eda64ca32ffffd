"""A linear layer fused with the reduce-scatter that follows it.

A rank computes its part of every other rank's rows first and its own last; parts leave as they are produced and are
added, in fp32, while the next one is computed.  Buffers, streams and who may run beside the operator are the
transport's contract (``comm/host/transport.py``, ``comm/collective/transport.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm.arguments import check_config, check_tensors, refuse_second_derivative, under_autocast
from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.groups import dispatch, resolve_group
from odysseus_kernels.comm.tiles import TileGather, TileScatter
from odysseus_kernels.comm.transport import Call, Gather, Scatter, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops import _tiles
from odysseus_kernels.ops._ahead import Shards, take_ahead, tell_ahead
from odysseus_kernels.ops._products import CommonBiasGradient, Layout, WeightGradient, multiply, project
from odysseus_kernels.ops._validate import check_bias, check_dim, check_linear, group_by_name

__all__ = ["linear_reduce_scatter"]

_NAME = "linear_reduce_scatter"


def linear_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    dim: int = -2,
    config: OverlapConfig | None = None,
    prefetch: Shards = None,
) -> Tensor:
    """``y = reduce_scatter(x @ weight.T, dim) + bias``, row-parallel, differentiable.

    N ranks; L whole sequence, k this rank's input features, n output features.

    forward:          y [..., L/N, n]  = RS(x [..., L, k] @ weight [n, k].T) + bias [n], added in fp32
    input gradient:   dx [..., L, k]   = AG(dy) [..., L, n] @ weight
    weight gradient:  dweight [n, k]   = AG(dy).T @ x
    bias gradient:    dbias [n]        = sum of AG(dy) over all but the last dimension: complete on every rank, to
                                         the same bits

    One gather of dy feeds all gradients, chunk by chunk.

    Args:
        x: [..., L, ..., k]; L and the dimensions other than k are equal on all ranks.
        weight: [n, k], this rank's columns.
        bias: [n], the same on all ranks; added once, not once for each rank.
        group: the ranks; None is the default group.
        dim: dimension of x that is cut over the ranks; not the last.
        config: mode, transport, pieces, time limit; ``reduce="nvls"`` lets the NVLink switch add y, ``gather="nvls"``
            bring dy to all ranks.
        prefetch: what every rank gathers next with this group, sent ahead meanwhile (:func:`zero3_linear`).

    Returns:
        [..., L/N, ..., n], this rank's rows of the sum.

    Raises:
        ValueError: bad input, before anything is sent.
        CommunicationError: ranks differ in what they call, or a peer is lost or silent.

    Example:
        >>> x, weight = torch.ones(1, 16, 8), torch.ones(3, 8)  # all 16 tokens, this rank's 8 of 16 features
        >>> y = ody.linear_reduce_scatter(x, weight, group=group)
        >>> y.shape, y[0, 0, 0].item()
        (torch.Size([1, 8, 3]), 16.0)
    """
    check_tensors(_NAME, x=x, weight=weight, bias=bias)
    key = check_config(config).key()
    ahead = tell_ahead(_NAME, weight, prefetch)
    x, weight, bias = under_autocast(x.device, x, weight, bias)
    check_linear(_NAME, x, weight)
    check_bias(_NAME, x, weight, bias)
    dim = check_dim(_NAME, x, dim)
    resolved = resolve_group(group)
    if x.shape[dim] % resolved.size():
        raise ValueError(
            f"{_NAME}: expected dimension {dim} of x to divide by {resolved.size()} ranks, got x {list(x.shape)}; "
            f"shard_sequence pads a batch so that it does"
        )
    return torch.ops.odysseus.linear_reduce_scatter(x, weight, bias, resolved.group_name, dim, key, *ahead)


@torch.library.custom_op("odysseus::linear_reduce_scatter", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group_name: str,
    dim: int,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> Tensor:
    group, config = group_by_name(group_name), OverlapConfig.from_key(config_key)
    world = group.size()
    prefetch = take_ahead(ahead, ahead_text, "forward")
    layout = Layout.of(x.shape, dim)
    whole = layout.blocks(x.contiguous())
    rows = layout.rows // world
    output = x.new_empty(layout.shape(rows, weight.shape[0]))
    out = layout.blocks(output)

    def produce(target: int, start: int, stop: int, block: Tensor) -> None:
        part = whole[:, target * rows + start : target * rows + stop]
        project(block, part, weight, bias if target == group.rank() else None)

    def tiles(found: TileScatter) -> None:
        _tiles.scatter(found, [whole[0]], [weight], bias)

    def prepare() -> None:
        _tiles.prepare_scatter(out[0], group.rank(), world, [whole[0]], [weight], bias)

    shapes = f"x {[*x.shape[:-1], '*']} dim {dim}, bias {bias is not None}"
    switched = config.reduce == "nvls"
    can_tile = _tiles.can_serve(layout, [weight]) and not switched

    def run(transport: Transport, settled: OverlapConfig) -> None:
        scatter = Scatter(out, produce, tiles if can_tile else None, prepare)
        call = Call(_NAME, "forward", settled, None, scatter, shapes, prefetch=prefetch, switched=switched)
        if settled.mode != "unfused":
            transport.execute(call)
            return
        full = x.new_empty((world, *out.shape))
        if layout.batch == 1:
            project(full.view(1, layout.rows, out.shape[2]), whole, weight)
        else:
            for target in range(world):
                project(full[target], whole[:, target * rows : (target + 1) * rows], weight)
        transport.reduce_scatter(call, full)
        if bias is not None:
            output.add_(bias)

    phase = Phase(
        operator=_NAME,
        phase="forward",
        shapes=shapes,
        own=str(weight.shape[1]),
        dtype=x.dtype,
        flops=2 * x.numel() * weight.shape[0],
        scattered_bytes=output.nbytes,
        tiles=can_tile,
        rows=output.numel() // output.shape[-1] if output.numel() else 0,
        columns=output.shape[-1],
        switched=switched,
    )
    dispatch(group, config, x.device, run, phase)
    return output


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group_name: str,
    dim: int,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> Tensor:
    layout = Layout.of(x.shape, dim)
    return x.new_empty(layout.shape(layout.rows // group_by_name(group_name).size(), weight.shape[0]))


@torch.library.custom_op("odysseus::linear_reduce_scatter_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    group_name: str,
    dim: int,
    config_key: str,
    input_needed: bool,
    weight_needed: bool,
    bias_needed: bool,
) -> list[Tensor]:
    """[dx, dweight, dbias]; an empty tensor stands for a gradient that is not needed."""
    group, config = group_by_name(group_name), OverlapConfig.from_key(config_key)
    world = group.size()
    layout = Layout.of(x.shape, dim)
    rows = layout.rows // world
    whole = layout.blocks(x.contiguous()) if weight_needed else None
    dx = x.new_empty(x.shape if input_needed else (0,))
    dx_blocks = layout.blocks(dx) if input_needed else None
    shard = layout.blocks(grad.contiguous())
    total = WeightGradient(weight, weight_needed=False)
    bias = CommonBiasGradient(weight, group.rank(), world)

    def consume(source: int, start: int, stop: int, block: Tensor) -> None:
        part = slice(source * rows + start, source * rows + stop)
        if dx_blocks is not None:
            multiply(dx_blocks[:, part], block, weight)
        if whole is not None:
            total.add(block, whole[:, part])
        if bias_needed:
            bias.add(source, start, stop, block)

    def tiles(found: TileGather) -> None:
        if dx_blocks is not None:
            _tiles.project(found, [dx_blocks[0]], [weight.t()], [None])
        if whole is not None:
            _tiles.weight_gradient(found, total, whole[0], gathered_is_grad=True)

    def prepare() -> None:
        if dx_blocks is not None:
            _tiles.prepare_project(shard[0], group.rank(), world, [dx_blocks[0]], [weight.t()], [None])
        if whole is not None:
            _tiles.prepare_weight_gradient(shard[0], group.rank(), world, total, whole[0], gathered_is_grad=True)

    shapes = f"x {[*x.shape[:-1], '*']} dim {dim}"
    switched = config.gather == "nvls"
    # The bias's gradient is a sum over rows, for which there is no kernel that waits.
    can_tile = _tiles.can_serve(layout, [weight]) and not bias_needed and not switched

    def run(transport: Transport, settled: OverlapConfig) -> None:
        nonlocal total, bias
        total = WeightGradient(weight, weight_needed=weight_needed)
        bias = CommonBiasGradient(weight, group.rank(), world)
        gather = Gather(shard, consume, tiles=tiles if can_tile else None, prepare=prepare)
        call = Call(_NAME, "backward", settled, gather, None, shapes, switched=switched)
        if settled.mode != "unfused":
            transport.execute(call)
            return
        full = shard.new_empty((world, *shard.shape))
        transport.all_gather(call, full)
        if layout.batch == 1:
            together = full.view(1, layout.rows, shard.shape[2])
            if dx_blocks is not None:
                multiply(dx_blocks, together, weight)
            if whole is not None:
                total.add(together, whole)
            if bias_needed:
                for source in range(world):
                    bias.add(source, 0, rows, full[source])
            return
        for source in range(world):
            consume(source, 0, rows, full[source])

    phase = Phase(
        operator=_NAME,
        phase="backward",
        shapes=f"{shapes}, bias={bias_needed}",
        own=str(weight.shape[1]),
        dtype=x.dtype,
        flops=2 * x.numel() * weight.shape[0] * (input_needed + weight_needed),
        gathered_bytes=grad.nbytes,
        tiles=can_tile,
        switched=switched,
    )
    dispatch(group, config, x.device, run, phase)
    results = [total.weight(), bias.total(shard) if bias_needed else None]
    return [dx, *(x.new_empty(0) if result is None else result for result in results)]


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    group_name: str,
    dim: int,
    config_key: str,
    input_needed: bool,
    weight_needed: bool,
    bias_needed: bool,
) -> list[Tensor]:
    return [
        x.new_empty(x.shape if input_needed else (0,)),
        x.new_empty(weight.shape if weight_needed else (0,)),
        x.new_empty(weight.shape[:1] if bias_needed else (0,)),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.group_name, ctx.dim, ctx.config_key, ctx.ahead, _ = inputs
    ctx.save_for_backward(x, weight)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    results = torch.ops.odysseus.linear_reduce_scatter_backward(
        grad, x, weight, ctx.group_name, ctx.dim, ctx.config_key, *needed
    )
    gradients = (result if wanted else None for result, wanted in zip(results, needed, strict=True))
    return *gradients, None, None, None, [None] * len(ctx.ahead), None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, _NAME)
