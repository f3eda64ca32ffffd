"""Attention of this rank's heads, or of its tokens, over the whole sequence, whatever the projections communicate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch
from torch import nn

from odysseus_kernels.attention.ring import ring_attention
from odysseus_kernels.nn.adapters import adapters_of, add_column_parallel, base_of, row_parallel_product
from odysseus_kernels.nn.ahead import GathersWeights
from odysseus_kernels.nn.cut import RING_LAYOUT
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.parameters import head_parameter, sharded_parameter

__all__ = [
    "NOT_PASSED",
    "AttentionSpec",
    "Heads",
    "SequenceAttention",
    "SequenceMask",
    "local_heads",
]

NOT_PASSED: Final = None
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
        head_groups: the same under Ulysses, of each rank's heads.
    """

    masks: Mapping[str, Any]
    documents: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    pieces: int = 1
    head_groups: int = 1


def local_heads(heads: int, kv_heads: int, rank: int, size: int) -> tuple[int, int, int]:
    """Heads of one rank: (query heads, first key/value head, key/value heads).

    ``size`` divides ``heads``, and divides ``kv_heads`` or is a multiple of it; then several ranks share one
    key/value head, and each of them is the head of all query heads of the rank.
    """
    if kv_heads % size == 0:
        return heads // size, rank * (kv_heads // size), kv_heads // size
    return heads // size, rank * kv_heads // size, 1


class SequenceAttention(nn.Module, GathersWeights):
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
        sequence_mask: SequenceMask | None = NOT_PASSED,
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

    def _projections(self) -> tuple[Any, Any, Any]:
        """Query, key and value projections, with adapters that are wrapped around them."""
        spec = self.attention_spec
        return getattr(self, spec.query), getattr(self, spec.key), getattr(self, spec.value)

    def _layers(self) -> tuple[Any, Any, Any]:
        """The linear layers in them."""
        query, key, value = self._projections()
        return base_of(query), base_of(key), base_of(value)

    def _rows(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(first, number) of the features of this rank's heads in query, key and value projections."""
        spec, group = self.attention_spec, self.sequence_group
        heads, first, count = local_heads(spec.heads, spec.kv_heads, group.rank, group.size)
        width = heads * spec.head_dim
        others = (first * spec.head_dim, count * spec.head_dim)
        return (group.rank * width, width), others, others

    def _adapted(self, projected: Heads, hidden_states: torch.Tensor) -> Heads:
        """Queries, keys and values of this rank's heads, and what adapters add to them."""
        query, key, value = add_column_parallel(
            projected, self._projections(), hidden_states, self._rows(), self.sequence_group
        )
        return query, key, value

    def _output_adapted(self) -> bool:
        return bool(adapters_of(getattr(self, self.attention_spec.output)))

    def _output_with_adapters(self, out: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``project(out)`` and what adapters add to it.

        Theirs comes first: the projection is the call after which the next layer's weights are sent ahead.
        """
        layer = getattr(self, self.attention_spec.output)
        added = row_parallel_product(layer, out, self._rows()[0], self.sequence_group)
        result = project(out)
        return result if added is None else (result + added).to(result.dtype)

    def _head_sharded(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...] | None]:
        """Column-parallel query, key and value weights, and their biases or None.

        With fewer key/value heads than ranks theirs are replicated, and a rank uses one head's rows.
        """
        spec, group = self.attention_spec, self.sequence_group
        query, *others = self._layers()
        weights, biases = [sharded_parameter(query.weight, group)], [sharded_parameter(query.bias, group)]
        _, rows, _ = self._rows()
        for layer in others:
            for parts, parameter in ((weights, layer.weight), (biases, layer.bias)):
                if spec.kv_heads % group.size:
                    parts.append(head_parameter(parameter, group, rows))
                else:
                    parts.append(sharded_parameter(parameter, group))
        return tuple(w for w in weights if w is not None), None if all(b is None for b in biases) else tuple(biases)
