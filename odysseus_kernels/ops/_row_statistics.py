"""What the distribution of each row over a vocabulary is asked for, from one part of the vocabulary after another.

The one place that turns logits of a chunk into statistics, and statistics into gradients of logits, wherever the parts
come from: a whole weight, weights that travel, or ranks that each have a part.  A few chunks of logits
[chunk_rows, rows of the part] are held at a time.  Everything here is for use below autograd.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.ops._cross_entropy import chunks, columns_of, part_logits
from odysseus_kernels.ops._validate import check_bias, check_linear

__all__ = ["RowStatistics", "check_row_input", "logits_gradient"]

_NO_ID = 2**62  # of an empty place among the likeliest; behind all others of equal logit


@dataclasses.dataclass
class RowStatistics:
    """Of R rows over those parts of the vocabulary that were added, in the accumulator's type.

    Attributes:
        log_sums: [R], log of the sum of the exponentials of the logits.
        entropy: [R], of the distribution over these parts alone; [0] where it is not asked for.
        found: [R, K], logits of the ids that are asked for; minus infinity where they are in none of the parts.
        top: [R, k], the largest logits, falling; minus infinity where there are fewer.
        top_ids: [R, k], int64, theirs; of equal logits from different parts the lower id comes first.
    """

    log_sums: Tensor
    entropy: Tensor
    found: Tensor
    top: Tensor
    top_ids: Tensor

    @staticmethod
    def empty(hidden: Tensor, ids: Tensor, *, entropy: bool, top_k: int) -> RowStatistics:
        """Of no part: hidden [R, d], ids [R, K]."""
        rows, wide = hidden.shape[0], accumulator_dtype(hidden.dtype)
        out = RowStatistics(
            hidden.new_empty(rows, dtype=wide),
            hidden.new_empty(rows if entropy else 0, dtype=wide),
            hidden.new_empty(ids.shape, dtype=wide),
            hidden.new_empty((rows, top_k), dtype=wide),
            ids.new_empty((rows, top_k)),
        )
        out.reset()
        return out

    def reset(self) -> None:
        """Forgets all parts."""
        for tensor in (self.log_sums, self.found, self.top):
            tensor.fill_(-math.inf)
        self.entropy.zero_()
        self.top_ids.fill_(_NO_ID)

    def add_part(
        self,
        hidden: Tensor,
        ids: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        first: int,
        scale: float,
        chunk_rows: int,
    ) -> None:
        """Adds the vocabulary's rows from ``first`` on, of logits ``scale * (hidden @ weight.T + bias)``.

        hidden [R, d], ids [R, K], weight [n, d], bias [n] or None.
        """
        count = min(self.top.shape[1], weight.shape[0])
        for rows in chunks(hidden.shape[0], chunk_rows):
            logits = part_logits(hidden[rows], weight, bias).mul_(scale)
            index, mine = columns_of(ids[rows], first, weight.shape[0])
            found = logits.gather(1, index).masked_fill_(~mine, -math.inf)
            # The largest alone is found in one pass over the logits.
            top, top_ids = logits.max(1, keepdim=True) if count == 1 else logits.topk(count, dim=1)
            log_sums = torch.logsumexp(logits, 1)
            # entr(p) = -p * log(p), 0 at 0.
            entropy = torch.special.entr(logits.sub_(log_sums[:, None]).exp_()).sum(1) if self._with_entropy else None
            self._merge(rows, log_sums, entropy, found, top, top_ids + first)

    def merge(self, other: RowStatistics) -> None:
        """Adds the parts of ``other``, which are not among these, of the same rows."""
        entropy = other.entropy if self._with_entropy else None
        self._merge(slice(None), other.log_sums, entropy, other.found, other.top, other.top_ids)

    @property
    def _with_entropy(self) -> bool:
        return self.entropy.shape == self.log_sums.shape

    def _merge(
        self, rows: slice, log_sums: Tensor, entropy: Tensor | None, found: Tensor, top: Tensor, top_ids: Tensor
    ) -> None:
        total = torch.logaddexp(self.log_sums[rows], log_sums)
        if entropy is not None:
            # Of a mixture of distributions on different parts: those of the parts, and that of which part it is.
            before, added = (self.log_sums[rows] - total).exp(), (log_sums - total).exp()
            mixed = before * self.entropy[rows] + added * entropy
            self.entropy[rows] = mixed + torch.special.entr(before) + torch.special.entr(added)
        self.log_sums[rows] = total
        self.found[rows] = torch.maximum(self.found[rows], found)
        both, ids = torch.cat((self.top[rows], top), 1), torch.cat((self.top_ids[rows], top_ids), 1)
        # By id, then by logit, which keeps the order of equal ones: parts may come in any order.
        ids, order = ids.sort(1)
        both, order = both.gather(1, order).sort(dim=1, descending=True, stable=True)
        kept = slice(self.top.shape[1])
        self.top[rows], self.top_ids[rows] = both[:, kept], ids.gather(1, order)[:, kept]

    def log_probs(self, ids: Tensor, ignore_index: int) -> Tensor:
        """[R, K], of the ids; 0 where there is none."""
        return (self.found - self.log_sums[:, None]).masked_fill_(ids == ignore_index, 0.0)

    def is_top(self) -> Tensor:
        """bool [R, K]: whether no logit is larger than that of the id."""
        return self.found >= self.top[:, :1]


def logits_gradient(
    hidden: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: int,
    scale: float,
    *,
    log_sums: Tensor,
    entropy: Tensor,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """[r, n]: gradient of ``hidden @ weight.T + bias`` for one chunk of rows and a part of the vocabulary.

    dlogits = scale * (sum over k of grad_k * (onehot(id_k) - p) - grad_entropy * p * (log p + entropy))

    Args:
        hidden, ids, weight, bias, first, scale: as in :meth:`RowStatistics.add_part`.
        log_sums: [r] over the whole vocabulary.
        entropy: [r], the same; not read without ``grad_entropy``.
        grad_log_probs: [r, K], 0 where there is no id.
        grad_entropy: [r] or None.
    """
    logits = part_logits(hidden, weight, bias).mul_(scale)
    probabilities = logits.sub_(log_sums[:, None]).exp_()
    if grad_entropy is None:
        out = probabilities.mul_(-grad_log_probs.sum(1, keepdim=True))
    else:
        # xlogy(p, p) = p * log(p), 0 at 0.
        out = torch.xlogy(probabilities, probabilities).mul_(-grad_entropy[:, None])
        out.addcmul_(probabilities, (grad_entropy * entropy + grad_log_probs.sum(1))[:, None], value=-1.0)
    index, mine = columns_of(ids, first, weight.shape[0])
    out.scatter_add_(1, index, grad_log_probs.where(mine, 0.0))
    return out.mul_(scale)


def check_row_input(
    operator: str,
    hidden: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocabulary: int,
    temperature: float,
    top_k: int,
    chunk_rows: int,
) -> None:
    """hidden [..., d], ids [..., K] of integers, weight [n, d], bias [n] or None, and what they are asked for."""
    check_linear(operator, hidden, weight, "weight", "hidden")
    check_bias(operator, hidden, weight, bias, "bias", "hidden")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{operator}: expected ids of an integer dtype, got {ids.dtype}")
    if ids.ndim == 0 or ids.shape[:-1] != hidden.shape[:-1]:
        expected = ", ".join(map(str, (*hidden.shape[:-1], "K")))
        raise ValueError(
            f"{operator}: expected ids of shape [{expected}] for hidden {list(hidden.shape)}, got {list(ids.shape)}"
        )
    if ids.device != hidden.device:
        raise ValueError(f"{operator}: expected ids on hidden's device {hidden.device}, got {ids.device}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"{operator}: expected a temperature above 0, got {temperature!r}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k <= vocabulary:
        raise ValueError(f"{operator}: expected top_k from 0 to the {vocabulary} ids of the vocabulary, got {top_k!r}")
    if chunk_rows < 1:
        raise ValueError(f"{operator}: expected chunk_rows of at least 1, got {chunk_rows}")
