"""Ulysses' first half: linear layers with ZeRO-3 weights fused with the all-to-all that follows them.

One exchange does both: as a rank is visited, its rows of the weights arrive, which are the rows of its heads; their
product with this rank's tokens is what that rank needs, and leaves while the next one is computed.  On transports that
let ranks read one another's memory no weight is ever whole, and what is sent is not staged either.  Buffers, streams
and who may run beside the operator are the transport's contract (``comm/exchange.py``, ``comm/host/transport.py``,
``comm/collective/transport.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm import functional
from odysseus_kernels.comm.arguments import check_config, refuse_second_derivative
from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.groups import dispatch, resolve_group
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.comm.transport import Call, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops import _several
from odysseus_kernels.ops._ahead import Shards, choose_ahead, recomputed_flag, take_ahead, tell_ahead
from odysseus_kernels.ops._heads import all_to_all, check_mode, exchange_parts, tokens_of_ranks
from odysseus_kernels.ops._products import ProductSum, multiply_lines, project
from odysseus_kernels.ops._projections import Projections, check_projections
from odysseus_kernels.ops._validate import check_several

__all__ = ["linear_all_to_all"]

_NAME = "linear_all_to_all"
Group = dist.ProcessGroup | DeviceMesh | None


@overload
def linear_all_to_all(
    x: Tensor,
    weight_shard: Tensor,
    bias_shard: Tensor | None = None,
    *,
    group: Group,
    heads: int | None = None,
    zero3_group: Group = None,
    config: OverlapConfig | None = None,
    prefetch: Shards = None,
    prefetch_backward: Shards = None,
    prefetch_recomputed: Shards = None,
) -> Tensor: ...


@overload
def linear_all_to_all(
    x: Tensor,
    weight_shard: Sequence[Tensor],
    bias_shard: Sequence[Tensor | None] | None = None,
    *,
    group: Group,
    heads: Sequence[int] | None = None,
    zero3_group: Group = None,
    config: OverlapConfig | None = None,
    prefetch: Shards = None,
    prefetch_backward: Shards = None,
    prefetch_recomputed: Shards = None,
) -> tuple[Tensor, ...]: ...


def linear_all_to_all(
    x: Tensor,
    weight_shard: Tensor | Sequence[Tensor],
    bias_shard: Tensor | Sequence[Tensor | None] | None = None,
    *,
    group: Group,
    heads: int | Sequence[int] | None = None,
    zero3_group: Group = None,
    config: OverlapConfig | None = None,
    prefetch: Shards = None,
    prefetch_backward: Shards = None,
    prefetch_recomputed: Shards = None,
) -> Tensor | tuple[Tensor, ...]:
    """``y = all_to_all(x @ all_gather(weight_shard).T + all_gather(bias_shard))``, differentiable.

    N ranks in ``group``, each with its tokens of the sequence before and with its heads after; L whole sequence, K
    input features, n output features of all heads.  The weights are cut over the ranks of ``zero3_group``, M of them.

    forward:          y [..., L, n/N]    = A2A(x [..., L/N, K] @ AG(weight_shard [n/M, K]).T + AG(bias_shard [n/M]))
    input gradient:   dx [..., L/N, K]   = A2A(dy) [..., L/N, n] @ AG(weight_shard)
    weight gradient:  dweight [n/M, K]   = RS(A2A(dy).T @ x), added in fp32: the sum over all ranks' tokens
    bias gradient:    dbias [n/M]        = RS(sum of A2A(dy))

    A projection with fewer heads than ranks (key and value heads) is multiplied once, by its whole gathered weight, and
    each head is sent to the N / heads ranks that share it, next to one another: y is then [..., L, n/heads], and the
    gradients of those ranks add up.

    Args:
        x: [..., L/N, K], this rank's tokens; equal shapes on all ranks.
        weight_shard: [n/M, K], this rank's rows of the weight; or several of them: one exchange then makes several
            projections.
        bias_shard: [n/M] or None; with several weights a tuple of these.
        group: the ranks that exchange tokens for heads; None is the default group.
        heads: heads of each projection, query heads first; None: all have a multiple of N.
        zero3_group: the ranks that the weights are cut over; None is ``group``.  With Ring attention outside of
            Ulysses these are the ranks of all rings.
        config: mode, transport, time limit.
        prefetch, prefetch_backward: what every rank gathers next with ``zero3_group`` after this operator, or after its
            backward, sent ahead meanwhile (:func:`zero3_linear`).
        prefetch_recomputed: the latter where a checkpoint has computed this operator's forward again.

    Returns:
        [..., L, n/N], or a tuple of them.

    Raises:
        ValueError: bad input, before anything is sent.
        CommunicationError: ranks differ in what they call, or a peer is lost or silent.

    Example:
        >>> x = torch.ones(1, 8, 16)  # this rank's 8 of 16 tokens
        >>> wq, wkv = torch.ones(4 * 5 // 2, 16), torch.ones(2 * 5 // 2, 16)  # 4 and 2 heads of 5; its rows
        >>> q, k, v = ody.linear_all_to_all(x, (wq, wkv, wkv), heads=(4, 2, 2), group=group)
        >>> q.shape, k.shape  # all tokens of this rank's heads
        (torch.Size([1, 16, 10]), torch.Size([1, 16, 5]))
    """
    single = isinstance(weight_shard, Tensor)
    config = check_config(config)
    x, weights, biases = check_several(_NAME, x, weight_shard, bias_shard, "weight_shard", "bias_shard")
    if x.ndim < 2:
        raise ValueError(f"{_NAME}: expected x [..., tokens, features], got shape {list(x.shape)}")
    check_mode(_NAME, config)
    resolved = resolve_group(group)
    owners = resolved if zero3_group is None else resolve_group(zero3_group)
    sharers = check_projections(_NAME, weights, heads, resolved.size(), owners.size())
    ahead = tell_ahead(_NAME, weights[0], prefetch, prefetch_backward, prefetch_recomputed)
    present, has_bias = _several.present_biases(biases)
    outputs = torch.ops.odysseus.linear_all_to_all(
        x, weights, present, has_bias, sharers, resolved.group_name, owners.group_name, config.key(), *ahead
    )
    return outputs[0] if single else tuple(outputs[:-1])


@torch.library.custom_op("odysseus::linear_all_to_all", mutates_args=())
def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    has_bias: Sequence[bool],
    sharers: Sequence[int],
    group_name: str,
    owners_name: str,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> list[Tensor]:
    """One output for each weight, and last a flag.

    ``biases`` holds one for each weight that ``has_bias``: lists of optional tensors have no gradients.
    """
    config = OverlapConfig.from_key(config_key)
    sizes = Projections(_NAME, x, weights, sharers, group_name, owners_name)
    prefetch = take_ahead(ahead, ahead_text, "forward")
    bias_of = _several.biases_of_weights(biases, has_bias)
    lines = x.reshape(sizes.lines, sizes.features)
    block = lines.view(sizes.batch, sizes.rows, sizes.features)
    outputs = [x.new_empty((*x.shape[:-2], sizes.rows * sizes.world, cut.width)) for cut in sizes.cuts]
    received = tuple(tokens_of_ranks(output, sizes.world) for output in outputs)
    shared = tuple(weights[i].contiguous() for i in sizes.split)
    shared += tuple(bias.contiguous() for i in sizes.split if (bias := bias_of[i]) is not None)
    shapes = f"{sizes.shapes}, biases {list(has_bias)}"  # which ones there are, their shapes alone do not say
    # Products with all ranks' heads, for projections that are not multiplied as their weight arrives.
    products: dict[int, Tensor] = {}

    def shards_of(given: tuple[Tensor, ...]) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(projection, weight shard, bias shard) of the rank that is visited."""
        its_biases = iter(given[len(sizes.split) :])
        for i, weight in zip(sizes.split, given, strict=False):
            yield i, weight, next(its_biases) if has_bias[i] else None

    def fill(rank: int, made: Sequence[Tensor]) -> None:
        for i, product in products.items():
            made[i].copy_(
                product.view(sizes.batch, sizes.rows, sizes.cuts[i].features)[..., sizes.cuts[i].columns(rank)]
            )

    def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        fill(rank, made)
        for i, weight, bias in shards_of(given):
            project(made[i], block, weight, bias)

    def visit_owner(owner: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        for i, weight, bias in shards_of(given):
            columns = slice(owner * weight.shape[0], (owner + 1) * weight.shape[0])
            multiply_lines(products[i][:, columns], lines, weight.t(), bias)

    def multiply_whole(which: Sequence[int]) -> None:
        for i in which:
            weight = functional.all_gather(weights[i], sizes.owners, operator=_NAME, config=config, keeps_ahead=True)
            bias = bias_of[i]
            if bias is not None:
                bias = functional.all_gather(bias, sizes.owners, operator=_NAME, config=config, keeps_ahead=True)
            products[i] = x.new_empty((sizes.lines, sizes.cuts[i].features))
            multiply_lines(products[i], lines, weight.t(), bias)

    def run(transport: Transport, settled: OverlapConfig) -> None:
        fused = settled.mode != "unfused"
        products.clear()
        multiply_whole(sizes.whole if fused else range(len(weights)))
        call = Call(_NAME, "forward", settled, shapes=shapes)
        exchanged = dataclasses.replace(call, prefetch=prefetch)
        if fused and sizes.together:
            transport.execute(dataclasses.replace(exchanged, exchange=Exchange(visit, shared, received=received)))
            return
        if fused and sizes.split:
            products.update({i: x.new_empty((sizes.lines, sizes.cuts[i].features)) for i in sizes.split})
            transport.execute(dataclasses.replace(exchanged, exchange=Exchange(visit_owner, shared)))
        if sizes.together:
            exchange_parts(transport, call, received, fill)

    phase = sizes.phase("forward", x.dtype, weights, gathers=True, sums=False)
    dispatch(sizes.owners, config, x.device, run, phase)
    if not sizes.together:
        all_to_all(_NAME, "forward", sizes.group, config, received, fill, shapes)
    return [*outputs, recomputed_flag()]


@_forward.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    has_bias: Sequence[bool],
    sharers: Sequence[int],
    group_name: str,
    owners_name: str,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> list[Tensor]:
    sizes = Projections(_NAME, x, weights, sharers, group_name, owners_name)
    outputs = [x.new_empty((*x.shape[:-2], sizes.rows * sizes.world, cut.width)) for cut in sizes.cuts]
    return [*outputs, torch.empty((), dtype=torch.bool)]


@torch.library.custom_op("odysseus::linear_all_to_all_backward", mutates_args=())
def _backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    sharers: Sequence[int],
    group_name: str,
    owners_name: str,
    config_key: str,
    ahead: Sequence[Tensor],
    ahead_text: str,
    recomputed: Tensor,
    input_needed: bool,
    weights_needed: Sequence[bool],
    biases_needed: Sequence[bool],
) -> list[Tensor]:
    """[dx, dweights..., dbiases...]; an empty tensor stands for a gradient that is not needed."""
    config = OverlapConfig.from_key(config_key)
    sizes = Projections(_NAME, x, weights, sharers, group_name, owners_name)
    prefetch = choose_ahead(ahead, ahead_text, recomputed) if input_needed else None
    wide = accumulator_dtype(x.dtype)
    lines = x.reshape(sizes.lines, sizes.features)
    dx = x.new_empty(0)
    dweights = [w.new_empty(w.shape if needed else (0,)) for w, needed in zip(weights, weights_needed, strict=True)]
    # The sum over tokens and ranks stays in the accumulator's type until the end.
    dbiases = [
        w.new_empty(w.shape[:1] if needed else (0,), dtype=wide)
        for w, needed in zip(weights, biases_needed, strict=True)
    ]
    # Gradients that something depends on, each rank's part of them, and the whole for this rank's tokens.
    used = [i for i in range(len(weights)) if input_needed or weights_needed[i] or biases_needed[i]]
    incoming = [tokens_of_ranks(grads[i].contiguous(), sizes.world) for i in used]
    parts = [x.new_empty(0) for _ in used]
    whole_grads: dict[int, Tensor] = {}
    split = [i for i in used if i in sizes.split]
    shared = tuple(weights[i].contiguous() for i in split) if input_needed else ()
    sums = tuple(dweights[i] for i in split if weights_needed[i]) + tuple(dbiases[i] for i in split if biases_needed[i])
    summed = ProductSum(x, 0, 0)
    # Which gradients are made for others, shapes alone do not say.
    wanted = f"gradients of x {input_needed}, weights {list(weights_needed)}, biases {list(biases_needed)}"
    shapes = f"{sizes.shapes}, {wanted}"

    def multiply(grad_of: dict[int, Tensor], given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        """What one shard of the weights and its columns of the gradients [lines, width] make."""
        made_weights = iter(made)
        made_biases = iter(made[sum(weights_needed[i] for i in split) :])
        for place, i in enumerate(split):
            grad = grad_of[i]
            if input_needed:
                summed.add(grad, given[place])
            if weights_needed[i]:
                multiply_lines(next(made_weights), grad.t(), lines)
            if biases_needed[i]:
                torch.sum(grad, 0, dtype=wide, out=next(made_biases))

    def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        grad_of = {}
        for i, part in zip(used, given[len(shared) :], strict=True):
            grad_of[i] = part.reshape(sizes.lines, sizes.cuts[i].width)
            if i in sizes.whole:
                columns = sizes.cuts[i].columns(rank)
                whole_grads[i][:, columns] += grad_of[i]
        multiply(grad_of, given, made)

    def visit_owner(owner: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        rows = {i: weights[i].shape[0] for i in split}
        multiply({i: whole_grads[i][:, owner * n : (owner + 1) * n] for i, n in rows.items()}, given, made)

    def fill(rank: int, made: Sequence[Tensor]) -> None:
        for grad, block in zip(incoming, made, strict=True):
            block.copy_(grad[rank])

    def assemble() -> None:
        """The whole gradients from the ranks' parts [world, batch, rows, width]."""
        for i, part in zip(used, parts, strict=True):
            whole_grads[i] = sizes.cuts[i].sum_sharers(part).reshape(sizes.lines, sizes.cuts[i].features)

    # These come behind the exchange, which sends ahead what is gathered after them.
    afterwards: dict[str, Any] = {"phase": "backward", "config": config, "keeps_ahead": True}

    def multiply_whole(which: Sequence[int]) -> None:
        for i in which:
            grad = whole_grads[i]
            if input_needed:
                weight = functional.all_gather(weights[i], sizes.owners, operator=_NAME, **afterwards)
                summed.add(grad, weight)
            if weights_needed[i]:
                full = x.new_empty((sizes.cuts[i].features, sizes.features))
                multiply_lines(full, grad.t(), lines)
                dweights[i] = functional.reduce_scatter(full, sizes.owners, operator=_NAME, **afterwards)
            if biases_needed[i]:
                total = grad.sum(0, dtype=wide)
                dbiases[i] = functional.reduce_scatter(total, sizes.owners, operator=_NAME, **afterwards)

    def run(transport: Transport, settled: OverlapConfig) -> None:
        nonlocal dx, summed
        fused = settled.mode != "unfused"
        summed = ProductSum(x, sizes.lines, sizes.features, wide=fused) if input_needed else summed
        call = Call(_NAME, "backward", settled, shapes=shapes)
        whole = [i for i in used if i in sizes.whole] if fused else used
        if fused and sizes.together:
            whole_grads.update({i: x.new_zeros((sizes.lines, sizes.cuts[i].features), dtype=wide) for i in whole})
            addressed = tuple(grad.contiguous() for grad in incoming)
            exchange = Exchange(visit, shared, addressed, sums)
            transport.execute(dataclasses.replace(call, exchange=exchange, prefetch=prefetch))
            whole_grads.update({i: whole_grads[i].to(x.dtype) for i in whole})
        else:
            if sizes.together:
                receive()
                exchange_parts(transport, call, parts, fill)
            assemble()
            if fused and (shared or sums):
                exchange = Exchange(visit_owner, shared, (), sums)
                transport.execute(dataclasses.replace(call, exchange=exchange, prefetch=prefetch))
        multiply_whole(whole)
        dx = summed.total().view(x.shape) if input_needed else dx

    def receive() -> None:
        parts[:] = [x.new_empty(grad.shape) for grad in incoming]

    if not sizes.together:
        receive()
        all_to_all(_NAME, "backward", sizes.group, config, parts, fill, shapes)
    phase = sizes.phase("backward", x.dtype, weights, gathers=input_needed, sums=any(weights_needed))
    dispatch(sizes.owners, config, x.device, run, phase)
    return [dx, *dweights, *(dbias.to(x.dtype) for dbias in dbiases)]


@_backward.register_fake
def _(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    sharers: Sequence[int],
    group_name: str,
    owners_name: str,
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
    x, weights, biases, has_bias, ctx.sharers, ctx.group_name, ctx.owners_name, ctx.config_key, *ctx.ahead = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1], x, *weights)
    ctx.shapes = [one.shape for one in output[:-1]]
    _several.note_needed(ctx, weights, biases, has_bias)


def _autograd_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    recomputed, x, *weights = ctx.saved_tensors
    incoming = [x.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, ctx.shapes, strict=False)]
    dx, *rest = torch.ops.odysseus.linear_all_to_all_backward(
        incoming,
        x,
        weights,
        ctx.sharers,
        ctx.group_name,
        ctx.owners_name,
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
