"""Which meshes a model can have on so many ranks, under which strategy, and why not under the others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from odysseus_kernels.planner.formulas import STRATEGIES
from odysseus_kernels.planner.planning.models import ModelSizes

__all__ = ["ZERO3_ATTENTION", "Split", "divisors", "largest_seq", "possible_splits", "why_not"]

ZERO3_ATTENTION = ("ulysses", "tsp")
"""Strategies whose attention weights are ZeRO-3."""


@dataclasses.dataclass(frozen=True)
class Split:
    """A strategy on a mesh, its ranks consecutive along seq, then ring, then dp.

    Attributes:
        strategy: one of ``formulas.STRATEGIES``.
        seq, ring, dp: ranks of each dimension of the mesh.
    """

    strategy: str
    seq: int
    ring: int = 1
    dp: int = 1

    @property
    def everyone(self) -> int:
        """Ranks that share a sequence."""
        return self.seq * self.ring

    @property
    def name(self) -> str:
        """As in ``odysseus seq 8 x ring 2 x dp 4``."""
        parts = [f"seq {self.seq}"]
        parts += [f"{name} {size}" for name, size in (("ring", self.ring), ("dp", self.dp)) if size > 1]
        return f"{self.strategy} {' x '.join(parts)}"

    def padded(self, length: int, pieces: int = 1) -> int:
        """Tokens to which a sequence of ``length`` is padded: what :func:`~odysseus_kernels.shard_sequence` does.

        Under ``"tp"`` also to a multiple of the ranks of seq, which the formulas ask for and the package does not.
        """
        ring, slices = (self.everyone, 1) if self.strategy == "tsp" else (self.ring, self.seq)
        parts = slices * pieces
        multiple = parts if ring == 1 else math.lcm(2 * ring, ring * parts)
        return -(-length // multiple) * multiple


def divisors(number: int) -> list[int]:
    """All divisors of ``number``, in order."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]


def why_not(model: ModelSizes, split: Split) -> str:
    """Why the package would refuse the split; empty if it would not.

    These are the conditions of ``strategies/``, and that an expert's bytes have a formula.
    """
    shape, seq, everyone = model.layer, split.seq, split.everyone
    zero3_network = split.strategy not in ("tp", "tp_sp")
    if split.strategy != "tsp":
        if shape.heads % seq:
            return f"heads: {seq} ranks of seq do not divide {shape.heads} query heads"
        if shape.kv_heads % seq and seq % shape.kv_heads:
            return f"heads: {seq} ranks of seq neither divide {shape.kv_heads} key/value heads nor are a multiple"
    if split.strategy in ZERO3_ATTENTION:
        for what, width in (("query", shape.query), ("key/value", shape.key_value)):
            if width % everyone:
                return f"sizes: {everyone} ranks do not divide the {width} rows of a ZeRO-3 {what} weight"
    if model.experts:
        if split.strategy == "tp":
            return "experts: no formula says what they send under tp"
        if model.experts % everyone:
            return f"experts: {everyone} ranks do not divide {model.experts} experts, of which each keeps whole ones"
    elif zero3_network:
        if shape.intermediate % everyone:
            return f"sizes: {everyone} ranks do not divide the intermediate size {shape.intermediate}"
    elif shape.intermediate % seq:
        return f"sizes: {seq} ranks of seq do not divide the intermediate size {shape.intermediate}"
    if (zero3_network or model.experts) and shape.hidden % everyone:
        return f"sizes: {everyone} ranks do not divide the hidden size {shape.hidden}"
    return ""


def largest_seq(model: ModelSizes, strategy: str, limit: int) -> int:
    """The most ranks of seq, of at most ``limit``, that the model's heads allow under a strategy."""
    if strategy == "tsp":
        return limit
    fitting = [n for n in divisors(model.layer.heads) if n <= limit]
    kv_heads = model.layer.kv_heads
    return max(n for n in fitting if kv_heads % n == 0 or n % kv_heads == 0)


def possible_splits(
    model: ModelSizes, world_size: int, batch: int, strategies: tuple[str, ...] = STRATEGIES
) -> Iterator[tuple[Split, str]]:
    """All splits of ``world_size`` ranks into divisors, with why each is refused (empty if it is not).

    Sequences are dealt out whole, so dp divides the batch; seq divides the heads (``"tsp"``: seq takes all ranks that
    share a sequence, one ring whatever the mesh).  The heads' divisors are few, which keeps this short at any size.
    """
    for dp in divisors(math.gcd(batch, world_size)):
        sharing = world_size // dp
        for strategy in strategies:
            sizes = [sharing] if strategy == "tsp" else divisors(math.gcd(model.layer.heads, sharing))
            for seq in sizes:
                split = Split(strategy, seq, sharing // seq, dp)
                yield split, why_not(model, split)
