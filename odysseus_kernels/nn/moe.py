"""Mixtures of experts: tokens stay where they are, experts travel; and the loss that balances them over all ranks.

The router needs nothing of its own: it is a stock module with replicated parameters that sees this rank's tokens
(:class:`~odysseus_kernels.nn.replicated.Replicated`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from odysseus_kernels import ops
from odysseus_kernels.comm.functional import all_gather, all_reduce
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.nn.ahead import GathersWeights, Shards, ahead_in_backward, ahead_in_forward, shard_of
from odysseus_kernels.nn.derivatives import first_derivative
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.parameters import local_parameter

__all__ = ["ExpertsSpec", "SplitTokensExperts", "Zero3Experts", "check_experts", "load_balancing_loss"]


@dataclasses.dataclass(frozen=True)
class ExpertsSpec:
    """Names of the parts of a module that holds all experts of a layer in fused parameters.

    Attributes:
        gate_up: parameter [E, 2i, d], rows of the gate and then of the up projection.
        down: parameter [E, d, i].
        activation: name of the activation function, one of those of :func:`odysseus_kernels.ops.zero3_experts`.
    """

    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    activation: str = "silu"


def check_experts(experts: int, size: int) -> None:
    """Refuses a number of ranks that cannot hold whole experts each.

    Args:
        experts: number of experts of a layer.
        size: ranks that the experts' weights are cut over.

    Raises:
        ValueError: naming the numbers of ranks that divide the experts.
    """
    if experts % size:
        fitting = [n for n in range(1, experts + 1) if experts % n == 0]
        listed = ", ".join(map(str, fitting[:-1])) + f" or {fitting[-1]}"
        raise ValueError(
            f"expected experts that {size} ranks divide (each rank keeps whole experts), got {experts}: use {listed} "
            f"ranks"
        )


class Zero3Experts(nn.Module, GathersWeights):
    """The experts of a layer with ZeRO-3 weights, each rank on its own tokens.

    Shapes: hidden_states and output [T, d], top_k_index and top_k_weights [T, k]; the weights are DTensors with
    placement Shard(0), cut over all ranks that share the sequence (with a ring: over both dimensions of the mesh, the
    ring's first), so that every rank keeps whole experts.  T may differ between ranks.
    """

    sequence_group: SequenceGroup
    experts_spec: ExpertsSpec

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Applies to each token the experts that the router chose for it."""
        spec, group = self.experts_spec, self.sequence_group
        self.note_changes()
        self.note_backward(hidden_states)
        return ops.zero3_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            local_parameter(getattr(self, spec.gate_up)),
            local_parameter(getattr(self, spec.down)),
            activation=spec.activation,
            group=group.everyone,
            config=group.config,
            prefetch=ahead_in_forward(self, last=True),
            prefetch_backward=ahead_in_backward(self, hidden_states),
        )

    def first_gathered(self) -> Shards:
        gate_up, down = (shard_of(self, name) for name in (self.experts_spec.gate_up, self.experts_spec.down))
        return None if gate_up is None or down is None else (gate_up, down)

    def first_gathered_in_backward(self) -> Shards:
        return self.first_gathered() if self.gathers_in_backward else None


