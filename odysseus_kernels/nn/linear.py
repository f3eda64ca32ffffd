"""Linear layers whose weight is cut into rows, and the losses of such layers at the end of a model.

Both classes are language heads for :func:`~odysseus_kernels.nn.loss.sequence_loss`, which asks them for the loss, and
never for the logits, of hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from odysseus_kernels import ops
from odysseus_kernels.comm.functional import all_gather, all_reduce
from odysseus_kernels.nn.ahead import GathersWeights, Shards, ahead_in_backward, shard_of
from odysseus_kernels.nn.derivatives import first_derivative
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.parameters import local_parameter, sharded_parameter

__all__ = ["VocabParallelLinear", "Zero3Linear", "upcoming"]


class Zero3Linear(nn.Module, GathersWeights):
    """``nn.Linear`` with ZeRO-3 weights: rows are gathered as they are multiplied, the weight is never whole.

    Shapes: input [..., K], weight [n, K] and bias [n] as DTensors cut into rows over all
    ranks that share the sequence, output [..., n].

    Attributes:
        tokens: every rank has tokens of its own.
        upcoming: what the model that is running will ask for, or None where that is not known.
    """

    sequence_group: SequenceGroup
    weight: torch.Tensor
    bias: torch.Tensor | None
    tokens: Literal["sharded", "replicated"] = "sharded"
    upcoming: Literal["logits", "loss"] | None = None

    def first_gathered(self) -> Shards:
        weight, bias = shard_of(self), shard_of(self, "bias")
        if weight is None or self.upcoming is None or (self.bias is not None and bias is None):
            return None
        if self.upcoming == "logits":
            return weight
        return (weight,) if bias is None else (weight, bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Applies the layer to this rank's tokens."""
        self.note_changes()
        weight, bias = local_parameter(self.weight), local_parameter(self.bias)
        group = self.sequence_group
        before = ahead_in_backward(self, input, same_layer=False)
        return ops.zero3_linear(
            input, weight, bias, group=group.everyone, config=group.config, prefetch_backward=before
        )

    def cross_entropy(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        chunk_rows: int,
        reduction: Literal["sum", "none"] = "sum",
    ) -> torch.Tensor:
        """Cross-entropy of this rank's tokens, each [R] or added; logits never exist whole.

        hidden [R, K] and targets [R].
        """
        self.note_changes()
        group = self.sequence_group
        return ops.zero3_linear_cross_entropy(
            hidden,
            targets,
            local_parameter(self.weight),
            local_parameter(self.bias),
            group=group.everyone,
            ignore_index=ignore_index,
            chunk_rows=chunk_rows,
            reduction=reduction,
            config=group.config,
            prefetch_backward=ahead_in_backward(self, hidden, same_layer=False),
        )

    def log_probs(self, hidden: torch.Tensor, ids: torch.Tensor, **settings: Any) -> ops.LogProbs:
        """What :func:`~odysseus_kernels.ops.linear_log_probs` says of this rank's tokens; logits never exist whole.

        hidden [..., K] and ids [..., k].
        """
        self.note_changes()
        weight, bias = local_parameter(self.weight), local_parameter(self.bias)
        group = self.sequence_group
        before = ahead_in_backward(self, hidden, same_layer=False)
        settings |= {"group": group.everyone, "config": group.config, "prefetch_backward": before}
        return ops.linear_log_probs(hidden, ids, weight, bias, placement="zero3", **settings)


@contextlib.contextmanager
def upcoming(head: Any, what: Literal["logits", "loss"]) -> Iterator[None]:
    """While the layers run, their last one may send ahead what ``head`` gathers for ``what``."""
    if not isinstance(head, Zero3Linear):
        yield
        return
    head.upcoming = what
    try:
        yield
    finally:
        head.upcoming = None


