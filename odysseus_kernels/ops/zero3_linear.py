"""A linear layer whose weight is sharded over the ranks (ZeRO-3), gathered chunk by chunk as it is used.

It is all-gather → linear turned by 90 degrees: the gathered operand is the weight, the scattered one its gradient.
On the symmetric transport every product reads the owner's memory, so the whole weight never exists; the collective
transport holds the pieces in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm import functional
from odysseus_kernels.comm.arguments import check_config, check_tensors, refuse_second_derivative, under_autocast
from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.groups import dispatch, resolve_group
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.comm.transport import Call, Gather, Scatter, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops._ahead import Shards, take_ahead, tell_ahead
from odysseus_kernels.ops._products import add_wide
from odysseus_kernels.ops._validate import check_bias, check_linear, group_by_name

__all__ = ["zero3_linear"]

_NAME = "zero3_linear"


def zero3_linear(
    x: Tensor,
    weight_shard: Tensor,
    bias_shard: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    config: OverlapConfig | None = None,
    prefetch: Shards = None,
    prefetch_backward: Shards = None,
) -> Tensor:
    """``y = x @ all_gather(weight_shard).T + all_gather(bias_shard)``, differentiable.

    N ranks, each with its own rows x; K input features, n output features.

    forward:          y [..., n]        = x [..., K] @ AG(weight_shard [n/N, K]).T + AG(bias_shard [n/N])
    input gradient:   dx [..., K]       = dy @ AG(weight_shard)
    weight gradient:  dweight [n/N, K]  = RS(dy.T @ x), added in fp32: the sum over all ranks' rows
    bias gradient:    dbias [n/N]       = RS(sum of dy)

    In backward the weight's gradient leaves chunk by chunk while the next chunk is computed, and the weight, whose
    gather started first, then makes the input gradient.  ``config.gathered`` does not apply: the weight is always
    gathered again.

    Args:
        x: [..., K]; rows may differ from rank to rank.
        weight_shard: [n/N, K], this rank's rows of the weight.
        bias_shard: [n/N] or None.
        group: the ranks; None is the default group.
        config: mode, transport, pieces, time limit.
        prefetch: weight shard of the zero3_linear that every rank calls next with this group, or a tuple of all that an
            operator with an exchange shares (the weights of :func:`linear_all_to_all`); it is sent ahead while this
            product runs and must not change before that call.  If another call comes first, it is dropped.
        prefetch_backward: the same for the backward of this operator.

    Returns:
        [..., n].

    Raises:
        ValueError: bad input, before anything is sent.
        CommunicationError: ranks differ in what they call, or a peer is lost or silent.

    Example:
        >>> x, weight_shard = torch.ones(5 + rank, 16), torch.ones(4, 16, requires_grad=True)
        >>> y = ody.zero3_linear(x, weight_shard, group=group)
        >>> y.shape == (5 + rank, 8)
        True
        >>> y.sum().backward()
        >>> weight_shard.grad[0, 0].item()  # the rows of both ranks
        11.0
    """
    check_tensors(_NAME, x=x, weight_shard=weight_shard, bias_shard=bias_shard)
    key = check_config(config).key()
    ahead = tell_ahead(_NAME, weight_shard, prefetch, prefetch_backward)
    x, weight_shard, bias_shard = under_autocast(x.device, x, weight_shard, bias_shard)
    check_linear(_NAME, x, weight_shard, "weight_shard")
    check_bias(_NAME, x, weight_shard, bias_shard, "bias_shard")
    resolved = resolve_group(group)
    return torch.ops.odysseus.zero3_linear(x, weight_shard, bias_shard, resolved.group_name, key, *ahead)


@torch.library.custom_op("odysseus::zero3_linear", mutates_args=())
def _forward(
    x: Tensor,
    weight_shard: Tensor,
    bias_shard: Tensor | None,
    group_name: str,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> Tensor:
    group, config = group_by_name(group_name), OverlapConfig.from_key(config_key)
    prefetch = take_ahead(ahead, ahead_text, "forward")
    features = weight_shard.shape[0]
    lines = x.reshape(-1, x.shape[-1])
    output = x.new_empty((lines.shape[0], features * group.size()))
    bias = None
    if bias_shard is not None:
        # n numbers: gathered whole, before the weight, so that each product can add its slice.
        bias = functional.all_gather(bias_shard, group, operator=_NAME, config=config, keeps_ahead=True)

    def consume(source: int, start: int, stop: int, block: Tensor) -> None:
        columns = slice(source * features + start, source * features + stop)
        _product(output[:, columns], lines, block[0].t(), None if bias is None else bias[columns])

    def run(transport: Transport, settled: OverlapConfig) -> None:
        shard = weight_shard.contiguous().unsqueeze(0)
        call = Call(_NAME, "forward", settled, Gather(shard, consume), prefetch=prefetch)
        if settled.mode != "unfused":
            transport.execute(call)
            return
        _product(output, lines, _whole(transport, call).t(), bias)

    phase = _phase("forward", lines, weight_shard, group.size(), gathers=True)
    dispatch(group, config, x.device, run, phase)
    return output.view(*x.shape[:-1], output.shape[1])


def _phase(
    phase: str, lines: Tensor, weight_shard: Tensor, world: int, *, gathers: bool, scatters: bool = False
) -> Phase:
    nbytes = weight_shard.nbytes
    return Phase(
        operator=_NAME,
        phase=phase,
        shapes=f"weight_shard {list(weight_shard.shape)}, gathers={gathers}, scatters={scatters}",
        own="",  # not the rows: they may change on one rank alone, and ranks have to choose anew together
        dtype=weight_shard.dtype,
        flops=2 * lines.shape[0] * weight_shard.numel() * world * max(1, gathers + scatters),
        gathered_bytes=nbytes if gathers else 0,
        scattered_bytes=nbytes if scatters else 0,
    )


def _product(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _whole(transport: Transport, call: Call) -> Tensor:
    """The whole weight [n, K], by one collective."""
    assert call.gather is not None
    shard = call.gather.shard
    whole = shard.new_empty((transport.world * shard.shape[1], shard.shape[2]))
    transport.all_gather(call, whole.view(transport.world, *shard.shape))
    return whole


@_forward.register_fake
def _(
    x: Tensor,
    weight_shard: Tensor,
    bias_shard: Tensor | None,
    group_name: str,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_shard.shape[0] * group_by_name(group_name).size()))


@torch.library.custom_op("odysseus::zero3_linear_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight_shard: Tensor,
    group_name: str,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
    input_needed: bool,
    weight_needed: bool,
    bias_needed: bool,
) -> list[Tensor]:
    """[dx, dweight, dbias]; an empty tensor stands for a gradient that is not needed."""
    group, config = group_by_name(group_name), OverlapConfig.from_key(config_key)
    world = group.size()
    # Without an input gradient nothing comes before this layer in backward.
    prefetch = take_ahead(ahead, ahead_text, "backward") if input_needed else None
    features = weight_shard.shape[0]
    lines = x.reshape(-1, x.shape[-1])
    incoming = grad.reshape(-1, features * world)
    incoming = incoming if incoming.is_contiguous() else incoming.contiguous()
    wide = accumulator_dtype(x.dtype)
    dx = x.new_empty(lines.shape if input_needed else (0,), dtype=wide)
    narrow = wide != x.dtype
    dweight = weight_shard.new_empty(weight_shard.shape if weight_needed else (0,))
    dbias = weight_shard.new_empty(0)

    def produce(target: int, start: int, stop: int, block: Tensor) -> None:
        columns = slice(target * features + start, target * features + stop)
        torch.mm(incoming[:, columns].t(), lines, out=block[0])

    started = False

    def consume(source: int, start: int, stop: int, block: Tensor) -> None:
        nonlocal started
        part = incoming[:, source * features + start : source * features + stop]
        if narrow:
            add_wide(dx if started else dx.zero_(), part, block[0])
        elif started:
            torch.addmm(dx, part, block[0], out=dx)
        else:
            torch.mm(part, block[0], out=dx)
        started = True

    def run(transport: Transport, settled: OverlapConfig) -> None:
        nonlocal started
        started = False
        gather = scatter = None
        if input_needed:
            gather = Gather(weight_shard.contiguous().unsqueeze(0), consume)
        if weight_needed:
            scatter = Scatter(dweight.unsqueeze(0), produce)
        call = Call(_NAME, "backward", settled, gather, scatter, prefetch=prefetch)
        if settled.mode != "unfused":
            transport.execute(call)
            return
        if scatter is not None:
            full = torch.mm(incoming.t(), lines)
            transport.reduce_scatter(call, full.view(world, *scatter.out.shape))
        if gather is not None:
            dx.copy_(torch.mm(incoming, _whole(transport, call)))

    if input_needed or weight_needed:
        phase = _phase("backward", lines, weight_shard, world, gathers=input_needed, scatters=weight_needed)
        dispatch(group, config, x.device, run, phase)
    if bias_needed:
        total = incoming.sum(0, dtype=wide)
        dbias = functional.reduce_scatter(
            total, group, operator=_NAME, phase="backward", config=config, keeps_ahead=True
        ).to(weight_shard.dtype)
    return [dx.to(x.dtype).view(x.shape if input_needed else (0,)), dweight, dbias]


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight_shard: Tensor,
    group_name: str,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
    input_needed: bool,
    weight_needed: bool,
    bias_needed: bool,
) -> list[Tensor]:
    return [
        x.new_empty(x.shape if input_needed else (0,)),
        x.new_empty(weight_shard.shape if weight_needed else (0,)),
        x.new_empty(weight_shard.shape[:1] if bias_needed else (0,)),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_shard, _, *ctx.settings = inputs
    # What is sent ahead is not saved: hooks on saved tensors would have it copied or checked.
    ctx.save_for_backward(x, weight_shard)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[:3]
    results = torch.ops.odysseus.zero3_linear_backward(grad, *ctx.saved_tensors, *ctx.settings, *needed)
    gradients = (result if wanted else None for result, wanted in zip(results, needed, strict=True))
    return *gradients, None, None, [None] * len(ctx.settings[2]), None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, _NAME)
