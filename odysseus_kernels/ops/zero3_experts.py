"""Experts of a mixture whose weights are sharded over the ranks, whole experts each (ZeRO-3).

Tokens stay on their rank; experts travel: a visit to rank r uses that rank's experts on this rank's tokens that are
routed to them.  Fused, the experts of one rank are used while those of the next are on their way, and no more are ever
held; unfused, all are gathered first.  Every rank takes part in every visit, whether or not it has tokens for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm.arguments import check_config, check_tensors, refuse_second_derivative, under_autocast
from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.groups import dispatch, resolve_group
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.comm.transport import Call, Gather, Scatter, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops._ahead import Shards, take_ahead, tell_ahead
from odysseus_kernels.ops._experts import ACTIVATIONS, Routing, expert_backward, expert_forward
from odysseus_kernels.ops._validate import check_experts, group_by_name

__all__ = ["zero3_experts"]

_NAME = "zero3_experts"


def zero3_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_shard: Tensor,
    down_shard: Tensor,
    *,
    activation: str = "silu",
    group: dist.ProcessGroup | DeviceMesh | None,
    config: OverlapConfig | None = None,
    prefetch: Shards = None,
    prefetch_backward: Shards = None,
) -> Tensor:
    """A mixture of gated experts on this rank's tokens, differentiable.

    N ranks, each with its own T tokens of width d; E experts of width i, of which rank r holds those from r·E/N on;
    each token goes to k of them.  With gate and up the halves of expert e's rows of gate_up:

    hidden state:      h = act(x @ gate[e].T) · (x @ up[e].T) of a token and each of its experts e
    forward:           y [T, d] = sum over a token's experts e of weight · h @ down[e].T
    input gradient:    dx [T, d], with all experts visited again
    weight gradients:  dgate_up, ddown = RS(of each rank's tokens), added in fp32; zero for an expert without tokens
    routing gradient:  dweights [T, k]

    Kept for backward beside the arguments: the products with gate and up of every pair of token and expert, T·k·2i
    elements; hidden states are computed from them again.  ``config.gathered`` does not apply: experts are always
    gathered again.  The sum over a token's experts is in fp32 (fp64 for fp64) and rounded once.

    Args:
        x: [T, d]; T may differ from rank to rank and be 0.
        top_k_index: [T, k], integers from 0 to E - 1; the experts of one token differ.
        top_k_weights: [T, k], any floating type.
        gate_up_shard: [E/N, 2i, d], this rank's experts: rows of the gate, then of the up projection.
        down_shard: [E/N, d, i].
        activation: ``"silu"``, ``"gelu"``, ``"gelu_pytorch_tanh"`` or ``"relu"``.
        group: the ranks; None is the default group.
        config: mode (``"auto"``, ``"fused"`` or ``"unfused"``), transport, pieces, time limit.
        prefetch, prefetch_backward: what every rank gathers next with this group after this operator, or after its
            backward, sent ahead meanwhile (:func:`zero3_linear`).

    Returns:
        [T, d].

    Raises:
        ValueError: bad input, before anything is sent.
        CommunicationError: ranks differ in what they call, or a peer is lost or silent.
    """
    check_tensors(
        _NAME, x=x, top_k_index=top_k_index, top_k_weights=top_k_weights, gate_up_shard=gate_up_shard,
        down_shard=down_shard,
    )  # fmt: skip
    settings = check_config(config)
    ahead = tell_ahead(_NAME, gate_up_shard, prefetch, prefetch_backward)
    x, gate_up_shard, down_shard = under_autocast(x.device, x, gate_up_shard, down_shard)
    check_experts(_NAME, x, top_k_index, top_k_weights, gate_up_shard, down_shard)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{_NAME}: expected activation to be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    if settings.mode == "tiles":
        raise ValueError(f'{_NAME}: expected mode "auto", "fused" or "unfused", got "tiles": it has no such kernel')
    resolved = resolve_group(group)
    keep = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, top_k_weights, gate_up_shard, down_shard)
    )
    y, _ = torch.ops.odysseus.zero3_experts(
        x, top_k_index, top_k_weights, gate_up_shard, down_shard, activation, resolved.group_name, settings.key(), keep,
        *ahead,
    )  # fmt: skip
    return y


@torch.library.custom_op("odysseus::zero3_experts", mutates_args=())
def _forward(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_shard: Tensor,
    down_shard: Tensor,
    activation: str,
    group_name: str,
    config_key: str,
    keep: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> tuple[Tensor, Tensor]:
    """y, and the products with gate and up [T * k, 2i] in the order of experts if they are to be kept, else nothing."""
    group, config = group_by_name(group_name), OverlapConfig.from_key(config_key)
    world, (held, width, _) = group.size(), gate_up_shard.shape
    act, wide = ACTIVATIONS[activation], accumulator_dtype(x.dtype)
    prefetch = take_ahead(ahead, ahead_text, "forward")
    routing = Routing.of(top_k_index, top_k_weights, held * world, wide)
    y = x.new_empty(x.shape, dtype=wide)
    kept = x.new_empty((top_k_index.numel() if keep else 0, width))
    shards = (gate_up_shard.contiguous(), down_shard.contiguous())

    def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        for gate_up, down, expert in zip(*given, range(rank * held, (rank + 1) * held), strict=True):
            pairs = slice(routing.bounds[expert], routing.bounds[expert + 1])
            token = routing.token[pairs]
            if token.numel():
                pre = kept[pairs] if keep else x.new_empty((token.numel(), width))
                expert_forward(y, x, routing.weight[pairs], token, gate_up, down, act, pre)

    def run(transport: Transport, settled: OverlapConfig) -> None:
        y.zero_()
        call = Call(_NAME, "forward", settled, shapes=activation, exchange=Exchange(visit, shared=shards))
        if settled.mode != "unfused":
            transport.execute(dataclasses.replace(call, prefetch=prefetch))
        else:
            _unfused(transport, call)

    flops = 2 * top_k_index.numel() * (gate_up_shard[0].numel() + down_shard[0].numel())
    dispatch(group, config, x.device, run, _phase("forward", x.dtype, flops, shards, ()))
    return y.to(x.dtype), kept


def _phase(
    phase: str, dtype: torch.dtype, flops: int, gathered: tuple[Tensor, ...], summed: tuple[Tensor, ...]
) -> Phase:
    return Phase(
        operator=_NAME,
        phase=phase,
        shapes=f"gathers {[list(shard.shape) for shard in gathered]}, sums {[list(shard.shape) for shard in summed]}",
        own="",  # tokens may change on one rank alone, and ranks have to choose anew together
        dtype=dtype,
        flops=flops,
        gathered_bytes=sum(shard.nbytes for shard in gathered),
        scattered_bytes=sum(shard.nbytes for shard in summed),
    )


def _unfused(transport: Transport, call: Call) -> None:
    """The exchange as collectives of whole tensors before and after all visits."""
    exchange, world = call.exchange, transport.world
    assert exchange is not None

    def rows(shard: Tensor) -> Tensor:
        return shard.view(1, shard.shape[0], -1)

    def unused(*_: object) -> None:
        raise AssertionError("the transport's own copy replaces this callback")

    def whole(shard: Tensor) -> Tensor:
        return shard.new_empty((world, *shard.shape))

    shared, sums = [whole(shard) for shard in exchange.shared], [whole(shard) for shard in exchange.sums]
    for shard, full in zip(exchange.shared, shared, strict=True):
        part = dataclasses.replace(call, exchange=None, gather=Gather(rows(shard), unused))
        transport.all_gather(part, full.view(world, 1, shard.shape[0], -1))
    for rank in range(world):
        exchange.visit(rank, tuple(full[rank] for full in shared), tuple(full[rank] for full in sums))
    for shard, full in zip(exchange.sums, sums, strict=True):
        part = dataclasses.replace(call, exchange=None, scatter=Scatter(rows(shard), unused))
        transport.reduce_scatter(part, full.view(world, 1, shard.shape[0], -1))


@_forward.register_fake
def _(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_shard: Tensor,
    down_shard: Tensor,
    activation: str,
    group_name: str,
    config_key: str,
    keep: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((top_k_index.numel() if keep else 0, gate_up_shard.shape[1]))


@torch.library.custom_op("odysseus::zero3_experts_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    kept: Tensor,
    gate_up_shard: Tensor,
    down_shard: Tensor,
    activation: str,
    group_name: str,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
    needed: list[bool],
) -> list[Tensor]:
    """[dx, dtop_k_weights, dgate_up, ddown]; an empty tensor stands for a gradient that is not needed."""
    input_needed, routing_needed, gate_up_needed, down_needed = needed
    prefetch = take_ahead(ahead, ahead_text, "backward") if input_needed else None
    group, config = group_by_name(group_name), OverlapConfig.from_key(config_key)
    world, (held, _, _) = group.size(), gate_up_shard.shape
    act, wide = ACTIVATIONS[activation], accumulator_dtype(x.dtype)
    routing = Routing.of(top_k_index, top_k_weights, held * world, wide)
    dx = x.new_empty(x.shape, dtype=wide) if input_needed else None
    dweight = x.new_empty(top_k_index.numel(), dtype=wide) if routing_needed else None
    dgate_up = gate_up_shard.new_empty(gate_up_shard.shape if gate_up_needed else (0,))
    ddown = down_shard.new_empty(down_shard.shape if down_needed else (0,))
    # What no product needs is not sent.
    gathers_gate_up, gathers_down = input_needed, input_needed or routing_needed or gate_up_needed
    shared = tuple(
        shard.contiguous() for shard, wanted in ((gate_up_shard, gathers_gate_up), (down_shard, gathers_down)) if wanted
    )
    sums = tuple(total for total, wanted in ((dgate_up, gate_up_needed), (ddown, down_needed)) if wanted)

    def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        gate_up, down = given[0] if gathers_gate_up else None, given[-1] if gathers_down else None
        made_gate_up, made_down = made[0] if gate_up_needed else None, made[-1] if down_needed else None
        for index in range(held):
            expert = rank * held + index
            pairs = slice(routing.bounds[expert], routing.bounds[expert + 1])
            expert_backward(
                grad,
                x,
                routing.weight[pairs],
                routing.token[pairs],
                kept[pairs],
                act,
                gate_up=None if gate_up is None else gate_up[index],
                down=None if down is None else down[index],
                dx=dx,
                dweight=None if dweight is None else dweight[pairs],
                dgate_up=None if made_gate_up is None else made_gate_up[index],
                ddown=None if made_down is None else made_down[index],
            )

    def run(transport: Transport, settled: OverlapConfig) -> None:
        if dx is not None:
            dx.zero_()
        call = Call(_NAME, "backward", settled, exchange=Exchange(visit, shared=shared, sums=sums))
        if settled.mode != "unfused":
            transport.execute(dataclasses.replace(call, prefetch=prefetch))
        else:
            _unfused(transport, call)

    flops = 2 * top_k_index.numel() * sum(shard[0].numel() for shard in (*shared, *sums))
    dispatch(group, config, x.device, run, _phase("backward", x.dtype, flops, shared, sums))
    drouting = top_k_weights.new_empty(0)
    if dweight is not None:
        drouting = torch.empty_like(dweight).index_copy_(0, routing.pair, dweight)
        drouting = drouting.to(top_k_weights.dtype).view(top_k_weights.shape)
    return [x.new_empty(0) if dx is None else dx.to(x.dtype), drouting, dgate_up, ddown]


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    kept: Tensor,
    gate_up_shard: Tensor,
    down_shard: Tensor,
    activation: str,
    group_name: str,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
    needed: list[bool],
) -> list[Tensor]:
    arguments = (x, top_k_weights, gate_up_shard, down_shard)
    return [one.new_empty(one.shape if wanted else (0,)) for one, wanted in zip(arguments, needed, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, top_k_index, top_k_weights, gate_up_shard, down_shard, *settings, _, ahead, text = inputs
    ctx.settings = (*settings, ahead, text)
    ctx.set_materialize_grads(False)  # the gradient of what is kept does not exist
    ctx.save_for_backward(x, top_k_index, top_k_weights, output[1], gate_up_shard, down_shard)


def _autograd_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, *others = ctx.saved_tensors
    grad = torch.zeros_like(x) if grad is None else grad
    of_x, _, of_routing, of_gate_up, of_down = ctx.needs_input_grad[:5]
    needed = [of_x, of_routing, of_gate_up, of_down]
    results = torch.ops.odysseus.zero3_experts_backward(grad, x, *others, *ctx.settings, needed)
    dx, drouting, dgate_up, ddown = (one if wanted else None for one, wanted in zip(results, needed, strict=True))
    return dx, None, drouting, dgate_up, ddown, None, None, None, None, [None] * len(ctx.settings[-2]), None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, _NAME)
