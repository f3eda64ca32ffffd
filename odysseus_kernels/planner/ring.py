"""Which ranks of a ring look at which ranks' keys, as far as sizes alone tell: a causal mask, a window, the layout.

What documents hide besides is known with the batch only (``attention/layout.py``).
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

from odysseus_kernels.planner.ledger import Ledger

__all__ = [
    "Pairs",
    "RingPeers",
    "add_gathered_keys",
    "add_ring_attention",
    "block_count",
    "blocks",
    "busiest_peers",
    "pairs_in_sight",
    "ring_peers",
]

Pairs = tuple[tuple[bool, ...], ...]
"""``pairs[r][s]``: whether a query of rank r sees a key of rank s."""


class RingPeers(NamedTuple):
    """How many others a rank sends to.

    Attributes:
        served: ranks that get its keys and values.
        visited: ranks whose keys and values it gets, and to which it sends their gradients.
    """

    served: int
    visited: int


def block_count(world: int, layout: str) -> int:
    """Blocks into which the sequence is cut."""
    return 2 * world if layout == "zigzag" and world > 1 else world


def blocks(rank: int, world: int, layout: str) -> tuple[int, ...]:
    """The blocks that ``rank`` holds, in its order."""
    return (rank, 2 * world - 1 - rank) if block_count(world, layout) > world else (rank,)


@functools.lru_cache(maxsize=256)  # asked for again in every call
def pairs_in_sight(world: int, rows: int, layout: str, *, causal: bool, window: int | None) -> Pairs:
    """What ``world`` ranks of ``rows`` tokens each see of each other.

    Between two blocks of n tokens all distances from (a-b-1)n+1 to (a-b+1)n-1 occur, so that this is exact.
    """
    size = rows * world // block_count(world, layout)
    held = [blocks(rank, world, layout) for rank in range(world)]

    def sees(query_block: int, key_block: int) -> bool:
        nearest = (query_block - key_block - 1) * size + 1
        farthest = (query_block - key_block + 1) * size - 1
        return (not causal or farthest >= 0) and (window is None or nearest < window)

    return tuple(
        tuple(
            rank == other or any(itertools.starmap(sees, itertools.product(own, keys)))
            for other, keys in enumerate(held)
        )
        for rank, own in enumerate(held)
    )


def ring_peers(pairs: Pairs, rank: int) -> RingPeers:
    """How many others rank ``rank`` sends to under ``pairs``."""
    return RingPeers(sum(row[rank] for row in pairs) - 1, sum(pairs[rank]) - 1)


def busiest_peers(world: int, length: int, window: int | None) -> RingPeers:
    """The most that any rank sends to where sequences of ``length`` tokens are cut in zigzag order.

    A block of n tokens sees itself and as many blocks before it as the window reaches into.  So rank r sees the ranks
    up to that many beside it, on both sides, for its late block goes through theirs in the other direction; and is
    seen by them.  Without a window everybody sees all.  (The pairs of :func:`pairs_in_sight`, counted without making
    them: of ten thousand ranks they are too many.)
    """
    size = length // world * world // block_count(world, "zigzag")
    if window is None or size == 0:
        return RingPeers(world - 1, world - 1)
    most = min(world - 1, 2 * ((window - 2) // size + 1))
    return RingPeers(most, most)


def add_ring_attention(ledger: Ledger, peers: RingPeers, keys_and_values: int) -> None:
    """Ring attention of a rank with ``keys_and_values`` elements, which it sends to ``peers``."""
    for phase in ("forward", "backward"):
        ledger.shard(phase, "ring_attention", "send_recv", peers.served + 1, keys_and_values)
    gradients = Ledger(max(4, ledger.size))  # shares of its queries, in the accumulator's type
    gradients.shard("backward", "ring_attention", "send_recv", peers.visited + 1, keys_and_values)
    ledger.bytes.update(gradients.bytes)


def add_gathered_keys(ledger: Ledger, ranks: int, keys_and_values: int) -> None:
    """Attention that takes the keys of all ``ranks`` at once: each has ``keys_and_values`` elements of them."""
    ledger.shard("forward", "gathered_key_value", "all_gather", ranks, keys_and_values)
    gradients = Ledger(max(4, ledger.size))
    gradients.shard("backward", "gathered_key_value", "reduce_scatter", ranks, keys_and_values)
    ledger.bytes.update(gradients.bytes)
