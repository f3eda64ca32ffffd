"""Cross-entropy as the mean over all tokens of all ranks, in memory that does not grow with the sequence.

The value is the global mean on every rank.  Its backward gives each rank the gradient of that global mean with
respect to its own logits, so the sum over ranks of every parameter's gradient is the gradient of the whole batch.
Where tokens are replicated over "seq", each of its ranks has the gradient with respect to all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from odysseus_kernels.comm.announce import subject
from odysseus_kernels.comm.functional import all_reduce
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.nn.derivatives import first_derivative
from odysseus_kernels.nn.group import SequenceGroup

__all__ = ["IGNORE_INDEX", "DistributedHead", "sequence_loss", "token_count", "token_losses"]

IGNORE_INDEX = -100

Tokens = Literal["sharded", "replicated"]


@runtime_checkable
class DistributedHead(Protocol):
    """A head that computes the loss itself, because no rank has its whole weight.

    Attributes:
        tokens: whether ranks of "seq" have tokens of their own, or all the same.
    """

    tokens: Tokens

    def cross_entropy(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        chunk_rows: int,
        reduction: Literal["sum", "none"] = "sum",
    ) -> torch.Tensor:
        """Cross-entropy of rows, 0 where they are not valid, each [R] or added: hidden [R, d], targets [R]."""
        ...


def sequence_loss(
    logits_or_hidden: torch.Tensor,
    labels: torch.Tensor,
    mesh: DeviceMesh,
    *,
    head: Callable[[torch.Tensor], torch.Tensor] | DistributedHead | None = None,
    tokens: Tokens = "sharded",
    num_items: int | torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    chunk_rows: int = 1024,
    config: OverlapConfig | None = None,
) -> torch.Tensor:
    """Mean cross-entropy over the valid tokens of the whole batch, on every rank.

    Args:
        logits_or_hidden: this rank's logits [..., s, V], or with ``head`` its hidden states [..., s, d].
        labels: this rank's targets [..., s], already shifted: ``labels[i]`` is what position i predicts.
        mesh: device mesh with the dimension ``"seq"``, optionally ``"ring"`` outside it and ``"dp"`` outside both;
            the mean is over ``"ring"`` and ``"seq"``.
        head: turns hidden states into logits; called chunk by chunk and again in backward, so that the logits of the
            whole sequence are never held.  A :class:`DistributedHead` is asked for the loss instead.
        tokens: ``"sharded"`` where every rank has tokens of its own; ``"replicated"`` where all ranks of ``"seq"``
            have the same, which then count once.
        num_items: divides the sum instead of the number of valid tokens; the same number on every rank, for
            instance the tokens of all accumulated batches. A number, or a tensor of one or of equal numbers.
        ignore_index: label of tokens that do not count.
        chunk_rows: tokens whose probabilities are held in fp32 at a time.
        config: how the sum over ranks is communicated.

    Returns:
        A scalar in fp32 (fp64 for fp64 logits). With no valid token it is nan and its gradients are zero, as those of
        ``torch.nn.functional.cross_entropy`` are.

    Raises:
        ValueError: if shapes disagree, labels are not integers, ``head`` is for other tokens, or ``num_items`` is no
            number of tokens.
        RankMismatchError: if ``num_items`` or ``ignore_index`` differ between ranks, with the next call that compares
            them; in backward likewise if the loss was scaled differently. (A gradient on a GPU is not looked at: the
            host would have to wait for it. Replicated tokens without a head that is cut send nothing.)

    Example:
        >>> part = ody.shard_sequence(batch, mesh)
        >>> logits = torch.zeros(2, 8, 120, requires_grad=True)  # of this rank's tokens
        >>> loss = ody.sequence_loss(logits, part["shift_labels"], mesh)
        >>> torch.testing.assert_close(loss, torch.tensor(120.0).log())
    """
    if tokens not in get_args(Tokens):
        raise ValueError(f'tokens: expected "sharded" or "replicated", got {tokens!r}')
    group = dataclasses.replace(SequenceGroup.of(mesh, config), tokens=tokens)
    if logits_or_hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels: expected shape {tuple(logits_or_hidden.shape[:-1])} for input of shape "
            f"{tuple(logits_or_hidden.shape)}, got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected an integer dtype, got {labels.dtype}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected at least 1, got {chunk_rows}")
    if isinstance(head, DistributedHead) and head.tokens != tokens:
        raise ValueError(f"tokens: expected {head.tokens!r}, which {type(head).__name__} is for, got {tokens!r}")
    items = token_count(num_items)
    rows = logits_or_hidden.reshape(-1, logits_or_hidden.shape[-1])
    targets = labels.reshape(-1).to(rows.device)
    group.withdraw()  # left over from a pass that ended with an error before any call took it
    group.announce(f"loss over {'valid' if items is None else repr(items)} tokens, ignore_index {ignore_index}")
    try:
        if head is None:
            total = ChunkedCrossEntropy.apply(rows, targets, ignore_index, chunk_rows)
        elif isinstance(head, DistributedHead):
            total = head.cross_entropy(rows, targets, ignore_index, chunk_rows)
        else:
            total = _cross_entropy_through_head(rows, targets, head, ignore_index, chunk_rows)
        count = (targets != ignore_index).sum()
        return GlobalMean.apply(total, count, items, group)  # type: ignore[no-any-return]
    finally:
        group.withdraw()


def token_count(num_items: object) -> float | None:
    """What a loss is divided by, in every form that trainers hand over; waits for a tensor's device.

    Raises:
        TypeError: if it is no number.
        ValueError: for several numbers that differ, negative ones, and what is not finite.
    """
    if num_items is None:
        return None
    values: list[Any] = num_items.detach().flatten().tolist() if isinstance(num_items, torch.Tensor) else [num_items]
    if any(isinstance(value, bool) or not isinstance(value, Real) for value in values):
        raise TypeError(f"num_items: expected a number of tokens, or a tensor of it, got {num_items!r}")
    if len(set(values)) != 1:
        raise ValueError(f"num_items: expected one number of tokens, or the same for every device, got {values}")
    if not 0 <= values[0] < math.inf:
        raise ValueError(f"num_items: expected a number of tokens, got {values[0]!r}")
    return float(values[0])


def token_losses(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor] | DistributedHead,
    ignore_index: int = IGNORE_INDEX,
    chunk_rows: int = 1024,
) -> torch.Tensor:
    """Cross-entropy of each of this rank's tokens, without their logits: minus the log-probability of its target.

    Args:
        hidden: [..., d].
        targets: [...], shifted already.
        head: as in :func:`sequence_loss`.
        ignore_index: target of tokens that do not count.
        chunk_rows: tokens whose logits are held at a time.

    Returns:
        [...] in fp32 (fp64 for fp64), 0 where a token does not count.
    """
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(hidden.device)
    if isinstance(head, DistributedHead):
        losses = head.cross_entropy(rows, labels, ignore_index, chunk_rows, "none")
    else:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32

        def of_chunk(chunk: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(head(chunk).to(wide), target, ignore_index=ignore_index, reduction="none")

        parts = zip(rows.split(chunk_rows), labels.split(chunk_rows), strict=True)
        losses = torch.cat([checkpoint(of_chunk, *part, use_reentrant=False) for part in parts])
    return losses.view(targets.shape)


def _cross_entropy_through_head(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    ignore_index: int,
    chunk_rows: int,
) -> torch.Tensor:
    def of_chunk(hidden_chunk: torch.Tensor, target_chunk: torch.Tensor) -> torch.Tensor:
        return ChunkedCrossEntropy.apply(head(hidden_chunk), target_chunk, ignore_index, chunk_rows)  # type: ignore

    # All ranks have equally many rows and chunks: a head that communicates is called equally often everywhere.
    sums = [
        checkpoint(of_chunk, chunk, target, use_reentrant=False)
        for chunk, target in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
    ]
    return torch.stack(sums).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy of rows, with only one chunk of rows in fp32 at a time.

    Shapes: logits [R, V], targets [R]; the sum is a scalar in fp32 (fp64 for fp64 logits).

    forward: sum over valid rows of logsumexp(logits) - logits[target]; saves logits, targets and the logsumexp [R]
    logits gradient: (softmax(logits) - onehot(target)) * grad on valid rows, zero elsewhere
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, chunk_rows: int
    ) -> torch.Tensor:
        """Returns the sum."""
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        log_sums = torch.empty(logits.shape[0], dtype=wide, device=logits.device)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for start in range(0, logits.shape[0], chunk_rows):
            chunk = logits[start : start + chunk_rows].to(wide)
            target = targets[start : start + chunk_rows]
            log_sum = torch.logsumexp(chunk, dim=-1, out=log_sums[start : start + chunk_rows])
            total += F.nll_loss(chunk - log_sum[:, None], target, ignore_index=ignore_index, reduction="sum")
        ctx.save_for_backward(logits, targets, log_sums)
        ctx.ignore_index, ctx.chunk_rows = ignore_index, chunk_rows
        return total.to(wide)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Returns the gradient of the logits in their own dtype."""
        (grad,) = grad_outputs
        logits, targets, log_sums = ctx.saved_tensors
        out = torch.empty_like(logits)
        for start in range(0, logits.shape[0], ctx.chunk_rows):
            part = slice(start, start + ctx.chunk_rows)
            valid = targets[part] != ctx.ignore_index
            probabilities = (logits[part].to(log_sums.dtype) - log_sums[part, None]).exp_()
            target = targets[part].where(valid, 0)[:, None]
            probabilities.scatter_add_(1, target, probabilities.new_full((1, 1), -1.0).expand_as(target))
            out[part] = probabilities.mul_(grad).masked_fill_(~valid[:, None], 0.0)
        return out, None, None, None


