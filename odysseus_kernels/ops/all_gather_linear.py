"""All-gather fused with the linear layers that follow it.

The products of a rank's chunk start with the local shard and go round the ring; on the symmetric transport they read
peers' shards where they lie, so the gathered tensor never exists.  Buffers, streams and who may run beside the
operator are the transport's contract (``comm/host/transport.py``, ``comm/collective/transport.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm.arguments import check_config, refuse_second_derivative
from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.groups import dispatch, resolve_group
from odysseus_kernels.comm.tiles import TileGather, TileScatter
from odysseus_kernels.comm.transport import Call, Gather, Scatter, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops import _several, _tiles
from odysseus_kernels.ops._ahead import Shards, choose_ahead, recomputed_flag, tell_ahead
from odysseus_kernels.ops._products import Layout, WeightGradient, multiply, project
from odysseus_kernels.ops._validate import check_dim, check_several, group_by_name

__all__ = ["all_gather_linear"]

_NAME = "all_gather_linear"


@overload
def all_gather_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    dim: int = -2,
    config: OverlapConfig | None = None,
    prefetch_backward: Shards = None,
    prefetch_recomputed: Shards = None,
) -> Tensor: ...


@overload
def all_gather_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    dim: int = -2,
    config: OverlapConfig | None = None,
    prefetch_backward: Shards = None,
    prefetch_recomputed: Shards = None,
) -> tuple[Tensor, ...]: ...


def all_gather_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    dim: int = -2,
    config: OverlapConfig | None = None,
    prefetch_backward: Shards = None,
    prefetch_recomputed: Shards = None,
) -> Tensor | tuple[Tensor, ...]:
    """``y = all_gather(x, dim) @ weight.T + bias``, column-parallel, differentiable.

    N ranks; L whole sequence, K input features, n this rank's output features.

    forward:          y [..., L, n]    = AG(x) [..., L, K] @ weight [n, K].T + bias [n]
    input gradient:   dx [..., L/N, K] = RS(dy [..., L, n] @ weight), added in fp32
    weight gradient:  dweight [n, K]   = dy.T @ AG(x); x is gathered again, or was kept (``config.gathered``)
    bias gradient:    dbias [n]        = sum of dy over all but the last dimension

    In backward the second gather starts first, then the input gradient leaves chunk by chunk, then the weight gradient
    is summed over the chunks that have arrived meanwhile.

    Args:
        x: [..., L/N, ..., K], this rank's shard; equal shapes on all ranks.
        weight: [n, K], or a tuple of them: one gather then feeds several projections.
        bias: [n] or None; with several weights a tuple of these.
        group: the ranks; None is the default group.
        dim: dimension of x along which the shards are concatenated; not the last.
        config: mode, transport, pieces, what is kept for backward, time limit; ``gather="nvls"`` stores x to all ranks
            through the NVLink switch (in backward x is fetched, as otherwise).
        prefetch_backward: what every rank gathers next with this group after this operator's backward, sent ahead
            meanwhile (:func:`zero3_linear`).
        prefetch_recomputed: the same where a checkpoint has computed this operator's forward again.

    Returns:
        [..., L, ..., n], or a tuple of them.

    Raises:
        ValueError: bad input, before anything is sent.
        CommunicationError: ranks differ in what they call, or a peer is lost or silent.

    Example:
        >>> x, wq, wk = torch.ones(1, 8, 16), torch.ones(6, 16), torch.ones(2, 16)
        >>> q, k = ody.all_gather_linear(x, (wq, wk), group=group)
        >>> q.shape, k.shape
        (torch.Size([1, 16, 6]), torch.Size([1, 16, 2]))
    """
    single = isinstance(weight, Tensor)
    config = check_config(config)
    x, weights, biases = check_several(_NAME, x, weight, bias)
    dim = check_dim(_NAME, x, dim)
    resolved = resolve_group(group)
    keep = (
        config.gathered == "save"
        and resolved.size() > 1
        and torch.is_grad_enabled()
        and any(one.requires_grad for one in weights)
    )
    ahead = tell_ahead(_NAME, weights[0], None, prefetch_backward, prefetch_recomputed)
    present, has_bias = _several.present_biases(biases)
    outputs = torch.ops.odysseus.all_gather_linear(
        x, weights, present, has_bias, resolved.group_name, dim, config.key(), keep, *ahead
    )
    return outputs[0] if single else tuple(outputs[:-2])


@torch.library.custom_op("odysseus::all_gather_linear", mutates_args=())
def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    has_bias: Sequence[bool],
    group_name: str,
    dim: int,
    config_key: str,
    keep: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> list[Tensor]:
    """One output for each weight, then the gathered x if it is to be kept, else an empty tensor, and last a flag.

    ``biases`` holds one for each weight that ``has_bias``: lists of optional tensors have no gradients.
    """
    group, config = group_by_name(group_name), OverlapConfig.from_key(config_key)
    bias_of = _several.biases_of_weights(biases, has_bias)
    world = group.size()
    layout = Layout.of(x.shape, dim)
    shard = layout.blocks(x.contiguous())
    length = layout.rows * world
    outputs = [x.new_empty(layout.shape(length, weight.shape[0])) for weight in weights]
    blocks = [layout.blocks(output) for output in outputs]
    gathered = x.new_empty(layout.shape(length, x.shape[-1]) if keep else (0,))
    kept = layout.blocks(gathered) if keep else None

    def consume(source: int, start: int, stop: int, block: Tensor) -> None:
        rows = slice(source * layout.rows + start, source * layout.rows + stop)
        for out, weight, bias in zip(blocks, weights, bias_of, strict=True):
            project(out[:, rows], block, weight, bias)
        if kept is not None:
            kept[:, rows].copy_(block)

    def tiles(found: TileGather) -> None:
        _tiles.project(found, [out[0] for out in blocks], weights, bias_of)
        if kept is not None:
            _tiles.keep(found, kept[0])

    def prepare() -> None:
        _tiles.prepare_project(shard[0], group.rank(), world, [out[0] for out in blocks], weights, bias_of)

    switched = config.gather == "nvls"
    can_tile = _tiles.can_serve(layout, weights) and not switched
    shapes = f"x {list(x.shape)} dim {dim}, gathered={config.gathered!r}"

    def run(transport: Transport, settled: OverlapConfig) -> None:
        gather = Gather(shard, consume, tiles=tiles if can_tile else None, prepare=prepare)
        call = Call(_NAME, "forward", settled, gather, shapes=shapes, switched=switched)
        if settled.mode != "unfused":
            transport.execute(call)
            return
        full = _gathered(transport, call, kept)
        for out, weight, bias in zip(blocks, weights, bias_of, strict=True):
            project(out, full, weight, bias)

    features = sum(weight.shape[0] for weight in weights)
    phase = Phase(
        operator=_NAME,
        phase="forward",
        shapes=shapes,
        own=f"{[weight.shape[0] for weight in weights]}, keep={keep}",
        dtype=x.dtype,
        flops=2 * x.numel() * world * features,
        gathered_bytes=x.nbytes,
        tiles=can_tile,
        rows=x.numel() // x.shape[-1] if x.numel() else 0,
        columns=features,
        switched=switched,
    )
    dispatch(group, config, x.device, run, phase)
    return [*outputs, gathered, recomputed_flag()]


def _gathered(transport: Transport, call: Call, into: Tensor | None = None) -> Tensor:
    """The whole x as [batch, L, inner * K], by one collective."""
    assert call.gather is not None
    shard = call.gather.shard
    batch, rows, width = shard.shape
    if batch == 1:
        full = into if into is not None else shard.new_empty((1, transport.world * rows, width))
        transport.all_gather(call, full.view(transport.world, 1, rows, width))
        return full
    by_rank = shard.new_empty((transport.world, batch, rows, width))
    transport.all_gather(call, by_rank)
    in_order = by_rank.transpose(0, 1).reshape(batch, transport.world * rows, width)
    return in_order if into is None else into.copy_(in_order)


@_forward.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    has_bias: Sequence[bool],
    group_name: str,
    dim: int,
    config_key: str,
    keep: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> list[Tensor]:
    layout = Layout.of(x.shape, dim)
    length = layout.rows * group_by_name(group_name).size()
    outputs = [x.new_empty(layout.shape(length, weight.shape[0])) for weight in weights]
    gathered = x.new_empty(layout.shape(length, x.shape[-1]) if keep else (0,))
    return [*outputs, gathered, torch.empty((), dtype=torch.bool)]


@torch.library.custom_op("odysseus::all_gather_linear_backward", mutates_args=())
def _backward(
    grads: Sequence[Tensor],
    x: Tensor,
    gathered: Tensor | None,
    weights: Sequence[Tensor],
    group_name: str,
    dim: int,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
    recomputed: Tensor,
    input_needed: bool,
    weights_needed: Sequence[bool],
    biases_needed: Sequence[bool],
) -> list[Tensor]:
    """[dx, dweights..., dbiases...]; an empty tensor stands for a gradient that is not needed."""
    group, config = group_by_name(group_name), OverlapConfig.from_key(config_key)
    layout = Layout.of(x.shape, dim)
    prefetch = choose_ahead(ahead, ahead_text, recomputed) if input_needed else None
    world, rows = group.size(), layout.rows
    incoming = [layout.blocks(grad.contiguous()) for grad in grads]
    sums: list[WeightGradient] = []
    dx = x.new_empty(x.shape if input_needed else (0,))
    whole = None if gathered is None else layout.blocks(gathered)
    regather = any(weights_needed) and gathered is None

    def begin() -> None:
        sums[:] = [
            WeightGradient(weight, weight_needed=needed, bias_needed=bias_needed)
            for weight, needed, bias_needed in zip(weights, weights_needed, biases_needed, strict=True)
        ]

    def produce(target: int, start: int, stop: int, block: Tensor) -> None:
        part = slice(target * rows + start, target * rows + stop)
        for index, (grad, weight) in enumerate(zip(incoming, weights, strict=True)):
            multiply(block, grad[:, part], weight, add=index > 0)

    def consume(source: int, start: int, stop: int, block: Tensor) -> None:
        part = slice(source * rows + start, source * rows + stop)
        for grad, total in zip(incoming, sums, strict=True):
            total.add(grad[:, part], block)

    def scatter_tiles(found: TileScatter) -> None:
        _tiles.scatter(found, [grad[0] for grad in incoming], [weight.t() for weight in weights], None)

    def gather_tiles(found: TileGather) -> None:
        for grad, total in zip(incoming, sums, strict=True):
            _tiles.weight_gradient(found, total, grad[0])
            total.add(grad, None)  # of the bias, if it is needed

    def prepare_scatter() -> None:
        xs, turned = [grad[0] for grad in incoming], [weight.t() for weight in weights]
        _tiles.prepare_scatter(layout.blocks(dx)[0], group.rank(), world, xs, turned, None)

    def prepare_gather() -> None:
        chunk = layout.blocks(x.contiguous())[0]
        for grad, total in zip(incoming, sums, strict=True):
            _tiles.prepare_weight_gradient(chunk, group.rank(), world, total, grad[0])

    shapes = f"x {list(x.shape)} dim {dim}, gathered={config.gathered!r}"
    can_tile = _tiles.can_serve(layout, weights)

    def run(transport: Transport, settled: OverlapConfig) -> None:
        begin()
        gather = scatter = None
        if regather:
            shard = layout.blocks(x.contiguous())
            gather = Gather(shard, consume, tiles=gather_tiles if can_tile else None, prepare=prepare_gather)
        if input_needed:
            scatter = Scatter(layout.blocks(dx), produce, scatter_tiles if can_tile else None, prepare_scatter)
        call = Call(_NAME, "backward", settled, gather, scatter, shapes, prefetch=prefetch)
        if gather is None and scatter is None:
            pass
        elif settled.mode == "fused":
            transport.execute(call)
        elif settled.mode == "tiles":
            for part in (dataclasses.replace(call, gather=None), dataclasses.replace(call, scatter=None)):
                if part.gather is not None or part.scatter is not None:
                    transport.execute(part)
        else:
            _unfused_backward(transport, call, produce, lambda full: _add_whole(sums, incoming, full))
        if not regather:
            _add_whole(sums, incoming, whole)

    if regather or input_needed:
        phase = Phase(
            operator=_NAME,
            phase="backward",
            shapes=f"{shapes}, gathers={regather}, scatters={input_needed}",
            own=str([weight.shape[0] for weight in weights]),
            dtype=x.dtype,
            flops=2 * x.numel() * world * sum(w.shape[0] for w in weights) * (input_needed + any(weights_needed)),
            gathered_bytes=x.nbytes if regather else 0,
            scattered_bytes=dx.nbytes,
            tiles=can_tile,
        )
        dispatch(group, config, x.device, run, phase)
    else:
        begin()
        _add_whole(sums, incoming, whole)
    results = [*(total.weight() for total in sums), *(total.bias() for total in sums)]
    return [dx, *(x.new_empty(0) if grad is None else grad for grad in results)]


def _add_whole(sums: Sequence[WeightGradient], incoming: Sequence[Tensor], whole: Tensor | None) -> None:
    for grad, total in zip(incoming, sums, strict=True):
        total.add(grad, whole)


def _unfused_backward(
    transport: Transport, call: Call, produce: Callable[..., None], consume: Callable[[Tensor], None]
) -> None:
    if call.scatter is not None:
        out = call.scatter.out
        full = out.new_empty((transport.world, *out.shape))
        for target in range(transport.world):
            produce(target, 0, out.shape[1], full[target])
        transport.reduce_scatter(call, full)
    if call.gather is not None:
        consume(_gathered(transport, call))


@_backward.register_fake
def _(
    grads: Sequence[Tensor],
    x: Tensor,
    gathered: Tensor | None,
    weights: Sequence[Tensor],
    group_name: str,
    dim: int,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
    recomputed: Tensor,
    input_needed: bool,
    weights_needed: Sequence[bool],
    biases_needed: Sequence[bool],
) -> list[Tensor]:
    return [
        x.new_empty(x.shape if input_needed else (0,)),
        *_several.empty_gradients(weights, weights_needed, biases_needed),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, has_bias, ctx.group_name, ctx.dim, ctx.config_key, keep, *ctx.ahead = inputs
    ctx.set_materialize_grads(False)
    # What was gathered holds x.
    ctx.save_for_backward(output[-1], None if keep else x, output[-2] if keep else None, *weights)
    ctx.shapes = [one.shape for one in output[:-2]]
    _several.note_needed(ctx, weights, biases, has_bias)


def _autograd_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    recomputed, x, gathered, *weights = ctx.saved_tensors
    if x is None:
        group = group_by_name(ctx.group_name)
        rows = gathered.shape[ctx.dim] // group.size()
        x = gathered.narrow(ctx.dim, group.rank() * rows, rows)
    incoming = [x.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, ctx.shapes, strict=False)]
    dx, *rest = torch.ops.odysseus.all_gather_linear_backward(
        incoming,
        x,
        gathered,
        weights,
        ctx.group_name,
        ctx.dim,
        ctx.config_key,
        *ctx.ahead,
        recomputed,
        ctx.needs_input_grad[0],
        ctx.weights_needed,
        ctx.biases_needed,
    )
    dweights, dbiases = _several.wanted_gradients(ctx, rest)
    nothing = (None, None, None, None, None, [None] * len(ctx.ahead[0]), None)
    return dx if ctx.needs_input_grad[0] else None, dweights, dbiases, *nothing


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, _NAME)
