"""Cross-entropy of rows against a part of the vocabulary, a chunk of rows at a time: what both losses compute locally.

Statistics of a row are two numbers in the accumulator's type: the log of the sum of the exponentials of its logits,
and its target's logit, minus infinity where the target is not among the vocabulary's rows.  Parts of the vocabulary
combine by log-add-exp and by maximum.  At most one chunk of logits [chunk_rows, rows of the part] is held, in the
product's type and in the accumulator's.  Everything here is for use below autograd.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops._products import add_wide
from odysseus_kernels.ops._validate import check_bias, check_linear

__all__ = [
    "LossGradients",
    "add_gradients",
    "add_statistics",
    "check_loss_input",
    "check_reduction",
    "check_targets",
    "chunks",
    "columns_of",
    "loss_config",
    "loss_phase",
    "new_statistics",
    "part_logits",
    "reduce_losses",
]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_loss_input(
    operator: str,
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chunk_rows: int,
    *,
    weight_name: str,
    bias_name: str,
) -> None:
    """hidden [..., d], targets [...] of integers, weight [n, d], bias [n] or None, chunk_rows above 0."""
    check_linear(operator, hidden, weight, weight_name, "hidden")
    check_bias(operator, hidden, weight, bias, bias_name, "hidden")
    if not isinstance(targets, Tensor) or targets.dtype not in _INTEGERS:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"{operator}: expected targets of an integer dtype, got {got}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{operator}: expected targets of shape {list(hidden.shape[:-1])} for hidden {list(hidden.shape)}, "
            f"got {list(targets.shape)}"
        )
    if targets.device != hidden.device:
        raise ValueError(f"{operator}: expected targets on hidden's device {hidden.device}, got {targets.device}")
    if chunk_rows < 1:
        raise ValueError(f"{operator}: expected chunk_rows of at least 1, got {chunk_rows}")


def check_targets(operator: str, targets: Tensor, vocabulary: int, ignore_index: int, *, name: str = "targets") -> None:
    """Refuses a target outside of the vocabulary, on the CPU; elsewhere looking would wait for the device.

    Such a target makes the loss infinite where it is not refused.
    """
    if targets.device.type != "cpu":
        return
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if outside.any():
        raise ValueError(
            f"{operator}: expected {name} from 0 to {vocabulary - 1} or ignore_index {ignore_index}, "
            f"got {int(targets[outside][0])}"
        )


def loss_config(key: str) -> OverlapConfig:
    """The configuration with the mode that a loss runs in: products on chunks have no kernel of their own."""
    config = OverlapConfig.from_key(key)
    return dataclasses.replace(config, mode="fused") if config.mode == "tiles" else config


def loss_phase(operator: str, phase: str, rows: int, weight: Tensor, gathered: int, scattered: int) -> Phase:
    """What the choice of a mode depends on; ``rows`` counts all that meet ``weight``, bytes are a chunk's."""
    products = 1 if phase == "forward" else 3
    return Phase(
        operator=operator,
        phase=phase,
        shapes=f"gathers {gathered}, scatters {scattered}",
        # Not the rows: they may change on one rank alone, and ranks have to choose anew together.
        own=f"weight {list(weight.shape)}",
        dtype=weight.dtype,
        flops=2 * products * rows * weight.numel(),
        gathered_bytes=gathered,
        scattered_bytes=scattered,
    )


def new_statistics(hidden: Tensor, rows: int) -> Tensor:
    """[rows, 2] of an empty vocabulary."""
    return hidden.new_full((rows, 2), -math.inf, dtype=accumulator_dtype(hidden.dtype))


def add_statistics(
    statistics: Tensor,
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: int,
    chunk_rows: int,
) -> None:
    """Adds to ``statistics`` [R, 2] what the vocabulary's rows from ``first`` on contribute.

    hidden [R, d], targets [R], weight [n, d], bias [n] or None.
    """
    for part in chunks(hidden.shape[0], chunk_rows):
        logits = part_logits(hidden[part], weight, bias)
        log_sums, found = statistics[part].unbind(1)
        log_sums.copy_(torch.logaddexp(log_sums, torch.logsumexp(logits, 1)))
        index, mine = columns_of(targets[part], first, weight.shape[0])
        found.copy_(torch.where(mine, logits.gather(1, index[:, None])[:, 0], found))


