"""Attention whose weights are cut over all ranks by ZeRO-3: Ulysses and TSP."""

from __future__ import annotations

from typing import Any

import torch

from odysseus_kernels import ops
from odysseus_kernels.nn.adapters import adapters_of, add_own_tokens, base_of, effective_bias, effective_weight
from odysseus_kernels.nn.ahead import (
    Shards,
    ahead_in_backward,
    ahead_in_forward,
    ahead_in_recomputation,
    is_linked,
    shard_of,
)
from odysseus_kernels.nn.attention import NOT_PASSED, Heads, SequenceAttention, SequenceMask
from odysseus_kernels.nn.key_value import gathered_key_value
from odysseus_kernels.nn.parameters import head_parameter, local_parameter

__all__ = ["FoldedAttention", "UlyssesAttention"]


class UlyssesAttention(SequenceAttention):
    """Tokens cut over the ranks, exchanged for heads by an all-to-all, with ZeRO-3 weights (DeepSpeed-Ulysses).

    Input and output [B, s, d] with s = T/N. Rows of the query, key and value weights and columns of the output weight
    are cut over all ranks.  Where the mask says so the block is one operator, pipelined by groups of heads; its dropout
    is then that of Ring attention, and ranks must be seeded alike.

    Attributes:
        head_groups: of the latest forward of the model: what the module before may send ahead depends on it.
    """

    head_groups = 1

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
        if sequence_mask is None or sequence_mask.head_groups == 1 or past_key_values is not None:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, sequence_mask, **kwargs
            )
        spec, group = self.attention_spec, self.sequence_group
        self.note_changes()
        self.note_backward(hidden_states)
        weights, biases = self._effective_heads()
        output_weight, output_bias = self._effective_output()
        norms, eps = None, 0.0
        if spec.query_norm is not None and spec.key_norm is not None:
            modules: list[Any] = [getattr(self, spec.query_norm), getattr(self, spec.key_norm)]
            query, key = (head_parameter(module.weight, group) for module in modules)
            assert query is not None and key is not None
            norms, eps = (query, key), modules[0].variance_epsilon
        dropout, seed = self._seeded_dropout()
        result = ops.pipelined_ulysses(
            hidden_states,
            weights,
            output_weight,
            biases,
            output_bias,
            group=group.group,
            head_dim=spec.head_dim,
            head_groups=sequence_mask.head_groups,
            rotation=position_embeddings,
            head_norms=norms,
            norm_eps=eps,
            documents=sequence_mask.documents,
            key_mask=sequence_mask.keys,
            window=self.window,
            scale=self.scaling,
            dropout=dropout,
            dropout_seed=seed,
            kernel=self.config._attn_implementation,
            config=group.config,
            prefetch=ahead_in_forward(self),
            prefetch_backward=ahead_in_backward(self, hidden_states),
            prefetch_recomputed=ahead_in_recomputation(self, hidden_states),
        )
        return self._dropped(result), None

    def _effective_heads(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...] | None]:
        """This rank's shards of the first weights and biases, with adapters in them."""
        group, weights, biases = self.sequence_group, [], []
        for layer, rows in zip(self._projections(), self._rows(), strict=True):
            base = base_of(layer)
            weights.append(effective_weight(local_parameter(base.weight), layer, group, rows=rows))
            biases.append(effective_bias(local_parameter(base.bias), layer, group, rows))
        return tuple(weights), None if all(bias is None for bias in biases) else tuple(biases)

    def _effective_output(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same of the output projection, whose bias is cut by its features."""
        group, layer = self.sequence_group, getattr(self, self.attention_spec.output)
        base = base_of(layer)
        weight = effective_weight(local_parameter(base.weight), layer, group, columns=self._rows()[0])
        features = weight.shape[0] // group.size
        return weight, effective_bias(local_parameter(base.bias), layer, group, (group.rank * features, features))

    def _project(self, hidden_states: torch.Tensor) -> Heads:
        spec, group, layers = self.attention_spec, self.sequence_group, self._layers()
        self.note_changes()
        self._input_needed = hidden_states.requires_grad
        weights = tuple(local_parameter(layer.weight) for layer in layers)
        biases = tuple(local_parameter(layer.bias) for layer in layers)
        query, key, value = ops.linear_all_to_all(
            hidden_states,
            weights,
            None if all(bias is None for bias in biases) else biases,
            heads=(spec.heads, spec.kv_heads, spec.kv_heads),
            group=group.group,
            zero3_group=group.everyone,
            config=group.config,
            # An adapter of the output communicates before it: what was sent ahead would be dropped.
            prefetch=self._output_shard() if is_linked(self) and not self._output_adapted() else None,
            prefetch_backward=ahead_in_backward(self, hidden_states),
            prefetch_recomputed=ahead_in_recomputation(self, hidden_states),
        )
        # Theirs comes last, so that in backward it comes before the call that sends ahead for the layer before.
        return self._adapted((query, key, value), hidden_states)

    def _output(self, out: torch.Tensor) -> torch.Tensor:
        group, layer = self.sequence_group, base_of(getattr(self, self.attention_spec.output))
        self.note_backward(out)
        # Adapters communicate between this projection's backward and that of the first ones.
        follows = is_linked(self) and self._input_needed and not self._communicating_adapters()

        def project(out: torch.Tensor) -> torch.Tensor:
            return ops.all_to_all_linear(
                out,
                local_parameter(layer.weight),
                local_parameter(layer.bias),
                group=group.group,
                zero3_group=group.everyone,
                config=group.config,
                prefetch=ahead_in_forward(self),
                prefetch_backward=self._shared(biases=False) if follows else None,
            )

        return self._output_with_adapters(out, project)

    def _communicating_adapters(self) -> bool:
        return self._output_adapted() or any(adapters_of(layer) for layer in self._projections())

    def first_gathered(self) -> Shards:
        shared = self._shared(biases=True)
        if self.head_groups == 1 or shared is None:
            return shared
        if any(adapters_of(layer) for layer in self._projections()):
            return None  # what is gathered is made in the call, with adapters in it
        return tuple(shard[: shard.shape[0] // self.head_groups] for shard in shared)

    def first_gathered_in_backward(self) -> Shards:
        # In groups of heads columns of the weight are copied out of it, in the call.
        return self._output_shard() if self.gathers_in_backward and self.head_groups == 1 else None

    def _shared(self, *, biases: bool) -> Shards:
        """What the exchange of the first product shares; in backward no biases.

        Key and value weights with fewer heads than ranks are gathered whole, by calls of their own.
        """
        group = self.sequence_group
        layers = self._layers()[: 1 if self.attention_spec.kv_heads % group.size else None]
        found = [shard_of(layer) for layer in layers]
        found += [shard_of(layer, "bias") for layer in layers if biases and layer.bias is not None]
        present = tuple(shard for shard in found if shard is not None)
        return present if len(present) == len(found) else None

    def _output_shard(self) -> Shards:
        shard = shard_of(base_of(getattr(self, self.attention_spec.output)))
        return None if shard is None else (shard,)


class FoldedAttention(SequenceAttention):
    """Tokens cut over all ranks in zigzag order, all heads on each, with ZeRO-3 weights (TSP).

    Input and output [B, s, d] with s = L/W. Rows of all weights are cut over all ranks. Keys and values of all ranks
    come to this rank's queries: one rank's after another's by Ring attention, or at once for eager attention, which
    gives no log-sum-exp by which parts could be merged. Dropout is that of Ring attention; eager attention draws from
    each rank's own generator.
    """

    def setup_sequence(self) -> None:
        """All heads, as the stock module has them."""
        self.num_key_value_groups = self.attention_spec.heads // self.attention_spec.kv_heads

    def _project(self, hidden_states: torch.Tensor) -> Heads:
        query, key, value = self._projections()
        # Each product names the weights that travel next. Backward goes the other way: value, key, query.
        return (
            self._zero3(query, hidden_states, following=key),
            self._zero3(key, hidden_states, following=value, preceding=query),
            self._zero3(value, hidden_states, preceding=key),
        )

    def _output(self, out: torch.Tensor) -> torch.Tensor:
        return self._zero3(getattr(self, self.attention_spec.output), out)

    def _zero3(self, layer: Any, x: torch.Tensor, *, following: Any = None, preceding: Any = None) -> torch.Tensor:
        group, base = self.sequence_group, base_of(layer)
        y = ops.zero3_linear(
            x,
            local_parameter(base.weight),
            local_parameter(base.bias),
            group=group.everyone,
            config=group.config,
            prefetch=None if following is None else local_parameter(base_of(following).weight),
            prefetch_backward=None if preceding is None else local_parameter(base_of(preceding).weight),
        )
        return add_own_tokens(y, layer, x, group)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: SequenceMask, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.sequence_group.zigzag_size == 1 or not mask.masks:
            return super()._attend(query, key, value, mask, kwargs)
        key, value = gathered_key_value(key, value, self.sequence_group)
        dropout = self.attention_dropout if self.training else 0.0
        return self._attend_at_once(query, key, value, mask, dropout, kwargs)
