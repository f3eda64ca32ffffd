"""Attention of this rank's heads, or of its tokens, over the whole sequence, whatever the projections communicate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch
from torch import nn

from odysseus_kernels import ops
from odysseus_kernels.attention.ring import ring_attention
from odysseus_kernels.nn.ahead import (
    GathersWeights,
    Shards,
    ahead_in_backward,
    ahead_in_forward,
    ahead_in_recomputation,
    is_linked,
    shard_of,
)
from odysseus_kernels.nn.cut import RING_LAYOUT
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.key_value import gathered_key_value
from odysseus_kernels.nn.parameters import head_parameter, local_parameter, sharded_parameter, token_parameter

__all__ = [
    "AttentionSpec",
    "FoldedAttention",
    "HeadParallelAttention",
    "SequenceMask",
    "TensorParallelAttention",
    "UlyssesAttention",
    "local_heads",
]

_NOT_PASSED: Final = None
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_SEEDS = 1 << 31


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
        query_norm, key_norm: attributes with norms over head_dim, or None.
        window: which layers have the configuration's sliding window: none, all (where it is set), or those that its
            ``layer_types`` name.
        output_dropout: attribute with the probability of a dropout after the output projection, or None.
        whole_only: why the block cannot be pipelined; empty if it can.
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
    query_norm: str | None = None
    key_norm: str | None = None
    window: Literal["none", "config", "layer_types"] = "none"
    output_dropout: str | None = None
    whole_only: str = ""


@dataclasses.dataclass(frozen=True)
class SequenceMask:
    """Who attends to whom, for the whole sequence.

    Attributes:
        masks: by kind of layer (``"full_attention"``, ``"sliding_attention"``), the mask in whatever form the attention
            function takes; None is plain causal where the function says so.  Not used by Ring and pipelined attention.
            Under ``"tsp"`` the rows of this rank's tokens, for functions that take all keys at once.
        documents: [B, L] number of the document that each token belongs to, in the sequence's natural order, or None
            where there is one document.  Used by these two.
        keys: bool [B, L], in the same order: which tokens are seen at all, or None for all.  Used by these two.
        pieces: in which attention is to be pipelined; 1: it is not.
    """

    masks: Mapping[str, Any]
    documents: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    pieces: int = 1


def local_heads(heads: int, kv_heads: int, rank: int, size: int) -> tuple[int, int, int]:
    """Heads of one rank: (query heads, first key/value head, key/value heads).

    ``size`` divides ``heads``, and divides ``kv_heads`` or is a multiple of it; then several ranks share one
    key/value head, and each of them is the head of all query heads of the rank.
    """
    if kv_heads % size == 0:
        return heads // size, rank * (kv_heads // size), kv_heads // size
    return heads // size, rank * kv_heads // size, 1


class _SequenceAttention(nn.Module, GathersWeights):
    """Self-attention whose heads are cut over the ranks; subclasses say how tokens get there and back.

    Shapes: q [B, T, heads/N, head_dim], k and v likewise with their heads, where T = L/R tokens are those of this
    rank's ring rank (T = L without a ring).
    Attention dropout draws from each rank's own generator: seed ranks differently, or heads share their masks. Under
    Ring it is seeded for each head, and ranks must be seeded alike.
    """

    sequence_group: SequenceGroup
    attention_spec: AttentionSpec
    config: Any
    layer_idx: int
    scaling: float
    attention_dropout: float

    def setup_sequence(self) -> None:
        """Sets what the stock module derives from head counts, for this rank's heads."""
        spec, group = self.attention_spec, self.sequence_group
        heads, _, kv_heads = local_heads(spec.heads, spec.kv_heads, group.rank, group.size)
        self.num_key_value_groups = heads // kv_heads

    @property
    def mask_kind(self) -> str:
        """Key of this layer's mask in :class:`SequenceMask`."""
        if self.attention_spec.window == "layer_types":
            return self.config.layer_types[self.layer_idx]
        windowed = self.attention_spec.window == "config" and self.config.sliding_window is not None
        return "sliding_attention" if windowed else "full_attention"

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, itself included; None: all before it.

        Stock models read it where they make masks, from the configuration at the time of the call. Flash-attention
        needs no masks and takes what the module is called with, which some families copy when they are built.
        """
        if self.config._attn_implementation == "flash_attention_2":
            return self._passed_window()
        return self.config.sliding_window if self.mask_kind == "sliding_attention" else None

    def _passed_window(self) -> int | None:
        if self.attention_spec.window == "none":
            return None
        source = self if hasattr(self, "sliding_window") else self.config
        return getattr(source, "sliding_window", None)

    def _project(self, hidden_states: torch.Tensor) -> Heads:
        """Queries, keys and values [B, T, n] of this rank's heads."""
        raise NotImplementedError

    def _output(self, out: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of the output projection of ``out`` [B, T, n]."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: object | None = None,
        sequence_mask: SequenceMask | None = _NOT_PASSED,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends over the whole sequence.

        Args:
            hidden_states: this rank's tokens, [B, s, d].
            position_embeddings: cos and sin of the T tokens of this ring rank, [1 or B, T, head_dim].
            attention_mask: not used: ``sequence_mask`` takes its place.
            past_key_values: must be None.
            sequence_mask: who attends to whom.
            **kwargs: passed to the attention function.

        Returns:
            This rank's tokens [B, s, d], and what the attention function returned as weights.

        Raises:
            RuntimeError: if the layers above did not pass ``sequence_mask`` on.
            ValueError: if the position embeddings are not those of the whole sequence.
        """
        spec, group = self.attention_spec, self.sequence_group
        if sequence_mask is None or past_key_values is not None:
            raise RuntimeError(
                "attention was called without the mask of the whole sequence, or with a cache: call the parallelized "
                "model, not its layers, and without past_key_values"
            )
        batch, tokens = hidden_states.shape[:2]
        parts = group.slices
        cos, sin = position_embeddings
        if group.zigzag_size > 1:
            # Under Ring one more position may follow the rank's own, for rotations that depend on the last of all.
            cos, sin = cos[..., : tokens * parts, :], sin[..., : tokens * parts, :]
        if cos.shape[-2] != tokens * parts:
            raise ValueError(
                f"position_embeddings: expected {tokens * parts} positions ({parts} ranks x {tokens} tokens), got "
                f"{cos.shape[-2]}"
            )
        query, key, value = (y.unflatten(-1, (-1, spec.head_dim)) for y in self._project(hidden_states))
        if spec.query_norm is not None and spec.key_norm is not None:
            query, key = getattr(self, spec.query_norm)(query), getattr(self, spec.key_norm)(key)
        query, key, value = (y.transpose(1, 2) for y in (query, key, value))
        query, key = spec.rotary(query, key, cos, sin)
        out, weights = self._attend(query, key, value, sequence_mask, kwargs)
        result = self._output(out.reshape(batch, tokens * parts, -1))
        return self._dropped(result), weights

    def _dropped(self, result: torch.Tensor) -> torch.Tensor:
        name = self.attention_spec.output_dropout
        return result if name is None else nn.functional.dropout(result, getattr(self, name), self.training)

    def _seeded_dropout(self) -> tuple[float, int]:
        """Probability and seed.  Drawn where activation checkpointing restores the generator: recomputed alike."""
        dropout = self.attention_dropout if self.training else 0.0
        return dropout, int(torch.randint(_SEEDS, ())) if dropout else 0

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: SequenceMask, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output [B, T, heads, head_dim] and weights."""
        group = self.sequence_group
        if group.zigzag is not None and group.zigzag_size > 1:
            first = 0 if group.folded else group.rank * query.shape[1]
            dropout, seed = self._seeded_dropout()
            out = ring_attention(
                query,
                key,
                value,
                group=group.zigzag,
                layout=RING_LAYOUT,
                documents=mask.documents,
                key_mask=mask.keys,
                window=self.window,
                scale=self.scaling,
                dropout=dropout,
                dropout_seed=seed,
                first_head=first,
                kernel=self.config._attn_implementation,
                config=group.config,
            )
            return out.transpose(1, 2), None
        dropout = self.attention_dropout if self.training else 0.0
        return self._attend_at_once(query, key, value, mask, dropout, kwargs)

    def _attend_at_once(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: SequenceMask,
        dropout: float,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same by the model's attention function, which is given all keys that the queries may see."""
        spec = self.attention_spec
        if spec.window != "none":
            kwargs = {**kwargs, "sliding_window": self._passed_window()}
        chosen = mask.masks[self.mask_kind]
        return spec.attend(self, query, key, value, chosen, dropout=dropout, scaling=self.scaling, **kwargs)

    def _layers(self) -> tuple[Any, Any, Any]:
        spec = self.attention_spec
        return getattr(self, spec.query), getattr(self, spec.key), getattr(self, spec.value)

    def _head_sharded(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...] | None]:
        """Column-parallel query, key and value weights, and their biases or None.

        With fewer key/value heads than ranks theirs are replicated, and a rank uses one head's rows.
        """
        spec, group = self.attention_spec, self.sequence_group
        query, *others = self._layers()
        weights, biases = [sharded_parameter(query.weight, group)], [sharded_parameter(query.bias, group)]
        _, first, count = local_heads(spec.heads, spec.kv_heads, group.rank, group.size)
        rows = (first * spec.head_dim, count * spec.head_dim)
        for layer in others:
            for parts, parameter in ((weights, layer.weight), (biases, layer.bias)):
                if spec.kv_heads % group.size:
                    parts.append(head_parameter(parameter, group, rows))
                else:
                    parts.append(sharded_parameter(parameter, group))
        return tuple(w for w in weights if w is not None), None if all(b is None for b in biases) else tuple(biases)


class HeadParallelAttention(_SequenceAttention):
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
        sequence_mask: SequenceMask | None = _NOT_PASSED,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As :meth:`_SequenceAttention.forward`."""
        if sequence_mask is None or sequence_mask.pieces == 1 or past_key_values is not None:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, sequence_mask, **kwargs
            )
        spec, group = self.attention_spec, self.sequence_group
        output = getattr(self, spec.output)
        output_weight, output_bias = sharded_parameter(output.weight, group), sharded_parameter(output.bias, group)
        assert output_weight is not None
        weights, biases = self._head_sharded()
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
        return query, key, value

    def _output(self, out: torch.Tensor) -> torch.Tensor:
        group, layer = self.sequence_group, getattr(self, self.attention_spec.output)
        weight, bias = sharded_parameter(layer.weight, group), sharded_parameter(layer.bias, group)
        assert weight is not None
        return ops.linear_reduce_scatter(
            out, weight, bias, group=group.group, config=group.config, prefetch=ahead_in_forward(self)
        )


class TensorParallelAttention(_SequenceAttention):
    """Tokens on all ranks, heads cut over them, followed by an all-reduce (classical TP).

    Input and output [B, T, d], equal on all ranks of seq; weights as in :class:`HeadParallelAttention`.
    """

    def _project(self, hidden_states: torch.Tensor) -> Heads:
        group = self.sequence_group
        weights, biases = self._head_sharded()
        query, key, value = ops.column_parallel_linear(
            hidden_states, weights, biases, group=group.group, config=group.config
        )
        return query, key, value

    def _output(self, out: torch.Tensor) -> torch.Tensor:
        group, layer = self.sequence_group, getattr(self, self.attention_spec.output)
        weight, bias = sharded_parameter(layer.weight, group), token_parameter(layer.bias, group)
        assert weight is not None
        return ops.linear_all_reduce(out, weight, bias, group=group.group, config=group.config)


class UlyssesAttention(_SequenceAttention):
    """Tokens cut over the ranks, exchanged for heads by an all-to-all, with ZeRO-3 weights (DeepSpeed-Ulysses).

    Input and output [B, s, d] with s = T/N. Rows of the query, key and value weights and columns of the output weight
    are cut over all ranks.
    """

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
            prefetch=self._output_shard() if is_linked(self) else None,
            prefetch_backward=ahead_in_backward(self, hidden_states),
            prefetch_recomputed=ahead_in_recomputation(self, hidden_states),
        )
        return query, key, value

    def _output(self, out: torch.Tensor) -> torch.Tensor:
        group, layer = self.sequence_group, getattr(self, self.attention_spec.output)
        self.note_backward(out)
        return ops.all_to_all_linear(
            out,
            local_parameter(layer.weight),
            local_parameter(layer.bias),
            group=group.group,
            zero3_group=group.everyone,
            config=group.config,
            prefetch=ahead_in_forward(self),
            prefetch_backward=self._shared(biases=False) if is_linked(self) and self._input_needed else None,
        )

    def first_gathered(self) -> Shards:
        return self._shared(biases=True)

    def first_gathered_in_backward(self) -> Shards:
        return self._output_shard() if self.gathers_in_backward else None

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
        shard = shard_of(getattr(self, self.attention_spec.output))
        return None if shard is None else (shard,)


class FoldedAttention(_SequenceAttention):
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
        query, key, value = self._layers()
        # Each product names the weights that travel next. Backward goes the other way: value, key, query.
        return (
            self._zero3(query, hidden_states, following=key),
            self._zero3(key, hidden_states, following=value, preceding=query),
            self._zero3(value, hidden_states, preceding=key),
        )

    def _output(self, out: torch.Tensor) -> torch.Tensor:
        return self._zero3(getattr(self, self.attention_spec.output), out)

    def _zero3(self, layer: Any, x: torch.Tensor, *, following: Any = None, preceding: Any = None) -> torch.Tensor:
        group = self.sequence_group
        return ops.zero3_linear(
            x,
            local_parameter(layer.weight),
            local_parameter(layer.bias),
            group=group.everyone,
            config=group.config,
            prefetch=None if following is None else local_parameter(following.weight),
            prefetch_backward=None if preceding is None else local_parameter(preceding.weight),
        )

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: SequenceMask, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.sequence_group.zigzag_size == 1 or not mask.masks:
            return super()._attend(query, key, value, mask, kwargs)
        key, value = gathered_key_value(key, value, self.sequence_group)
        dropout = self.attention_dropout if self.training else 0.0
        return self._attend_at_once(query, key, value, mask, dropout, kwargs)