class VocabParallelLinear(nn.Module):
    """A language head of which every rank multiplies its own rows of the vocabulary.

    Shapes: input [..., K], weight [V, K] and bias [V] as DTensors with placement Shard(0), output [..., V].

    Attributes:
        tokens: ``"sharded"``: every rank has its own tokens, equally many, and gets the logits of those;
            ``"replicated"``: every rank has all tokens, and gets the logits of all.
    """

    sequence_group: SequenceGroup
    weight: torch.Tensor
    bias: torch.Tensor | None
    tokens: Literal["sharded", "replicated"] = "sharded"

    def setup_sequence(self) -> None:
        """Learns which tokens the strategy has."""
        self.tokens = self.sequence_group.tokens

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits over the whole vocabulary, for callers that want more than a loss."""
        group = self.sequence_group
        weight, bias = sharded_parameter(self.weight, group), sharded_parameter(self.bias, group)
        assert weight is not None
        if self.tokens == "sharded":
            # The weight comes to the tokens: gathering tokens to the weight would send all logits back, L/N * V.
            return ops.zero3_linear(input, weight, bias, group=group.group, config=group.config)
        logits = F.linear(SummedGradient.apply(input, group), weight, bias)
        return GatheredVocabulary.apply(logits, group)  # type: ignore[no-any-return]

    def cross_entropy(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        chunk_rows: int,
        reduction: Literal["sum", "none"] = "sum",
    ) -> torch.Tensor:
        """Cross-entropy of this rank's tokens, or of all where they are replicated, each [R] or added.

        hidden [R, K] and targets [R]; logits never exist whole.
        """
        group = self.sequence_group
        weight, bias = sharded_parameter(self.weight, group), sharded_parameter(self.bias, group)
        assert weight is not None
        return ops.vocab_parallel_linear_cross_entropy(
            hidden,
            targets,
            weight,
            bias,
            group=group.group,
            tokens=self.tokens,
            ignore_index=ignore_index,
            chunk_rows=chunk_rows,
            reduction=reduction,
            config=group.config,
        )

    def log_probs(self, hidden: torch.Tensor, ids: torch.Tensor, **settings: Any) -> ops.LogProbs:
        """What :func:`~odysseus_kernels.ops.linear_log_probs` says of this rank's tokens, or of all where replicated.

        hidden [..., K] and ids [..., k]; logits never exist whole.
        """
        group = self.sequence_group
        weight, bias = sharded_parameter(self.weight, group), sharded_parameter(self.bias, group)
        assert weight is not None
        # As for logits: where ranks have tokens of their own, the weight comes to the tokens.
        settings |= {"group": group.group, "config": group.config}
        settings["placement"] = "zero3" if self.tokens == "sharded" else "vocab_parallel"
        return ops.linear_log_probs(hidden, ids, weight, bias, **settings)


class SummedGradient(torch.autograd.Function):
    """Replicated tokens that every rank multiplies with its own part of a weight.

    forward: the tokens themselves
    gradient: sum over ranks of what each part contributes, the same on every rank
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        """Returns the tokens, sharing memory."""
        ctx.group = group
        return tokens.view_as(tokens)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Returns the complete gradient."""
        (grad,) = grad_outputs
        group = ctx.group
        total = all_reduce(
            grad.contiguous(), group.group, operator="vocab_parallel_linear", phase="backward", config=group.config
        )
        return total, None


class GatheredVocabulary(torch.autograd.Function):
    """Logits of the same tokens over all ranks' rows of the vocabulary.

    Shapes: local [..., V/N], whole [..., V] on every rank.

    forward: whole = AG(local)
    gradient: this rank's columns; every rank's loss is the same, so nothing is added over the ranks
    """

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        """Returns the logits over the whole vocabulary."""
        ctx.first, ctx.count = group.rank * local.shape[-1], local.shape[-1]
        return all_gather(local, group.group, operator="vocab_parallel_linear", dim=-1, config=group.config)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Returns this rank's columns of the gradient."""
        (grad,) = grad_outputs
        return grad.narrow(-1, ctx.first, ctx.count), None
