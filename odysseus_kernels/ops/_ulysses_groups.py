"""How a block of Ulysses' attention is cut by heads: groups that travel together, and units that are computed at once.

A group of a rank's heads are some of its key/value heads with the query heads that use them.  While one group travels,
attention of another one is computed, a unit between any two transfers.  Nothing here communicates or computes.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from odysseus_kernels.attention.prefix import PrefixAttention
from odysseus_kernels.attention.visits import Visits

__all__ = ["HeadAttention", "HeadGroups", "Unit"]

# Queries that a unit has at least: what a piece of them costs over all at once is measured in planner/pipeline.py.
_LEAST_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Unit:
    """Attention of some queries of some heads.

    Attributes:
        heads, kv_heads: of this rank.
        rows: of the sequence.
        first, last: whether these are the first or the last rows of these heads.
    """

    heads: slice
    kv_heads: slice
    rows: slice
    first: bool
    last: bool


@dataclasses.dataclass(frozen=True)
class HeadGroups:
    """Which of a rank's heads are in which group.

    Attributes:
        count: number of groups; divides the key/value heads.
        head_dim: width of a head.
        queries, keys: features of this rank's query and key heads.
        world: ranks.
    """

    count: int
    head_dim: int
    queries: int
    keys: int
    world: int

    @property
    def widths(self) -> tuple[int, int, int]:
        """Features of a group's queries, keys and values."""
        keys = self.keys // self.count
        return self.queries // self.count, keys, keys

    def features(self, group: int) -> tuple[slice, slice, slice]:
        """Where among this rank's those of ``group`` are: of queries, keys and values."""
        query, key, value = (slice(group * width, (group + 1) * width) for width in self.widths)
        return query, key, value

    def first_heads(self, group: int) -> tuple[int, int, int]:
        """Which of this rank's heads those of ``group`` begin with: of queries, keys and values."""
        query, key, value = (group * width // self.head_dim for width in self.widths)
        return query, key, value

    def units(self, group: int, length: int) -> tuple[Unit, ...]:
        """What attention of ``group`` over ``length`` tokens consists of: one unit for each rank, where that pays.

        Key/value heads are shared out; where there are fewer than ranks, the queries of each are cut, too, so that all
        parts cost the same: under a causal mask the n-th query has n keys.
        """
        shared, heads = self.queries // self.keys, self.keys // self.count // self.head_dim
        begin, parts = group * heads, min(heads, self.world)
        cuts = max(1, min(-(-self.world // heads), length // _LEAST_ROWS))
        edges = [round(length * math.sqrt(cut / cuts)) for cut in range(cuts + 1)]
        found = []
        for part in range(parts):
            start, stop = begin + heads * part // parts, begin + heads * (part + 1) // parts
            for cut in range(cuts):
                rows = slice(edges[cut], edges[cut + 1])
                used = slice(start * shared, stop * shared)
                found.append(Unit(used, slice(start, stop), rows, cut == 0, cut == cuts - 1))
        return tuple(found)

    def split(self, tensor: Tensor) -> Tensor:
        """[B, n, H * D] as [B, n, H, D]."""
        return tensor.unflatten(2, (-1, self.head_dim))

    def heads(self, tensor: Tensor) -> Tensor:
        """[B, n, H * D] as [B, H, n, D]."""
        return self.split(tensor).transpose(1, 2)


class HeadAttention:
    """Causal attention of whole sequences, of some of a rank's heads at a time."""

    def __init__(self, settings: Visits, where: Tensor) -> None:
        self._settings = settings
        self._attention = PrefixAttention(settings, where)
        self._where = where

    def of(self, heads: slice) -> PrefixAttention:
        """The same for ``heads`` of this rank; dropout knows them by their numbers in the whole model."""
        if not self._settings.dropout:
            return self._attention
        first = self._settings.first_head + heads.start
        return PrefixAttention(dataclasses.replace(self._settings, first_head=first), self._where)
