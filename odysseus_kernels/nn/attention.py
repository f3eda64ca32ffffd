"""Attention on whole sequences with this rank's heads, between two fused operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from odysseus_kernels import ops
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.parameters import local_parameter, replicated_parameter

__all__ = ["AttentionSpec", "HeadParallelAttention", "local_heads"]

_NOT_PASSED: Final = object()


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What the layer must know about a family's attention module.

    Attributes:
        query, key, value, output: attributes that hold the projections.
        heads: query heads of the whole model.
        kv_heads: key/value heads of the whole model.
        head_dim: width of a head.
        rotary: ``rotary(q, k, cos, sin) -> (q, k)`` with q and k [B, heads, L, head_dim].
        attend: ``attend(module, q, k, v, mask, dropout=, scaling=, **kwargs) -> (out, weights)`` with q
            [B, heads, L, head_dim], k and v [B, kv_heads, L, head_dim] and out [B, L, heads, head_dim].
    """

    query: str
    key: str
    value: str
    output: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def local_heads(heads: int, kv_heads: int, rank: int, size: int) -> tuple[int, int, int]:
    """Heads of one rank: (query heads, first key/value head, key/value heads).

    ``size`` divides ``heads``, and divides ``kv_heads`` or is a multiple of it; then several ranks share one
    key/value head, and each of them is the head of all query heads of the rank.
    """
    if kv_heads % size == 0:
        return heads // size, rank * (kv_heads // size), kv_heads // size
    return heads // size, rank * kv_heads // size, 1


class HeadParallelAttention(nn.Module):
    """Self-attention: tokens cut over the ranks outside, heads cut over the ranks inside.

    Shapes: input and output [B, s, d] with s = L/N; q [B, L, heads/N, head_dim]; k and v likewise with their heads.
    Query, key and value weights are column-parallel (Shard(0)), the output weight is row-parallel (Shard(1)); key and
    value weights are replicated where there are fewer key/value heads than ranks, and each rank uses one head's rows.
    Attention dropout draws from each rank's own generator: seed ranks differently, or heads share their masks.
    """

    sequence_group: SequenceGroup
    attention_spec: AttentionSpec

    def setup_sequence(self) -> None:
        """Sets what the stock module derives from head counts, for this rank's heads."""
        spec, group = self.attention_spec, self.sequence_group
        heads, _, kv_heads = local_heads(spec.heads, spec.kv_heads, group.rank, group.size)
        self.num_key_value_groups = heads // kv_heads

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: object | None = None,
        sequence_mask: Any = _NOT_PASSED,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends over the whole sequence.

        Args:
            hidden_states: this rank's tokens, [B, s, d].
            position_embeddings: cos and sin of the whole sequence, [1 or B, L, head_dim].
            attention_mask: not used: ``sequence_mask`` takes its place.
            past_key_values: must be None.
            sequence_mask: the mask of the whole sequence in whatever form the attention function takes; None is
                plain causal where the function says so.
            **kwargs: passed to the attention function.

        Returns:
            This rank's tokens [B, s, d], and what the attention function returned as weights.

        Raises:
            RuntimeError: if the layers above did not pass ``sequence_mask`` on.
            ValueError: if the position embeddings are not those of the whole sequence.
        """
        spec, group = self.attention_spec, self.sequence_group
        if sequence_mask is _NOT_PASSED or past_key_values is not None:
            raise RuntimeError(
                "attention was called without the mask of the whole sequence, or with a cache: call the parallelized "
                "model, not its layers, and without past_key_values"
            )
        batch, length = hidden_states.shape[0], hidden_states.shape[1] * group.size
        cos, sin = position_embeddings
        if cos.shape[-2] != length:
            raise ValueError(
                f"position_embeddings: expected {length} positions ({group.size} ranks x {hidden_states.shape[1]} "
                f"tokens), got {cos.shape[-2]}"
            )

        weights, biases = self._projection_parameters()
        projected = ops.all_gather_linear(hidden_states, weights, biases, group=group.group, config=group.config)
        query, key, value = (y.view(batch, length, -1, spec.head_dim).transpose(1, 2) for y in projected)
        query, key = spec.rotary(query, key, cos, sin)
        out, attention_weights = spec.attend(
            self,
            query,
            key,
            value,
            sequence_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        out = out.reshape(batch, length, -1)
        layer = getattr(self, spec.output)
        weight, bias = local_parameter(layer.weight), local_parameter(layer.bias)
        return ops.linear_reduce_scatter(out, weight, bias, group=group.group, config=group.config), attention_weights

    def _projection_parameters(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...] | None]:
        """This rank's query, key and value weights, and their biases or None."""
        spec, group = self.attention_spec, self.sequence_group
        query, key, value = (getattr(self, name) for name in (spec.query, spec.key, spec.value))
        if spec.kv_heads % group.size == 0:
            layers = (query, key, value)
            weights = tuple(local_parameter(layer.weight) for layer in layers)
            biases = tuple(local_parameter(layer.bias) for layer in layers)
        else:
            _, first, count = local_heads(spec.heads, spec.kv_heads, group.rank, group.size)
            rows = (first * spec.head_dim, count * spec.head_dim)
            weights = (
                local_parameter(query.weight),
                *(replicated_parameter(layer.weight, group, rows) for layer in (key, value)),
            )
            biases = (
                local_parameter(query.bias),
                *(replicated_parameter(layer.bias, group, rows) for layer in (key, value)),
            )
        return weights, None if all(bias is None for bias in biases) else biases