class GlobalMean(torch.autograd.Function):
    """Sum over ranks of local sums, divided by the sum over ranks of local counts, or by ``items``.

    forward: all_reduce(total) / all_reduce(count)
    total gradient: grad / all_reduce(count), on every rank for its own part of the sum; nothing is sent
    """

    @staticmethod
    def forward(
        ctx: Any, total: torch.Tensor, count: torch.Tensor, items: float | None, group: SequenceGroup
    ) -> torch.Tensor:
        """Returns the mean, equal on every rank."""
        ctx.group, ctx.of = group, f" of {subject()}" if subject() else ""
        # One message for both; counts are exact in fp64 up to 2**53 tokens.
        both = torch.stack((total.double(), count.double()))
        # Tokens that all ranks of "seq" have count once: only those of other ring ranks are others.
        if group.token_group is not None:
            both = all_reduce(both, group.token_group, operator="sequence_loss", config=group.config)
        total_sum, count_sum = both.unbind()
        divisor = count_sum if items is None else torch.tensor(items, dtype=torch.float64, device=total.device)
        # With no valid token every gradient is zero already; dividing it by zero would make it nan.
        ctx.divisor = divisor.clamp_min(1.0) if items is None else divisor
        return (total_sum / divisor).to(total.dtype)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Returns the gradient of this rank's sum."""
        (grad,) = grad_outputs
        group = ctx.group
        if grad.device.type == "cpu":
            # Gradients are added over the ranks: a loss that only one of them scales, or that is of another forward
            # pass than theirs, is the loss of none.
            groups = (group.everyone,) if group.tokens == "sharded" else (group.group, group.ring)
            group.announce(f"gradient {grad.item()!r} of the loss{ctx.of}", *(one for one in groups if one is not None))
        return (grad / ctx.divisor).to(grad.dtype), None, None, None
