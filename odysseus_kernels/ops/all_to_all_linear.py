"""Ulysses' second half: the all-to-all from heads to tokens fused with a linear layer whose weight is ZeRO-3.

One exchange does both: as a rank is visited, its heads' outputs for this rank's tokens arrive together with its columns
of the weight, which belong to the same heads, and their product is added up.  Buffers, streams and who may run beside
the operator are the transport's contract (``comm/exchange.py``, ``comm/host/transport.py``,
``comm/collective/transport.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm import functional
from odysseus_kernels.comm.arguments import check_config, check_tensors, refuse_second_derivative, under_autocast
from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.groups import dispatch, resolve_group
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.comm.transport import Call, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops._ahead import Shards, take_ahead, tell_ahead
from odysseus_kernels.ops._heads import all_to_all, check_mode, exchange_parts, tokens_of_ranks
from odysseus_kernels.ops._products import ProductSum, multiply, multiply_lines
from odysseus_kernels.ops._validate import check_linear, group_by_name

__all__ = ["all_to_all_linear"]

_NAME = "all_to_all_linear"
Group = dist.ProcessGroup | DeviceMesh | None


def all_to_all_linear(
    x: Tensor,
    weight_shard: Tensor,
    bias_shard: Tensor | None = None,
    *,
    group: Group,
    zero3_group: Group = None,
    config: OverlapConfig | None = None,
    prefetch: Shards = None,
    prefetch_backward: Shards = None,
) -> Tensor:
    """``y = all_to_all(x) @ all_gather(weight_shard, 1).T + all_gather(bias_shard)``, differentiable.

    N ranks in ``group``, each with its heads of the whole sequence before and with its tokens after; L whole sequence,
    k input features of all heads, n output features.  The weight is cut over the ranks of ``zero3_group``, M of them.

    forward:          y [..., L/N, n]    = A2A(x [..., L, k/N]) [..., L/N, k] @ AG(weight_shard [n, k/M]).T
                                           + AG(bias_shard [n/M])
    input gradient:   dx [..., L, k/N]   = A2A(dy [..., L/N, n] @ AG(weight_shard))
    weight gradient:  dweight [n, k/M]   = RS(dy.T @ A2A(x)), added in fp32: the sum over all ranks' tokens
    bias gradient:    dbias [n/M]        = RS(sum of dy)

    The result of the all-to-all, as large as x, is kept for the weight gradient instead of x.

    Args:
        x: [..., L, k/N], this rank's heads; equal shapes on all ranks.
        weight_shard: [n, k/M], this rank's columns of the weight.
        bias_shard: [n/M] or None.
        group: the ranks that exchange heads for tokens; None is the default group.
        zero3_group: the ranks that weight and bias are cut over; None is ``group``.  With Ring attention outside of
            Ulysses these are the ranks of all rings.
        config: mode, transport, time limit.
        prefetch, prefetch_backward: what every rank gathers next with ``zero3_group`` after this operator, or after its
            backward, sent ahead meanwhile (:func:`zero3_linear`).

    Returns:
        [..., L/N, n].

    Raises:
        ValueError: bad input, before anything is sent.
        CommunicationError: ranks differ in what they call, or a peer is lost or silent.

    Example:
        >>> o = torch.ones(1, 16, 6, requires_grad=True)  # this rank's half of 12 features, for all 16 tokens
        >>> weight_shard = torch.ones(20, 6, requires_grad=True)  # and its half of a weight [20, 12]
        >>> y = ody.all_to_all_linear(o, weight_shard, group=group)
        >>> y.shape  # all features of this rank's 8 tokens
        torch.Size([1, 8, 20])
    """
    check_tensors(_NAME, x=x, weight_shard=weight_shard, bias_shard=bias_shard)
    config = check_config(config)
    check_mode(_NAME, config)
    ahead = tell_ahead(_NAME, weight_shard, prefetch, prefetch_backward)
    x, weight_shard, bias_shard = under_autocast(x.device, x, weight_shard, bias_shard)
    resolved = resolve_group(group)
    owners = resolved if zero3_group is None else resolve_group(zero3_group)
    _check(x, weight_shard, bias_shard, resolved.size(), owners.size())
    keep = torch.is_grad_enabled() and weight_shard.requires_grad
    output, _ = torch.ops.odysseus.all_to_all_linear(
        x, weight_shard, bias_shard, resolved.group_name, owners.group_name, config.key(), keep, *ahead
    )
    return output  # type: ignore[no-any-return]


def _check(x: Tensor, weight_shard: Tensor, bias_shard: Tensor | None, world: int, owners: int) -> None:
    if owners % world:
        raise ValueError(
            f"{_NAME}: expected zero3_group to have a multiple of the group's {world} ranks, got {owners} ranks"
        )
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[-2] % world:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{_NAME}: expected x [..., length, features] whose length divides by {world} ranks, got {got}; "
            f"shard_sequence pads a batch so that it does"
        )
    apart = owners // world
    if isinstance(weight_shard, Tensor) and weight_shard.ndim == 2 and x.shape[-1] != weight_shard.shape[1] * apart:
        raise ValueError(
            f"{_NAME}: expected the last dimension of x to be {apart} times weight_shard's in_features "
            f"{weight_shard.shape[1]}, got x {list(x.shape)} and weight_shard {list(weight_shard.shape)}"
        )
    check_linear(_NAME, x[..., : x.shape[-1] // apart], weight_shard, "weight_shard")
    if bias_shard is None:
        return
    expected = weight_shard.shape[0] / owners
    if not isinstance(bias_shard, Tensor) or bias_shard.ndim != 1 or bias_shard.shape[0] != expected:
        got = list(bias_shard.shape) if isinstance(bias_shard, Tensor) else type(bias_shard).__name__
        raise ValueError(f"{_NAME}: expected bias_shard of shape [{expected:g}], a rank's share, got {got}")
    if bias_shard.dtype != x.dtype or bias_shard.device != x.device:
        raise ValueError(
            f"{_NAME}: expected bias_shard of x's dtype {x.dtype} on {x.device}, got {bias_shard.dtype} on "
            f"{bias_shard.device}"
        )


def _phase(phase: str, x: Tensor, weight: Tensor, owners: int, *, gathers: bool, sums: bool) -> Phase:
    return Phase(
        operator=_NAME,
        phase=phase,
        shapes=f"x {list(x.shape)}, weight_shard {list(weight.shape)}, {gathers}, {sums}",
        own="",
        dtype=x.dtype,
        flops=2 * x.numel() * weight.shape[0] * max(1, gathers + sums),
        gathered_bytes=weight.nbytes if gathers else 0,
        scattered_bytes=weight.nbytes if sums else 0,
    )


def _columns(owner: int, owners: int, world: int, width: int) -> tuple[int, slice]:
    """(rank of the group, columns among its heads) that shard ``owner`` of the weight multiplies."""
    apart = owners // world
    first = owner % apart * width
    return owner // apart, slice(first, first + width)


@torch.library.custom_op("odysseus::all_to_all_linear", mutates_args=())
def _forward(
    x: Tensor,
    weight_shard: Tensor,
    bias_shard: Tensor | None,
    group_name: str,
    owners_name: str,
    config_key: str,
    keep: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> list[Tensor]:
    """The output, and what was received [world, batch, L/world, k/world] if it is to be kept, else an empty tensor."""
    group, owners = group_by_name(group_name), group_by_name(owners_name)
    config = OverlapConfig.from_key(config_key)
    together = group_name == owners_name
    world, shards = group.size(), owners.size()
    prefetch = take_ahead(ahead, ahead_text, "forward")
    features, width = weight_shard.shape
    whole = tokens_of_ranks(x.contiguous(), world)
    rows = whole.shape[2]
    lines = whole.shape[1] * rows
    shapes = f"x {list(x.shape)}"
    bias = None
    if bias_shard is not None:
        bias = functional.all_gather(bias_shard, owners, operator=_NAME, config=config, keeps_ahead=True)
    output = received = x.new_empty(0)
    shared = (weight_shard.contiguous(),)
    total = ProductSum(x, 0, 0)

    def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        weight, part = given
        if keep:
            received[rank].copy_(part)
        total.add(part.reshape(lines, part.shape[-1]), weight.t())

    def visit_owner(owner: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        rank, columns = _columns(owner, shards, world, width)
        total.add(received[rank].view(lines, whole.shape[-1])[:, columns], given[0].t())

    def fill(rank: int, made: Sequence[Tensor]) -> None:
        made[0].copy_(whole[rank])

    def run(transport: Transport, settled: OverlapConfig) -> None:
        nonlocal total, output, received
        fused = settled.mode != "unfused"
        total = ProductSum(x, lines, features, wide=fused)
        call = Call(_NAME, "forward", settled, shapes=shapes)
        if fused and together:
            exchange = Exchange(visit, shared, (whole.contiguous(),))
            transport.execute(dataclasses.replace(call, exchange=exchange, prefetch=prefetch))
        elif fused:
            transport.execute(dataclasses.replace(call, exchange=Exchange(visit_owner, shared), prefetch=prefetch))
        else:
            if together:
                received = received if keep else x.new_empty(whole.shape)
                exchange_parts(transport, call, (received,), fill)
            weight = functional.all_gather(weight_shard, owners, operator=_NAME, dim=1, config=config)
            total.add(_all_heads(received), weight.t())
        output = total.total(bias)

    if keep or not together:
        received = x.new_empty(whole.shape)
    if not together:
        all_to_all(_NAME, "forward", group, config, (received,), fill, shapes)
    phase = _phase("forward", x, weight_shard, shards, gathers=True, sums=False)
    dispatch(owners, config, x.device, run, phase)
    return [output.view(*x.shape[:-2], rows, features), received if keep else x.new_empty(0)]


def _all_heads(received: Tensor) -> Tensor:
    """[batch * rows, k] from ``received`` [world, batch, rows, k / world]."""
    return received.permute(1, 2, 0, 3).reshape(received.shape[1:3].numel(), received.shape[0] * received.shape[3])


@_forward.register_fake
def _(
    x: Tensor,
    weight_shard: Tensor,
    bias_shard: Tensor | None,
    group_name: str,
    owners_name: str,
    config_key: str,
    keep: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> list[Tensor]:
    world = group_by_name(group_name).size()
    rows, width = x.shape[-2] // world, x.shape[-1]
    received = (world, x.shape[:-2].numel(), rows, width)
    return [x.new_empty((*x.shape[:-2], rows, weight_shard.shape[0])), x.new_empty(received if keep else (0,))]


@torch.library.custom_op("odysseus::all_to_all_linear_backward", mutates_args=())
def _backward(
    grad: Tensor,
    received: Tensor | None,
    weight_shard: Tensor,
    group_name: str,
    owners_name: str,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
    input_needed: bool,
    weight_needed: bool,
    bias_needed: bool,
) -> list[Tensor]:
    """[dx, dweight, dbias]; an empty tensor stands for a gradient that is not needed."""
    group, owners = group_by_name(group_name), group_by_name(owners_name)
    config = OverlapConfig.from_key(config_key)
    together = group_name == owners_name
    world, shards = group.size(), owners.size()
    prefetch = take_ahead(ahead, ahead_text, "backward") if input_needed else None
    features, width = weight_shard.shape
    rows, across = grad.shape[-2], width * shards // world
    incoming = grad.reshape(-1, features)
    incoming = incoming if incoming.is_contiguous() else incoming.contiguous()
    block = incoming.view(grad.shape[:-2].numel(), rows, features)
    wide = accumulator_dtype(grad.dtype)
    dx = grad.new_empty((*grad.shape[:-2], rows * world, across) if input_needed else (0,))
    dweight = grad.new_empty(weight_shard.shape if weight_needed else (0,))
    dbias = grad.new_empty(0)
    shapes = f"grad {list(grad.shape)}"
    shared = (weight_shard.contiguous(),) if input_needed else ()
    sums = (dweight,) if weight_needed else ()
    outgoing = (tokens_of_ranks(dx, world),) if input_needed else ()
    product = grad.new_empty(0)  # gradient of this rank's tokens with all heads

    def weight_part(rank: int, columns: slice, out: Tensor) -> None:
        assert received is not None
        multiply_lines(out, incoming.t(), received[rank].view(incoming.shape[0], across)[:, columns])

    def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        if weight_needed:
            weight_part(rank, slice(None), made[0])
        if input_needed:
            multiply(made[-1], block, given[0])

    def visit_owner(owner: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        if weight_needed:
            weight_part(*_columns(owner, shards, world, width), made[0])
        if input_needed:
            multiply_lines(product[:, owner * width : (owner + 1) * width], incoming, given[0])

    def fill(rank: int, made: Sequence[Tensor]) -> None:
        made[0].copy_(product.view(*block.shape[:2], across * world)[..., rank * across : (rank + 1) * across])

    def run(transport: Transport, settled: OverlapConfig) -> None:
        nonlocal product, dweight
        fused = settled.mode != "unfused"
        call = Call(_NAME, "backward", settled, shapes=shapes)
        if fused and together:
            exchange = Exchange(visit, shared, (), sums, outgoing)
            transport.execute(dataclasses.replace(call, exchange=exchange, prefetch=prefetch))
            return
        if input_needed:
            product = grad.new_empty((incoming.shape[0], across * world))
        if fused:
            exchange = Exchange(visit_owner, shared, (), sums)
            transport.execute(dataclasses.replace(call, exchange=exchange, prefetch=prefetch))
            return
        if input_needed:
            weight = functional.all_gather(weight_shard, owners, operator=_NAME, dim=1, phase="backward", config=config)
            multiply_lines(product, incoming, weight)
        if input_needed and together:
            exchange_parts(transport, call, outgoing, fill)
        if weight_needed:
            assert received is not None
            full = grad.new_empty((features, across * world))
            multiply_lines(full, incoming.t(), _all_heads(received))
            dweight = functional.reduce_scatter(full, owners, operator=_NAME, dim=1, phase="backward", config=config)

    if input_needed or weight_needed:
        phase = _phase("backward", received if received is not None else dx, weight_shard, shards,
                       gathers=input_needed, sums=weight_needed)  # fmt: skip
        dispatch(owners, config, grad.device, run, phase)
        if input_needed and not together:
            all_to_all(_NAME, "backward", group, config, outgoing, fill, shapes)
    if bias_needed:
        total = incoming.sum(0, dtype=wide)
        summed = functional.reduce_scatter(
            total, owners, operator=_NAME, phase="backward", config=config, keeps_ahead=True
        )
        dbias = summed.to(grad.dtype)
    return [dx, dweight, dbias]


@_backward.register_fake
def _(
    grad: Tensor,
    received: Tensor | None,
    weight_shard: Tensor,
    group_name: str,
    owners_name: str,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
    input_needed: bool,
    weight_needed: bool,
    bias_needed: bool,
) -> list[Tensor]:
    world, shards = group_by_name(group_name).size(), group_by_name(owners_name).size()
    features, width = weight_shard.shape
    dx = (*grad.shape[:-2], grad.shape[-2] * world, width * shards // world)
    return [
        grad.new_empty(dx if input_needed else (0,)),
        grad.new_empty(weight_shard.shape if weight_needed else (0,)),
        grad.new_empty(features // shards if bias_needed else 0),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, weight_shard, _, ctx.group_name, ctx.owners_name, ctx.config_key, keep, *ctx.ahead = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if keep else None, weight_shard)


def _autograd_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    received, weight_shard = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    results = torch.ops.odysseus.all_to_all_linear_backward(
        grads[0], received, weight_shard, ctx.group_name, ctx.owners_name, ctx.config_key, *ctx.ahead, *needed
    )
    gradients = (result if wanted else None for result, wanted in zip(results, needed, strict=True))
    return *gradients, None, None, None, None, [None] * len(ctx.ahead[0]), None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, _NAME)