def reduce_losses(log_sums: Tensor, found: Tensor, targets: Tensor, ignore_index: int, *, each: bool) -> Tensor:
    """-log p of each row, 0 where it does not count, in the statistics' type; or their sum, added in fp64."""
    losses = (log_sums - found).masked_fill(targets == ignore_index, 0.0)
    return losses if each else losses.sum(dtype=torch.float64).to(log_sums.dtype)


def check_reduction(operator: str, reduction: str) -> bool:
    """Whether each row's loss is wanted; ValueError for what is neither ``"sum"`` nor ``"none"``."""
    if reduction not in ("sum", "none"):
        raise ValueError(f'{operator}: expected reduction "sum" or "none", got {reduction!r}')
    return reduction == "none"


class LossGradients:
    """Gradients of the losses, one part of the vocabulary and one set of rows at a time.

    dlogits = (softmax(logits) - onehot(target)) * grad on valid rows, zero elsewhere, from recomputed logits; grad is
    one number for the sum of losses, or one for each row.  It is held for one chunk, and rounded to the products' type.
    """

    def __init__(self, ignore_index: int, chunk_rows: int) -> None:
        self._ignore_index = ignore_index
        self._chunk_rows = chunk_rows

    def add(
        self,
        hidden: Tensor,
        targets: Tensor,
        log_sums: Tensor,
        grad: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        first: int,
        *,
        dhidden: Tensor | None = None,
        dweight: Tensor | None = None,
        dbias: Tensor | None = None,
    ) -> None:
        """Adds to those gradients that are given; they are in ``hidden``'s type or the accumulator's.

        hidden, dhidden [R, d]; targets, log_sums [R]; grad [1] or [R]; weight, dweight [n, d]; bias, dbias [n].
        """

        def dlogits_of(part: slice) -> Tensor:
            scale = grad if grad.shape[0] == 1 else grad[part]
            return self._dlogits(hidden[part], targets[part], log_sums[part], scale, weight, bias, first)

        add_gradients(dlogits_of, hidden, weight, self._chunk_rows, dhidden=dhidden, dweight=dweight, dbias=dbias)

    def _dlogits(
        self,
        hidden: Tensor,
        targets: Tensor,
        log_sums: Tensor,
        grad: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        first: int,
    ) -> Tensor:
        out = part_logits(hidden, weight, bias).sub_(log_sums[:, None]).exp_()
        index, mine = columns_of(targets, first, weight.shape[0])
        out.scatter_add_(1, index[:, None], mine[:, None].to(out.dtype).neg_())
        return out.mul_(grad[:, None]).masked_fill_((targets == self._ignore_index)[:, None], 0.0)


def add_gradients(
    dlogits_of: Callable[[slice], Tensor],
    hidden: Tensor,
    weight: Tensor,
    chunk_rows: int,
    *,
    dhidden: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    """Adds to those gradients of ``hidden @ weight.T + bias`` that are given, a chunk of rows at a time.

    ``dlogits_of(rows)`` [r, n] is in the accumulator's type, and rounded to the products' type.
    """
    for part in chunks(hidden.shape[0], chunk_rows):
        dlogits = dlogits_of(part)
        if dbias is not None:
            dbias += dlogits.sum(0)
        rounded = dlogits.to(hidden.dtype)
        if dhidden is not None:
            _add_product(dhidden[part], rounded, weight)
        if dweight is not None:
            _add_product(dweight, rounded.t(), hidden[part])


def chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    """Slices of at most ``chunk_rows`` rows."""
    for start in range(0, rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, rows))


def part_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[R, n] in the accumulator's type, of a product in the operands' type: the precision of a stock model."""
    logits = torch.mm(hidden, weight.t()) if bias is None else torch.addmm(bias, hidden, weight.t())
    return logits.to(accumulator_dtype(hidden.dtype))


def columns_of(targets: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Column of each target in a part of the vocabulary (0 where it is elsewhere), and whether it is there."""
    index = targets - first
    mine = (index >= 0) & (index < count)
    return index.where(mine, 0), mine


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, in total's type."""
    if total.dtype != a.dtype:
        add_wide(total, a, b)
    else:
        torch.addmm(total, a, b, out=total)
