"""Sizes of a decoder layer, as formulas of bytes and memory take them."""

from __future__ import annotations

import dataclasses

__all__ = ["LayerShape"]


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer with two norms.

    Attributes:
        hidden: width of the residual stream, d.
        intermediate: width inside the feed-forward network, i.
        heads, kv_heads, head_dim: of attention.
        gated: whether the feed-forward network has a gate (m = 3).
        qkv_bias, out_bias, mlp_bias: which projections have biases.
        norm_bias: whether norms have a bias.
        qk_norm: whether queries and keys have norms over ``head_dim``.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def inner(self) -> int:
        """Number of projections to the intermediate size."""
        return 2 if self.gated else 1

    def used_key_value(self, world: int) -> int:
        """Width of all ranks' key heads together: more than ``key_value`` where ranks share a head."""
        return max(self.kv_heads, world) * self.head_dim
