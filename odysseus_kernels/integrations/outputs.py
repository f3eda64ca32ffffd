"""What a parallelized model makes of its last layer's output: the loss, logits, or statistics of tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from odysseus_kernels.nn.cut import SequenceCut
from odysseus_kernels.nn.gather import LastTokens
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.loss import DistributedHead, sequence_loss, token_losses
from odysseus_kernels.nn.moe import load_balancing_loss
from odysseus_kernels.nn.parameters import token_parameter

__all__ = ["TokenStatisticsOutput", "checked_logits_to_keep", "last_logits", "loss_of", "router_loss"]


@dataclasses.dataclass
class TokenStatisticsOutput(ModelOutput):  # type: ignore[misc]
    """Of this rank's tokens, padding included: :class:`~odysseus_kernels.nn.token_statistics.TokenStatistics`."""

    logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    id_logprobs: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def checked_logits_to_keep(count: int | torch.Tensor, *, with_logits: bool) -> int:
    """The number of tokens; ValueError for what is none, and unless it is 0 where there are no logits."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        got = f"a tensor {list(count.shape)}" if isinstance(count, torch.Tensor) else repr(count)
        raise ValueError(
            f"logits_to_keep: expected how many of the last tokens of the sequence are wanted, 0 for this rank's part "
            f"of all, got {got}; take others from what gather_sequence makes of all logits"
        )
    if count and not with_logits:
        raise ValueError(
            f"logits_to_keep: expected 0 beside labels or token_statistics, with which there are no logits, got {count}"
        )
    return count


def last_logits(hidden: torch.Tensor, head: Any, cut: SequenceCut, count: int, group: SequenceGroup) -> torch.Tensor:
    """[B, k, V] of the last k tokens of the whole sequence, on every rank, from this rank's hidden states [B, s, d]."""
    last = LastTokens.of(cut, count, group, hidden.device)
    return last.gather(head(hidden[:, last.own]))


def loss_of(
    hidden: torch.Tensor, targets: torch.Tensor, head: Any, group: SequenceGroup, *, each: bool, **settings: Any
) -> torch.Tensor:
    """Mean over all ranks' tokens, or of each of this rank's [B, s], without logits: hidden [B, s, d]."""
    if not isinstance(head, DistributedHead):
        # Once for all chunks: the gradient is added over the ranks once, too.
        weight: Any = token_parameter(head.weight, group)
        bias = token_parameter(head.bias, group)
        head = functools.partial(nn.functional.linear, weight=weight, bias=bias)
    if each:
        return token_losses(hidden, targets, head, settings["ignore_index"])
    return sequence_loss(hidden, targets, group.mesh, head=head, tokens=group.tokens, config=group.config, **settings)


def router_loss(
    router_logits: tuple[torch.Tensor, ...],
    hidden: torch.Tensor,
    experts_per_token: int,
    counted: torch.Tensor | None,
    cut: SequenceCut,
    group: SequenceGroup,
) -> torch.Tensor:
    """Load-balancing loss over the tokens that ``counted`` [B, s] marks, or all but padding; hidden [B, s, d]."""
    if counted is None and cut.padding:
        counted = (cut.positions(hidden.device) < cut.length).expand(hidden.shape[:2])
    return load_balancing_loss(
        router_logits, experts_per_token, group=group.token_group, attention_mask=counted, config=group.config
    )
