"""Attention dropout that does not depend on how the sequence is cut, nor on who computes what.

Whether a probability is kept is a hash of (seed, batch, head, position of the query, position of the key) with heads
and positions counted over the whole model and sequence: integer arithmetic, equal on every device.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Dropout"]

# Odd multipliers of the SplitMix64 finaliser, as signed integers.
_FIRST, _SECOND, _STEP = (
    value - (1 << 64) if value >> 63 else value
    for value in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15)
)
_BITS = 31


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: each bit of the result depends on every bit of int64 ``x``."""
    # An arithmetic shift carries the sign; the mask makes it a logical one.
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of the probabilities of some queries and keys.

    Attributes:
        probability: of being dropped, 0 < p < 1.
        seed: any integer.
        first_head: which head of the whole model the first head here is.
        queries, keys: int64, positions in the whole sequence.
    """

    probability: float
    seed: int
    first_head: int
    queries: Tensor
    keys: Tensor

    def factors(self, batch: int, heads: slice, rows: slice, dtype: torch.dtype) -> Tensor:
        """[batch, heads, rows, keys]: 0 for what is dropped, 1 / (1 - p) for what is kept."""
        device = self.queries.device
        x = _mix(torch.full((1,), self.seed, dtype=torch.int64, device=device) * _STEP + _STEP)
        numbers = torch.arange(self.first_head + heads.start, self.first_head + heads.stop, device=device)
        x = _mix(x + torch.arange(batch, device=device)[:, None] * _STEP)
        x = _mix(x + numbers * _STEP)
        x = _mix(x[:, :, None] + self.queries[rows] * _STEP)
        x = _mix(x[:, :, :, None] + self.keys * _STEP)
        kept = (x & (1 << _BITS) - 1) >= round(self.probability * (1 << _BITS))
        return kept.to(dtype).mul_(1 / (1 - self.probability))
