"""Cross-entropy of a linear head whose weight is sharded over the ranks (ZeRO-3), without its logits.

Every rank has its own rows; the parts of the weight visit them one after another, in forward and again in backward.
Logits exist for one chunk of rows and one rank's part of the vocabulary at a time.  What is given to a visit is a
peer's memory or a buffer of the transport, read on the calling thread until the visit returns; gradients of the weight
leave while the next part is multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm.arguments import check_config, check_tensors, refuse_second_derivative, under_autocast
from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.groups import dispatch, resolve_group
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.comm.transport import Call, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops._ahead import Shards, take_ahead, tell_ahead
from odysseus_kernels.ops._cross_entropy import (
    LossGradients,
    add_statistics,
    check_loss_input,
    check_reduction,
    check_targets,
    loss_config,
    loss_phase,
    new_statistics,
    reduce_losses,
)
from odysseus_kernels.ops._exchange import execute_exchange
from odysseus_kernels.ops._validate import group_by_name

__all__ = ["zero3_linear_cross_entropy"]

_NAME = "zero3_linear_cross_entropy"


def zero3_linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weight_shard: Tensor,
    bias_shard: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    ignore_index: int = -100,
    chunk_rows: int = 1024,
    reduction: Literal["sum", "none"] = "sum",
    config: OverlapConfig | None = None,
    prefetch_backward: Shards = None,
) -> Tensor:
    """Sum of -log softmax(hidden @ all_gather(weight_shard).T + all_gather(bias_shard))[target] over valid rows.

    N ranks, each with its own R rows; d features, V rows of the vocabulary.  p = softmax(logits [R, V]).

    forward:          loss              = sum over valid rows of logsumexp(logits) - logits[target]
    input gradient:   dhidden [R, d]    = dlogits @ AG(weight_shard), dlogits = (p - onehot(target)) * grad
    weight gradient:  dweight [V/N, d]  = RS(dlogits.T @ hidden), added in fp32: the sum over all ranks' rows
    bias gradient:    dbias [V/N]       = RS(sum of dlogits)

    Backward computes the logits again.  Kept for it are the inputs and a logsumexp for each row.

    Args:
        hidden: [..., d]; the number of rows may differ from rank to rank, and be zero.
        targets: [...], integers below V, or ``ignore_index``.
        weight_shard: [V/N, d], this rank's rows of the weight.
        bias_shard: [V/N] or None.
        group: the ranks; None is the default group.
        ignore_index: target of rows that do not count.
        chunk_rows: rows whose logits are held at a time.
        reduction: ``"sum"``, or ``"none"`` for the loss of each row, minus the log-probability of its target.
        config: mode, transport, pieces, time limit; mode ``"tiles"`` means ``"fused"`` here.
        prefetch_backward: what every rank gathers next with this group after this operator's backward, sent ahead
            meanwhile (:func:`zero3_linear`).

    Returns:
        In fp32 (fp64 for fp64), a scalar: the sum over this rank's rows, zero without valid ones; or [...], of each
        row, zero where it does not count.

    Raises:
        ValueError: bad input, before anything is sent; targets outside of the vocabulary are found on the CPU and
            make the loss infinite elsewhere.
        CommunicationError: ranks differ in what they call, or a peer is lost or silent.
    """
    check_tensors(_NAME, hidden=hidden, targets=targets, weight_shard=weight_shard, bias_shard=bias_shard)
    key = check_config(config).key()
    ahead = tell_ahead(_NAME, weight_shard, None, prefetch_backward)
    hidden, weight_shard, bias_shard = under_autocast(hidden.device, hidden, weight_shard, bias_shard)
    check_loss_input(
        _NAME,
        hidden,
        targets,
        weight_shard,
        bias_shard,
        chunk_rows,
        weight_name="weight_shard",
        bias_name="bias_shard",
    )
    resolved = resolve_group(group)
    rows = hidden.reshape(-1, hidden.shape[-1])
    each, labels = check_reduction(_NAME, reduction), targets.reshape(-1).long()
    losses, _ = torch.ops.odysseus.zero3_linear_cross_entropy(
        rows, labels, weight_shard, bias_shard, resolved.group_name, key, ignore_index, chunk_rows, each, *ahead
    )
    return losses.view(targets.shape) if each else losses  # type: ignore[no-any-return]


@torch.library.custom_op("odysseus::zero3_linear_cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor,
    targets: Tensor,
    weight_shard: Tensor,
    bias_shard: Tensor | None,
    group_name: str,
    config_key: str,
    ignore_index: int,
    chunk_rows: int,
    each: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> tuple[Tensor, Tensor]:
    """(sum of losses, or the loss of each row; logsumexp of each row)."""
    group, config = group_by_name(group_name), loss_config(config_key)
    count = weight_shard.shape[0]
    check_targets(_NAME, targets, count * group.size(), ignore_index)
    shared = _shared(weight_shard, bias_shard)
    statistics = new_statistics(hidden, hidden.shape[0])

    def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        weight, bias = _weight_and_bias(given)
        add_statistics(statistics, hidden, targets, weight, bias, rank * count, chunk_rows)

    def run(transport: Transport, settled: OverlapConfig) -> None:
        statistics.fill_(-torch.inf)
        execute_exchange(transport, Call(_NAME, "forward", settled, exchange=Exchange(visit, shared=shared)))

    phase = loss_phase(_NAME, "forward", hidden.shape[0] * group.size(), weight_shard, weight_shard.nbytes, 0)
    dispatch(group, config, hidden.device, run, phase)
    log_sums, found = statistics.unbind(1)
    return reduce_losses(log_sums, found, targets, ignore_index, each=each), log_sums.contiguous()


def _shared(weight_shard: Tensor, bias_shard: Tensor | None) -> tuple[Tensor, ...]:
    parts = (weight_shard,) if bias_shard is None else (weight_shard, bias_shard)
    return tuple(part.contiguous() for part in parts)


def _weight_and_bias(given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    return given[0], given[1] if len(given) > 1 else None


@_forward.register_fake
def _(
    hidden: Tensor,
    targets: Tensor,
    weight_shard: Tensor,
    bias_shard: Tensor | None,
    group_name: str,
    config_key: str,
    ignore_index: int,
    chunk_rows: int,
    each: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> tuple[Tensor, Tensor]:
    log_sums = hidden.new_empty(hidden.shape[:1], dtype=accumulator_dtype(hidden.dtype))
    return log_sums.new_empty(log_sums.shape if each else ()), log_sums


@torch.library.custom_op("odysseus::zero3_linear_cross_entropy_backward", mutates_args=())
def _backward(
    grad: Tensor,
    hidden: Tensor,
    targets: Tensor,
    log_sums: Tensor,
    weight_shard: Tensor,
    bias_shard: Tensor | None,
    group_name: str,
    config_key: str,
    ignore_index: int,
    chunk_rows: int,
    each: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
    hidden_needed: bool,
    weight_needed: bool,
    bias_needed: bool,
) -> list[Tensor]:
    """[dhidden, dweight, dbias]; an empty tensor stands for a gradient that is not needed."""
    group, config = group_by_name(group_name), loss_config(config_key)
    count = weight_shard.shape[0]
    wide = accumulator_dtype(hidden.dtype)
    prefetch = take_ahead(ahead, ahead_text, "backward") if hidden_needed else None
    shared = _shared(weight_shard, bias_shard)
    dhidden = hidden.new_empty(hidden.shape if hidden_needed else (0,), dtype=wide)
    dweight = weight_shard.new_empty(weight_shard.shape if weight_needed else (0,))
    dbias = weight_shard.new_empty((count,) if bias_needed else (0,))
    sums = (*((dweight,) if weight_needed else ()), *((dbias,) if bias_needed else ()))
    # What is made for one rank is added over chunks of rows, in 16 bits beside the block that travels.
    held = None if wide == hidden.dtype else [torch.empty_like(part, dtype=wide) for part in sums]
    gradients = LossGradients(ignore_index, chunk_rows)

    def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        weight, bias = _weight_and_bias(given)
        totals = [part.zero_() for part in (made if held is None else held)]
        gradients.add(
            hidden,
            targets,
            log_sums,
            grad.reshape(-1),
            weight,
            bias,
            rank * count,
            dhidden=dhidden if hidden_needed else None,
            dweight=totals[0] if weight_needed else None,
            dbias=totals[-1] if bias_needed else None,
        )
        if held is not None:
            for part, total in zip(made, totals, strict=True):
                part.copy_(total)

    def run(transport: Transport, settled: OverlapConfig) -> None:
        dhidden.zero_()
        exchange = Exchange(visit, shared=shared, sums=sums)
        execute_exchange(transport, Call(_NAME, "backward", settled, exchange=exchange, prefetch=prefetch))

    nbytes = sum(part.nbytes for part in sums)
    phase = loss_phase(_NAME, "backward", hidden.shape[0] * group.size(), weight_shard, weight_shard.nbytes, nbytes)
    dispatch(group, config, hidden.device, run, phase)
    return [dhidden if wide == hidden.dtype else dhidden.to(hidden.dtype), dweight, dbias]


@_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    targets: Tensor,
    log_sums: Tensor,
    weight_shard: Tensor,
    bias_shard: Tensor | None,
    group_name: str,
    config_key: str,
    ignore_index: int,
    chunk_rows: int,
    each: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
    hidden_needed: bool,
    weight_needed: bool,
    bias_needed: bool,
) -> list[Tensor]:
    return [
        hidden.new_empty(hidden.shape if hidden_needed else (0,)),
        weight_shard.new_empty(weight_shard.shape if weight_needed else (0,)),
        weight_shard.new_empty(weight_shard.shape[:1] if bias_needed else (0,)),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, targets, weight_shard, bias_shard, *ctx.settings = inputs
    ctx.save_for_backward(hidden, targets, output[1], weight_shard, bias_shard)


def _autograd_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    needed = [ctx.needs_input_grad[index] for index in (0, 2, 3)]
    results = torch.ops.odysseus.zero3_linear_cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.settings, *needed)
    dhidden, dweight, dbias = (result if wanted else None for result, wanted in zip(results, needed, strict=True))
    nothing = [None] * (len(ctx.settings) - 2)
    return dhidden, None, dweight, dbias, *nothing, [None] * len(ctx.settings[-2]), None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, _NAME)
