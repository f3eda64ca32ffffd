"""Cross-entropy of a linear head of which every rank holds some rows of the vocabulary, without its logits.

``tokens="sharded"``: every rank has its own tokens, equally many.  They visit the rank's part of the vocabulary, a
chunk at a time, and the statistics of each token (two numbers) travel back to its rank.  ``tokens="replicated"``: every
rank has all tokens, and only statistics and the input's gradient travel.

What is given to a visit is a peer's memory or a buffer of the transport, read on the calling thread until the visit
returns; input gradients leave while the next rank's tokens are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm import functional
from odysseus_kernels.comm.arguments import check_config, check_tensors, refuse_second_derivative, under_autocast
from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.groups import dispatch, resolve_group
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.comm.transport import Call, Transport
from odysseus_kernels.config import OverlapConfig
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

__all__ = ["Tokens", "vocab_parallel_linear_cross_entropy"]

_NAME = "vocab_parallel_linear_cross_entropy"

Tokens = Literal["sharded", "replicated"]


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    tokens: Tokens = "sharded",
    vocabulary_rows: Sequence[int] | None = None,
    ignore_index: int = -100,
    chunk_rows: int = 1024,
    reduction: Literal["sum", "none"] = "sum",
    config: OverlapConfig | None = None,
) -> Tensor:
    """Sum of -log softmax(logits)[target] over valid rows, with logits over the vocabulary's rows of all ranks.

    N ranks with V/N rows of the vocabulary each (or with ``vocabulary_rows``); R rows of tokens; d features.
    p = softmax(logits), local columns.

    forward:          loss              = sum over valid rows of logsumexp(logits) - logits[target]
    input gradient:   dhidden [R, d]    = RS(dlogits @ weight), dlogits = (p - onehot(target)) * grad; replicated: AR
    weight gradient:  dweight [V/N, d]  = dlogits.T @ AG(hidden), added in fp32; replicated: nothing is gathered
    bias gradient:    dbias [V/N]       = sum of dlogits

    Backward computes the logits again.  Kept for it are the inputs, a logsumexp for each row and, with sharded tokens,
    the targets of all ranks.  Gradients are those of the sum of all ranks' values where tokens are sharded, of one
    rank's value where they are replicated.

    Args:
        hidden: [..., d]; sharded: this rank's tokens, equally many on every rank; replicated: the same on every rank.
        targets: [...], integers below V, or ``ignore_index``, of the tokens in ``hidden``.
        weight: [V/N, d], this rank's rows of the weight.
        bias: [V/N], of the same rows, or None.
        group: the ranks; None is the default group.
        tokens: ``"sharded"`` or ``"replicated"``.
        vocabulary_rows: rows of the weight on each rank, in the order of ranks, where they differ: (5, 4) for a
            vocabulary of 9 on two ranks.  None: every rank has as many as this one.
        ignore_index: target of rows that do not count.
        chunk_rows: rows whose logits are held at a time.
        reduction: ``"sum"``, or ``"none"`` for the loss of each row, minus the log-probability of its target.
        config: mode, transport, pieces, time limit; mode ``"tiles"`` means ``"fused"`` here.

    Returns:
        In fp32 (fp64 for fp64), a scalar: the sum over the tokens in ``hidden``, zero without valid ones; or [...], of
        each token, zero where it does not count.

    Raises:
        ValueError: bad input, before anything is sent; targets outside of the vocabulary are found on the CPU and
            make the loss infinite elsewhere.
        CommunicationError: ranks differ in what they call, or a peer is lost or silent.
    """
    check_tensors(_NAME, hidden=hidden, targets=targets, weight=weight, bias=bias)
    key = check_config(config).key()
    hidden, weight, bias = under_autocast(hidden.device, hidden, weight, bias)
    check_loss_input(_NAME, hidden, targets, weight, bias, chunk_rows, weight_name="weight", bias_name="bias")
    if tokens not in get_args(Tokens):
        raise ValueError(f'{_NAME}: expected tokens "sharded" or "replicated", got {tokens!r}')
    if targets.numel() == 0:
        raise ValueError(f"{_NAME}: expected hidden with at least one row, got shape {list(hidden.shape)}")
    resolved = resolve_group(group)
    counts = _vocabulary_rows(vocabulary_rows, weight.shape[0], resolved.rank(), resolved.size())
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    each = check_reduction(_NAME, reduction)
    losses, _, _ = torch.ops.odysseus.vocab_parallel_linear_cross_entropy(
        rows,
        labels,
        weight,
        bias,
        counts,
        tokens == "sharded",
        resolved.group_name,
        key,
        ignore_index,
        chunk_rows,
        each,
    )
    return losses.view(targets.shape) if each else losses  # type: ignore[no-any-return]


def _vocabulary_rows(given: Sequence[int] | None, own: int, rank: int, world: int) -> list[int]:
    """Rows of the vocabulary on each rank."""
    if given is None:
        return [own] * world
    counts = list(given)
    if len(counts) != world or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in counts):
        raise ValueError(
            f"{_NAME}: expected vocabulary_rows to be a number of rows for each of {world} ranks, got {counts}"
        )
    if counts[rank] != own:
        raise ValueError(
            f"{_NAME}: expected weight with the {counts[rank]} rows that vocabulary_rows {counts} names for rank "
            f"{rank}, got {own}"
        )
    return counts


@torch.library.custom_op("odysseus::vocab_parallel_linear_cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocabulary_rows: Sequence[int],
    sharded: bool,
    group_name: str,
    config_key: str,
    ignore_index: int,
    chunk_rows: int,
    each: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, each [R] or added; logsumexp of each row; targets of all ranks [N, R], empty with replicated tokens)."""
    group, config = group_by_name(group_name), loss_config(config_key)
    world = group.size()
    check_targets(_NAME, targets, sum(vocabulary_rows), ignore_index)
    first, shapes = sum(vocabulary_rows[: group.rank()]), _shapes(vocabulary_rows, ignore_index)
    if sharded:
        everyone = functional.all_gather(targets[None], group, operator=_NAME, config=config, shapes=shapes)
        statistics = new_statistics(hidden, world * hidden.shape[0]).view(world, 1, -1, 2)
        shared = (hidden.contiguous(),)

        def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            block = made[0][0].fill_(-torch.inf)
            add_statistics(block, given[0], everyone[rank], weight, bias, first, chunk_rows)

        def run(transport: Transport, settled: OverlapConfig) -> None:
            exchange = Exchange(visit, shared=shared, received=(statistics,))
            execute_exchange(transport, Call(_NAME, "forward", settled, shapes=shapes, exchange=exchange))

        phase = loss_phase(_NAME, "forward", hidden.shape[0] * world, weight, hidden.nbytes, 0)
        dispatch(group, config, hidden.device, run, phase)
    else:
        everyone = targets.new_empty(0)
        own = new_statistics(hidden, hidden.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            add_statistics(own, hidden, targets, weight, bias, first, chunk_rows)
        statistics = functional.all_gather(own[None], group, operator=_NAME, config=config, shapes=shapes)
    parts = statistics.view(world, -1, 2)
    log_sums, found = torch.logsumexp(parts[..., 0], 0), parts[..., 1].amax(0)
    return reduce_losses(log_sums, found, targets, ignore_index, each=each), log_sums, everyone


def _shapes(vocabulary_rows: Sequence[int], ignore_index: int) -> str:
    """What every rank assumes that the others have."""
    return f"vocabulary_rows {list(vocabulary_rows)}, ignore_index {ignore_index}"


@_forward.register_fake
def _(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocabulary_rows: Sequence[int],
    sharded: bool,
    group_name: str,
    config_key: str,
    ignore_index: int,
    chunk_rows: int,
    each: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulator_dtype(hidden.dtype)
    everyone = (group_by_name(group_name).size(), targets.shape[0]) if sharded else (0,)
    return (
        hidden.new_empty(hidden.shape[:1] if each else (), dtype=wide),
        hidden.new_empty(hidden.shape[:1], dtype=wide),
        targets.new_empty(everyone),
    )


@torch.library.custom_op("odysseus::vocab_parallel_linear_cross_entropy_backward", mutates_args=())
def _backward(
    grad: Tensor,
    hidden: Tensor,
    targets: Tensor,
    log_sums: Tensor,
    everyone: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocabulary_rows: Sequence[int],
    sharded: bool,
    group_name: str,
    config_key: str,
    ignore_index: int,
    chunk_rows: int,
    each: bool,
    hidden_needed: bool,
    weight_needed: bool,
    bias_needed: bool,
) -> list[Tensor]:
    """[dhidden, dweight, dbias]; an empty tensor stands for a gradient that is not needed."""
    group, config = group_by_name(group_name), loss_config(config_key)
    first, shapes = sum(vocabulary_rows[: group.rank()]), _shapes(vocabulary_rows, ignore_index)
    wide = accumulator_dtype(hidden.dtype)
    dhidden = hidden.new_empty(hidden.shape if hidden_needed else (0,))
    dweight = weight.new_empty(weight.shape if weight_needed else (0,), dtype=wide)
    dbias = weight.new_empty(weight.shape[:1] if bias_needed else (0,), dtype=wide)
    gradients = LossGradients(ignore_index, chunk_rows)

    def add(rows: Tensor, labels: Tensor, sums: Tensor, scale: Tensor, out: Tensor | None) -> None:
        gradients.add(
            rows,
            labels,
            sums,
            scale,
            weight,
            bias,
            first,
            dhidden=None if out is None else out.zero_(),
            dweight=dweight if weight_needed else None,
            dbias=dbias if bias_needed else None,
        )

    if sharded:
        # Each token's logsumexp and, after them, the gradient of the rank's value, or of each token's.
        count = hidden.shape[0]
        shared = (hidden.contiguous(), torch.cat((log_sums, grad.reshape(-1))))
        sums = (dhidden,) if hidden_needed else ()

        def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            rows, numbers = given
            add(rows, everyone[rank], numbers[:count], numbers[count:], made[0] if made else None)

        def run(transport: Transport, settled: OverlapConfig) -> None:
            dweight.zero_()
            dbias.zero_()
            exchange = Exchange(visit, shared=shared, sums=sums)
            execute_exchange(transport, Call(_NAME, "backward", settled, shapes=shapes, exchange=exchange))

        rows = hidden.shape[0] * group.size()
        phase = loss_phase(_NAME, "backward", rows, weight, hidden.nbytes, dhidden.nbytes)
        dispatch(group, config, hidden.device, run, phase)
    else:
        dweight.zero_()
        dbias.zero_()
        with torch.autocast(hidden.device.type, enabled=False):
            add(hidden, targets, log_sums, grad.reshape(-1), dhidden if hidden_needed else None)
        if hidden_needed:
            dhidden = functional.all_reduce(
                dhidden, group, operator=_NAME, phase="backward", config=config, shapes=shapes
            )
    same = wide == weight.dtype
    return [dhidden, dweight if same else dweight.to(weight.dtype), dbias if same else dbias.to(weight.dtype)]


@_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    targets: Tensor,
    log_sums: Tensor,
    everyone: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocabulary_rows: Sequence[int],
    sharded: bool,
    group_name: str,
    config_key: str,
    ignore_index: int,
    chunk_rows: int,
    each: bool,
    hidden_needed: bool,
    weight_needed: bool,
    bias_needed: bool,
) -> list[Tensor]:
    return [
        hidden.new_empty(hidden.shape if hidden_needed else (0,)),
        weight.new_empty(weight.shape if weight_needed else (0,)),
        weight.new_empty(weight.shape[:1] if bias_needed else (0,)),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, targets, weight, bias, *ctx.settings = inputs
    _, log_sums, everyone = output
    ctx.save_for_backward(hidden, targets, log_sums, everyone, weight, bias)


def _autograd_backward(ctx: Any, grad: Tensor, _: Tensor | None, __: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = [ctx.needs_input_grad[index] for index in (0, 2, 3)]
    results = torch.ops.odysseus.vocab_parallel_linear_cross_entropy_backward(
        grad, *ctx.saved_tensors, *ctx.settings, *needed
    )
    dhidden, dweight, dbias = (result if wanted else None for result, wanted in zip(results, needed, strict=True))
    return dhidden, None, dweight, dbias, *[None] * len(ctx.settings)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, _NAME)
