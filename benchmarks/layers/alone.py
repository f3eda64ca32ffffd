"""The compute of one rank under each strategy without any communication: what all that is sent is measured against.

A twin of the decoder layer with local tensors of the same shapes, made of the stock model's own functions.  Where a
strategy gathers, the twin is given a tensor that is there already; where it scatters, the twin takes its own rows: both
are views.  Nothing is sent, copied or added for it, so its numbers mean nothing, and its time is the one that a
strategy would take if communication were free.  Ring attention's blocks are attended to one by one, without merging.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from benchmarks.layers.cases import LayerCase

__all__ = ["ComputeAlone"]


class _Gathered(torch.autograd.Function):
    """Stands for the gathered ``x``; gradients come back for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Tensor) -> Tensor:
        ctx.rows = x.shape[1]
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(1, 0, ctx.rows), None


class _Scattered(torch.autograd.Function):
    """This rank's rows of ``y``; the gathered gradient is there already."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: int, whole: Tensor) -> Tensor:
        ctx.save_for_backward(whole)
        return y.narrow(1, 0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (whole,) = ctx.saved_tensors
        return whole.view_as(whole), None, None


class _Layer(nn.Module):
    """One decoder layer on one rank; ``world`` ranks of seq, ``ring`` ring ranks."""

    num_key_value_groups: int
    is_causal = True

    def __init__(self, case: LayerCase, strategy: str, world: int, ring: int, config: LlamaConfig) -> None:
        super().__init__()
        self.strategy, self.world, self.ring = strategy, world, ring
        self.heads, self.kv_heads = case.heads // world, max(1, case.kv_heads // world)
        self.all_kv_heads, self.head_dim = case.kv_heads, case.hidden // case.heads
        self.num_key_value_groups = self.heads // self.kv_heads
        zero3 = strategy in ("ulysses", "tsp")
        heads, kv_heads = (case.heads, case.kv_heads) if zero3 else (self.heads, self.kv_heads)
        inner = case.intermediate if zero3 or strategy == "odysseus" else case.intermediate // world
        d, query, key = case.hidden, heads * self.head_dim, kv_heads * self.head_dim

        def weight(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)

        self.query, self.key, self.value = weight(query, d), weight(key, d), weight(key, d)
        self.output = weight(d, query)
        self.gate, self.up, self.down = weight(inner, d), weight(inner, d), weight(d, inner)
        self.norms = nn.ModuleList(LlamaRMSNorm(d, eps=config.rms_norm_eps) for _ in range(2))
        self.scaling = self.head_dim**-0.5

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], whole: Tensor) -> Tensor:
        """This rank's tokens [1, s, d]; ``whole`` [1, T, d] stands for whatever is gathered."""
        h = x + self._attention(self.norms[0](x), rotation, whole)
        return h + self._feed_forward(self.norms[1](h), whole)

    def _attention(self, x: Tensor, rotation: tuple[Tensor, Tensor], whole: Tensor) -> Tensor:
        rows = x.shape[1]
        if self.strategy in ("tp_sp", "odysseus"):
            x = _Gathered.apply(x, whole)
        query, key, value = (F.linear(x, w) for w in (self.query, self.key, self.value))
        key, value = self._repeated(key), self._repeated(value)
        query, key, value = self._heads(query, self.heads), self._heads(key), self._heads(value)
        query, key = apply_rotary_pos_emb(query, key, *rotation)
        out = self._attend(query, key, value)
        if self.strategy in ("ulysses", "tsp"):
            # Changing heads for tokens moves elements and nothing else; under tsp they stay where they are.
            return F.linear(out.reshape(1, rows, -1), self.output)
        y = F.linear(out.reshape(1, out.shape[1], -1), self.output)
        return y if self.strategy == "tp" else _Scattered.apply(y, rows, whole)

    def _repeated(self, projected: Tensor) -> Tensor:
        """Keys or values of this rank's tokens with each head as often as ranks of Ulysses share it."""
        shared = self.world // self.all_kv_heads
        if self.strategy != "ulysses" or shared < 2:
            return projected
        heads = projected.view(1, projected.shape[1], self.all_kv_heads, self.head_dim)
        return heads.repeat_interleave(shared, dim=2)

    def _heads(self, projected: Tensor, heads: int | None = None) -> Tensor:
        """[1, heads of this rank, tokens, head_dim]."""
        return projected.reshape(1, -1, heads or self.kv_heads, self.head_dim).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[1, tokens, heads, head_dim]"""
        out, _ = sdpa_attention_forward(self, query, key, value, None, scaling=self.scaling)
        # In zigzag order every other ring rank's block costs half of a square, whichever rank it comes from.
        early = slice(0, key.shape[2] // 2)
        for _ in range(self.ring - 1):
            block, _ = sdpa_attention_forward(
                self, query, key[:, :, early], value[:, :, early], None, scaling=self.scaling, is_causal=False
            )
            out = out + block
        return out

    def _feed_forward(self, x: Tensor, whole: Tensor) -> Tensor:
        rows = x.shape[1]
        if self.strategy == "tp_sp":
            x = _Gathered.apply(x, whole)
        y = F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)
        return _Scattered.apply(y, rows, whole) if self.strategy == "tp_sp" else y


class ComputeAlone(nn.Module):
    """Layers, last norm and, at the level of a model, embedding, head and cross-entropy of one rank.

    Args:
        case: what is computed.
        strategy: how it is split.
        world: ranks N of seq.
        ring: ring ranks R.
        config: of the stock model.
        dtype: of everything.
    """

    def __init__(
        self, case: LayerCase, strategy: str, world: int, ring: int, config: LlamaConfig, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.case, self.strategy = case, strategy
        if strategy == "tsp":
            world, ring = 1, ring * world  # all ranks are one ring
        # The part of a ring rank, and of this rank outside of attention.
        self.ring_tokens = case.tokens // ring
        self.tokens = self.ring_tokens if strategy == "tp" else self.ring_tokens // world
        self.layers = nn.ModuleList(_Layer(case, strategy, world, ring, config) for _ in range(case.layers))
        self.norm = LlamaRMSNorm(case.hidden, eps=config.rms_norm_eps)
        # Vocabulary-parallel under tensor parallelism: some of the scores of all tokens.
        self.cuts_vocabulary = strategy in ("tp", "tp_sp")
        if case.level == "model":
            rows = case.vocabulary // world if self.cuts_vocabulary else case.vocabulary
            self.embedding = nn.Embedding(case.vocabulary, case.hidden)
            self.head = nn.Parameter(torch.randn(rows, case.hidden) * case.hidden**-0.5)
        self.to(dtype)
        self.whole = torch.randn(1, self.ring_tokens, case.hidden).to(dtype)
        self.input = torch.randn(1, self.tokens, case.hidden).to(dtype).requires_grad_()
        self.grad = torch.randn(1, self.tokens, case.hidden).to(dtype)
        self.ids = torch.randint(case.vocabulary, (1, self.tokens))
        self.rotary = LlamaRotaryEmbedding(config)

    def step(self) -> None:
        """Forward and backward."""
        for parameter in self.parameters():
            parameter.grad = None
        self.input.grad = None
        model = self.case.level == "model"
        hidden = self.embedding(self.ids) if model else self.input
        rotation = self.rotary(self.whole, torch.arange(self.ring_tokens)[None])
        for layer in self.layers:
            hidden = layer(hidden, rotation, self.whole)
        hidden = self.norm(hidden)
        if not model:
            hidden.backward(self.grad)
            return
        if self.strategy == "tp_sp":
            hidden = _Gathered.apply(hidden, self.whole)
        scores = F.linear(hidden, self.head)[0]
        labels = torch.zeros(scores.shape[0], dtype=torch.int64)
        F.cross_entropy(scores.float(), labels).backward()
