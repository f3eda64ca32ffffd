"""Attention whose weights are cut by heads: TP, TP-SP and Odysseus; pipelined where the batch is striped."""

from __future__ import annotations

from typing import Any

import torch

from odysseus_kernels import ops
from odysseus_kernels.nn.adapters import base_of, effective_bias, effective_weight
from odysseus_kernels.nn.ahead import (
    ahead_in_backward,
    ahead_in_forward,
)
from odysseus_kernels.nn.attention import NOT_PASSED, Heads, SequenceAttention, SequenceMask
from odysseus_kernels.nn.parameters import head_parameter, sharded_parameter, token_parameter

__all__ = ["HeadParallelAttention", "TensorParallelAttention"]


class HeadParallelAttention(SequenceAttention):
    """Tokens cut over the ranks outside, heads inside, between an all-gather and a reduce-scatter (TP-SP, Odysseus).

    Input and output [B, s, d] with s = T/N. Query, key and value weights are column-parallel (rows over seq), the
    output weight is row-parallel (columns over seq).  Where the batch was cut into pieces, the block is pipelined.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: object | None = None,
        sequence_mask: SequenceMask | None = NOT_PASSED,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As :meth:`SequenceAttention.forward`."""
        if sequence_mask is None or sequence_mask.pieces == 1 or past_key_values is not None:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, sequence_mask, **kwargs
            )
        spec, group = self.attention_spec, self.sequence_group
        output_weight, output_bias = self._effective_output()
        weights, biases = self._effective_heads()
        norms, eps = None, 0.0
        if spec.query_norm is not None and spec.key_norm is not None:
            modules: list[Any] = [getattr(self, spec.query_norm), getattr(self, spec.key_norm)]
            query, key = (head_parameter(module.weight, group) for module in modules)
            assert query is not None and key is not None
            norms, eps = (query, key), modules[0].variance_epsilon
        # One more position may follow the rank's own, for rotations that depend on the last of all.
        cos, sin = position_embeddings
        length = hidden_states.shape[1] * group.size
        dropout, seed = self._seeded_dropout()
        result = ops.pipelined_attention(
            hidden_states,
            weights,
            output_weight,
            biases,
            output_bias,
            group=group.group,
            ring=group.ring,
            head_dim=spec.head_dim,
            pieces=sequence_mask.pieces,
            rotation=(cos[..., :length, :], sin[..., :length, :]),
            head_norms=norms,
            norm_eps=eps,
            documents=sequence_mask.documents,
            key_mask=sequence_mask.keys,
            window=self.window,
            scale=self.scaling,
            dropout=dropout,
            dropout_seed=seed,
            first_head=group.rank * (weights[0].shape[0] // spec.head_dim),
            kernel=self.config._attn_implementation,
            config=group.config,
            prefetch=ahead_in_forward(self),
            prefetch_backward=ahead_in_backward(self, hidden_states),
        )
        return self._dropped(result), None

    def _effective_heads(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...] | None]:
        """As :meth:`_head_sharded`, with adapters in the weights: the pipelined block is one operator."""
        group, rows = self.sequence_group, self._rows()
        weights, biases = self._head_sharded()
        adapted = list(zip(self._projections(), rows, strict=True))
        weights = tuple(
            effective_weight(weight, layer, group, rows=own)
            for weight, (layer, own) in zip(weights, adapted, strict=True)
        )
        found = tuple(
            effective_bias(bias, layer, group, own)
            for bias, (layer, own) in zip(biases or (None, None, None), adapted, strict=True)
        )
        return weights, None if all(bias is None for bias in found) else found

    def _effective_output(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        group, layer = self.sequence_group, getattr(self, self.attention_spec.output)
        base = base_of(layer)
        weight = sharded_parameter(base.weight, group)
        assert weight is not None
        weight = effective_weight(weight, layer, group, columns=self._rows()[0])
        return weight, effective_bias(sharded_parameter(base.bias, group), layer, group)

    def _project(self, hidden_states: torch.Tensor) -> Heads:
        group = self.sequence_group
        weights, biases = self._head_sharded()
        query, key, value = ops.all_gather_linear(
            hidden_states,
            weights,
            biases,
            group=group.group,
            config=group.config,
            prefetch_backward=ahead_in_backward(self, hidden_states),
        )
        return self._adapted((query, key, value), hidden_states)

    def _output(self, out: torch.Tensor) -> torch.Tensor:
        group, layer = self.sequence_group, base_of(getattr(self, self.attention_spec.output))
        weight, bias = sharded_parameter(layer.weight, group), sharded_parameter(layer.bias, group)
        assert weight is not None

        def project(out: torch.Tensor) -> torch.Tensor:
            return ops.linear_reduce_scatter(
                out, weight, bias, group=group.group, config=group.config, prefetch=ahead_in_forward(self)
            )

        return self._output_with_adapters(out, project)


class TensorParallelAttention(SequenceAttention):
    """Tokens on all ranks, heads cut over them, followed by an all-reduce (classical TP).

    Input and output [B, T, d], equal on all ranks of seq; weights as in :class:`HeadParallelAttention`.
    """

    def _project(self, hidden_states: torch.Tensor) -> Heads:
        group = self.sequence_group
        weights, biases = self._head_sharded()
        query, key, value = ops.column_parallel_linear(
            hidden_states, weights, biases, group=group.group, config=group.config
        )
        return self._adapted((query, key, value), hidden_states)

    def _output(self, out: torch.Tensor) -> torch.Tensor:
        group, layer = self.sequence_group, base_of(getattr(self, self.attention_spec.output))
        weight, bias = sharded_parameter(layer.weight, group), token_parameter(layer.bias, group)
        assert weight is not None

        def project(out: torch.Tensor) -> torch.Tensor:
            return ops.linear_all_reduce(out, weight, bias, group=group.group, config=group.config)

        return self._output_with_adapters(out, project)
