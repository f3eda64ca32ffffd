"""What is asked of the distribution that a model gives at each token, and the answer, from hidden states."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch

from odysseus_kernels import ops
from odysseus_kernels.nn.cut import checksums, digest
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.linear import VocabParallelLinear, Zero3Linear
from odysseus_kernels.nn.loss import IGNORE_INDEX
from odysseus_kernels.nn.parameters import token_parameter

__all__ = ["TokenRequest", "TokenStatistics", "token_statistics"]


class TokenStatistics(NamedTuple):
    """Of the distribution that a model gives for the token after each one; None where it was not asked for.

    Shapes: [B, n] is [B, L-1] of whole sequences, or this rank's part [B, s]. In fp32 (fp64 for fp64).

    Attributes:
        logprobs: [B, n], of the next token, 0 where the label is -100; with a gradient. None without labels.
        entropy: [B, n] in nats, of every token, with a label or not; with a gradient.
        top_ids: int64 [B, n, k], the likeliest tokens, the likeliest first, of every token.
        top_logprobs: [B, n, k], theirs; without a gradient.
        is_top1: bool [B, n], whether no token is likelier than the next one; False where the label is -100.
        id_logprobs: [B, n, k], of the ids that were given, 0 where an id is -100; with a gradient.
    """

    logprobs: torch.Tensor | None
    entropy: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    id_logprobs: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class TokenRequest:
    """What is wanted of each token's distribution; checked when it is made.

    Attributes:
        entropy: whether its entropy is.
        top_k: how many of the likeliest tokens.
        top1: whether the next token is the likeliest.
        temperature: that logits are divided by first.
        ids: [B, s, k], this rank's part, log-probabilities of which are wanted; or None.
        same_ids: stands for the ids of all ranks, which compare it; empty where they are not known.
    """

    entropy: bool = False
    top_k: int = 0
    top1: bool = False
    temperature: float = 1.0
    ids: torch.Tensor | None = None
    same_ids: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k: expected a number of tokens, or 0 for none, got {self.top_k!r}")
        number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        if not number or not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature!r}")

    @property
    def is_plain(self) -> bool:
        """Whether it is for nothing but log-probabilities of the next tokens, of logits as they are."""
        return self == TokenRequest()

    def describe(self) -> str:
        """In words that are the same on every rank."""
        words = ["entropy"] * self.entropy + [f"top {self.top_k}"] * bool(self.top_k) + ["top1"] * self.top1
        if self.ids is not None:
            words.append(f"ids {self.same_ids or 'of each'}")
        return ", ".join((*words, f"temperature {self.temperature}"))

    @staticmethod
    def digest(ids: torch.Tensor) -> str:
        """A short text that stands for ids [B, ...]."""
        return digest(tuple(checksums({"ids": ids.flatten(1)}, ids.shape[0]).tolist()))


def token_statistics(
    hidden: torch.Tensor, targets: torch.Tensor | None, head: Any, asked: TokenRequest, group: SequenceGroup
) -> TokenStatistics:
    """Of this rank's tokens: hidden [B, s, d], targets [B, s] or None; logits never exist whole.

    One pass over the logits, in which weights that are cut are gathered once; backward, for all that has a gradient
    together, gathers them once more.

    Args:
        hidden: the last layer's output.
        targets: the next tokens, -100 where none counts.
        head: the model's language head.
        asked: what is wanted.
        group: how the model is parallelized.
    """
    if targets is None and asked.top1:
        raise ValueError("top1: expected labels, the next tokens that the likeliest are compared with, got none")
    columns = [] if targets is None else [targets[..., None].to(hidden.device)]
    if asked.ids is not None:
        if asked.ids.ndim != 3 or asked.ids.shape[:2] != hidden.shape[:2]:
            raise ValueError(
                f"ids: expected this rank's part, [{', '.join(map(str, hidden.shape[:2]))}, k], "
                f"got {list(asked.ids.shape)}"
            )
        columns.append(asked.ids.to(hidden.device))
    first = 0 if targets is None else 1
    ids = torch.cat(columns, -1) if columns else hidden.new_empty((*hidden.shape[:2], 0), dtype=torch.int64)
    settings: dict[str, Any] = {
        "temperature": asked.temperature,
        "entropy": asked.entropy,
        "top_k": asked.top_k,
        "ignore_index": IGNORE_INDEX,
    }
    if isinstance(head, (Zero3Linear, VocabParallelLinear)):
        found = head.log_probs(hidden, ids, **settings)
    else:
        weight, bias = token_parameter(head.weight, group), token_parameter(head.bias, group)
        assert weight is not None
        found = ops.linear_log_probs(hidden, ids, weight, bias, group=None, placement="whole", **settings)
    return TokenStatistics(
        found.log_probs[..., 0] if first else None,
        found.entropy,
        found.top_ids if asked.top_k else None,
        found.top_log_probs if asked.top_k else None,
        found.is_top[..., 0] if asked.top1 else None,
        None if asked.ids is None else found.log_probs[..., first:],
    )