class SplitTokensExperts(Zero3Experts):
    """The same where all ranks of the ``"seq"`` dimension hold the same tokens, as under tensor parallelism.

    Rank r applies the experts to the r-th slice of ceil(T/N) tokens (the last ones may get fewer, or none), and the
    results are gathered.  Gradients of the inputs are complete on every rank, as those of replicated tokens are.
    """

    sends_ahead = False  # its neighbours are gathers of tokens

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Applies to each token the experts that the router chose for it."""
        group, tokens = self.sequence_group, hidden_states.shape[0]
        first, last = _slice(tokens, group)
        own = super().forward(
            SplitTokens.apply(hidden_states, group), top_k_index[first:last], SplitTokens.apply(top_k_weights, group)
        )
        return JoinTokens.apply(own, tokens, group)  # type: ignore[no-any-return]


def _slice(tokens: int, group: SequenceGroup) -> tuple[int, int]:
    """First and one past the last of this rank's tokens."""
    rows = -(-tokens // group.size)
    return min(group.rank * rows, tokens), min((group.rank + 1) * rows, tokens)


def _join(part: torch.Tensor, tokens: int, group: SequenceGroup, phase: Any) -> torch.Tensor:
    """All ranks' slices [T, ...]; each travels padded to the length of the first."""
    rows = -(-tokens // group.size)
    padded = F.pad(part, (0, 0, 0, rows - part.shape[0]))
    return all_gather(padded, group.group, operator="expert_tokens", phase=phase, config=group.config)[:tokens]


class SplitTokens(torch.autograd.Function):
    """This rank's slice of tokens that every rank has.

    Shapes: x [T, d] on every rank of N; the slice has ceil(T/N) rows or what is left of them.

    forward: the slice; nothing is sent
    input gradient: all_gather of the slices' gradients, complete on every rank
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        """Returns the slice, sharing memory with x."""
        ctx.group, ctx.tokens = group, x.shape[0]
        first, last = _slice(x.shape[0], group)
        return x[first:last]

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Returns the gradient of all tokens."""
        return _join(grad_outputs[0], ctx.tokens, ctx.group, "backward"), None


class JoinTokens(torch.autograd.Function):
    """All ranks' slices of tokens, for what every rank then does alike.

    forward: all_gather of the slices, [T, d] on every rank
    slice gradient: its slice of the gradient, which every rank has; nothing is sent
    """

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, tokens: int, group: SequenceGroup) -> torch.Tensor:
        """Returns all tokens."""
        ctx.group, ctx.tokens = group, tokens
        return _join(part, tokens, group, "forward")

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Returns the gradient of this rank's slice."""
        first, last = _slice(ctx.tokens, ctx.group)
        return grad_outputs[0][first:last], None, None


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor],
    top_k: int,
    *,
    group: dist.ProcessGroup | None,
    attention_mask: torch.Tensor | None = None,
    config: OverlapConfig | None = None,
) -> torch.Tensor:
    """The auxiliary loss of Switch Transformers over the tokens of all ranks: what a stock model gives for them all.

    It is E times the sum over experts of (share of tokens that chose the expert) · (mean probability of the expert),
    both over all tokens of all layers.  A product of two means is not the mean of the ranks' products: both means are
    made of sums over the ranks.  Backward gives each rank the gradient of that global loss with respect to its own
    logits; nothing is sent there.

    Args:
        router_logits: this rank's logits [T, E] of each layer that has a router.
        top_k: experts that a token chooses.
        group: the ranks whose tokens are counted, each rank having others; None where this rank has all of them.
        attention_mask: this rank's part of a padding mask, T elements in any shape, 0 for tokens that do not count.
        config: transport and time limit of the sum over ranks.

    Returns:
        A scalar in fp32 (fp64 for fp64 logits), equal on every rank; nan if no token counts.

    Raises:
        ValueError: for no logits, or shapes that disagree, before anything is sent.
    """
    _check_router_logits(router_logits, top_k, attention_mask)
    experts, device = router_logits[0].shape[1], router_logits[0].device
    wide = torch.float64 if router_logits[0].dtype == torch.float64 else torch.float32
    weights = None if attention_mask is None else attention_mask.reshape(-1).to(device, torch.float64)
    chosen = torch.zeros(experts, dtype=torch.float64, device=device)
    total = torch.zeros(experts, dtype=wide, device=device)
    rows = torch.zeros(1, dtype=torch.float64, device=device)
    for logits in router_logits:
        # In the logits' own type, as the stock loss has it: in 16 bits another rounding may choose other experts.
        probabilities = F.softmax(logits, dim=-1)
        experts_of_token = probabilities.topk(top_k, dim=-1).indices.reshape(-1)
        counted = torch.ones(logits.shape[0], dtype=torch.float64, device=device) if weights is None else weights
        chosen.scatter_add_(0, experts_of_token, counted.repeat_interleave(top_k))
        probabilities = probabilities.to(wide)
        total = total + (probabilities if weights is None else probabilities * weights.to(wide)[:, None]).sum(0)
        rows += counted.sum()
    total, chosen, rows = GlobalSums.apply(total, chosen, rows, group, config)
    return (experts * (chosen / rows * (total / rows)).sum()).to(wide)


def _check_router_logits(
    router_logits: Sequence[torch.Tensor], top_k: int, attention_mask: torch.Tensor | None
) -> None:
    if len(router_logits) == 0:
        raise ValueError("router_logits: expected the logits of at least one layer, got none")
    shape = router_logits[0].shape
    for logits in router_logits:
        if logits.ndim != 2 or logits.shape != shape:
            raise ValueError(
                f"router_logits: expected [tokens, experts] alike in every layer, got {list(shape)} and "
                f"{list(logits.shape)}"
            )
    if not 1 <= top_k <= shape[1]:
        raise ValueError(f"top_k: expected 1 to {shape[1]}, the number of experts, got {top_k}")
    if attention_mask is not None and attention_mask.numel() != shape[0]:
        raise ValueError(
            f"attention_mask: expected {shape[0]} elements, one for each token, got {list(attention_mask.shape)}"
        )


class GlobalSums(torch.autograd.Function):
    """Sums over ranks of local sums, in fp64 and in one message.

    Shapes: total [E], chosen [E], rows [1].

    forward: all_reduce of each
    total gradient: the gradient as it is: every rank's loss is the same global one; nothing is sent
    """

    @staticmethod
    def forward(
        ctx: Any,
        total: torch.Tensor,
        chosen: torch.Tensor,
        rows: torch.Tensor,
        group: dist.ProcessGroup | None,
        config: OverlapConfig | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the sums in fp64, equal on every rank."""
        ctx.dtype = total.dtype
        sums = torch.cat((total.double(), chosen, rows))
        if group is not None:
            sums = all_reduce(sums, group, operator="load_balancing_loss", config=config)
        totals, counts, number = sums.split((total.numel(), chosen.numel(), 1))
        totals, counts, number = totals.clone(), counts.clone(), number.clone()
        ctx.mark_non_differentiable(counts, number)
        return totals, counts, number

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        """Returns the gradient of this rank's sum of probabilities."""
        return grad_outputs[0].to(ctx.dtype), None, None, None, None
