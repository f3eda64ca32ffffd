"""Which ranks of a ring look at which ranks' keys, as far as sizes alone tell: a causal mask, a window, the layout.

What documents hide besides is known with the batch only (``attention/layout.py``).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

from odysseus_kernels.planner.ledger import Ledger

__all__ = [
    "TILE",
    "Pairs",
    "Part",
    "RingPeers",
    "add_gathered_keys",
    "add_ring_attention",
    "block_count",
    "blocks",
    "busiest_peers",
    "joined_parts",
    "parts_in_sight",
    "ring_peers",
]

TILE = 512
"""Tokens that are looked at together where it is decided who sees what.  No tile crosses from a block into another."""

Pairs = tuple[tuple[bool, ...], ...]
"""``pairs[r][s]``: whether rank r takes what rank s has; every rank takes its own."""


class Part(NamedTuple):
    """Tokens ``start`` to ``stop`` of those of every rank, and who sees some of them.

    Attributes:
        start, stop: in the order in which a rank has its tokens.
        pairs: ``pairs[r][s]``: whether a query of rank r sees one of these keys of rank s.
    """

    start: int
    stop: int
    pairs: Pairs

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class RingPeers(NamedTuple):
    """To how many others a rank sends its tokens; parts of its tokens count as parts.

    Attributes:
        served: ranks that get its keys and values: 3/2 where one gets all and another one half of them.
        visited: ranks whose keys and values it gets, and to which it sends their gradients.
    """

    served: Fraction | int
    visited: Fraction | int


def block_count(world: int, layout: str) -> int:
    """Blocks into which the sequence is cut."""
    return 2 * world if layout == "zigzag" and world > 1 else world


def blocks(rank: int, world: int, layout: str) -> tuple[int, ...]:
    """The blocks that ``rank`` holds, in its order."""
    return (rank, 2 * world - 1 - rank) if block_count(world, layout) > world else (rank,)


@functools.lru_cache(maxsize=256)  # asked for again in every call
def parts_in_sight(world: int, rows: int, layout: str, *, causal: bool, window: int | None) -> tuple[Part, ...]:
    """What ``world`` ranks of ``rows`` tokens each see of each other: parts that hold all tokens, in order.

    Between n queries and m keys in one piece each all distances from the smallest to the largest occur, so that this
    is exact, for each tile of keys.  Where no window hides anything all tokens are one part, though fewer ranks see the
    late ones.
    """
    size = rows * world // block_count(world, layout)
    held = [blocks(rank, world, layout) for rank in range(world)]
    if window is not None and window >= rows * world:
        window = None
    # In every block the same tile is the first that queries one block further on see.
    first = 0 if window is None or size == 0 else (1 - window) % size // TILE * TILE
    cuts = (0, first, size) if first else (0, size)

    def sees(query_block: int, key_block: int, start: int, stop: int) -> bool:
        nearest = (query_block - key_block) * size - stop + 1
        farthest = (query_block - key_block + 1) * size - 1 - start
        return (not causal or farthest >= 0) and (window is None or nearest < window)

    def table(*keys: tuple[int, int, int]) -> bytes:
        """``keys``: which of a rank's blocks, and from where to where in it."""
        return bytes(
            rank == other
            or any(sees(query, held[other][block], start, stop) for query in own for block, start, stop in keys)
            for rank, own in enumerate(held)
            for other in range(world)
        )

    numbers = range(len(held[0]))
    if window is None:
        return joined_parts(world, [(0, rows, table(*((block, 0, size) for block in numbers)))])
    return joined_parts(
        world,
        (
            (block * size + start, block * size + stop, table((block, start, stop)))
            for block in numbers
            for start, stop in itertools.pairwise(cuts)
        ),
    )


def joined_parts(world: int, parts: Iterable[tuple[int, int, bytes]], most: int | None = None) -> tuple[Part, ...]:
    """Neighbours that the same ranks see as one; then those that cost least, until there are at most ``most``.

    What that costs: tokens that travel to ranks that see only others of the joined part.

    Args:
        world: ranks of the ring.
        parts: (start, stop, pairs), the pairs row by row, a byte for each, 0 or 1.
        most: of the result; None: as many as differ.
    """
    found: list[tuple[int, int, int]] = []
    for start, stop, table in parts:
        bits = int.from_bytes(table, "big")
        if found and found[-1][2] == bits:
            start = found.pop()[0]
        found.append((start, stop, bits))

    def cost(index: int) -> int:
        """Of joining a part and the next one."""
        (a, b, ones), (c, d, others) = found[index : index + 2]
        together = (ones | others).bit_count()
        return (b - a) * (together - ones.bit_count()) + (d - c) * (together - others.bit_count())

    costs = [cost(index) for index in range(len(found) - 1)]
    while costs and ((most is not None and len(found) > most) or min(costs) == 0):
        index = costs.index(min(costs))
        (start, _, ones), (_, stop, others) = found[index : index + 2]
        found[index : index + 2] = [(start, stop, ones | others)]
        del costs[index]
        for near in (index - 1, index):
            if 0 <= near < len(costs):
                costs[near] = cost(near)
    return tuple(Part(start, stop, _table(world, bits)) for start, stop, bits in found)


def _table(world: int, bits: int) -> Pairs:
    flat = bits.to_bytes(world * world, "big")
    return tuple(tuple(map(bool, flat[rank * world : (rank + 1) * world])) for rank in range(world))


def ring_peers(parts: Sequence[Part], rank: int) -> RingPeers:
    """To how many others rank ``rank`` sends under ``parts``, which hold all of its tokens."""
    rows = parts[-1].stop
    served = sum((part.stop - part.start) * (sum(row[rank] for row in part.pairs) - 1) for part in parts)
    visited = sum((part.stop - part.start) * (sum(part.pairs[rank]) - 1) for part in parts)
    return RingPeers(Fraction(served, rows or 1), Fraction(visited, rows or 1))


def busiest_peers(world: int, length: int, window: int | None, element_size: int = 2) -> RingPeers:
    """Those of the rank that sends most where sequences of ``length`` tokens are cut in zigzag order.

    Without a window everybody sees all.  With one, a block is seen by blocks after it: all of it up to some distance,
    its end one block further on, then nothing.  A rank with two blocks after it sees by the farther one only what it
    sees by the nearer.  So rank s sends its early block |r-s| blocks on to ranks r > s, its late one as far to r < s,
    and its early one 2R-1-r-s blocks on to the late ones of r < s; and gets from others what they send so.  How many of
    these are within reach is linear in s between a few places: the most is at one of them, of ten thousand ranks, too.
    (Of :func:`parts_in_sight` it is the rank that sends most bytes, forward and backward.)
    """
    blocks_of_all = block_count(world, "zigzag")
    size = length // blocks_of_all
    if world == 1 or window is None or size == 0 or window >= size * blocks_of_all:
        return RingPeers(world - 1, world - 1)
    whole = (window - 1) // size  # blocks further on that see all of a block
    first = (whole + 1) * size - window + 1  # the first token that the next one sees, if any
    end = size - first // TILE * TILE if first < size else 0
    last = 2 * world - 1

    def count(rank: int, reach: int) -> tuple[int, int]:
        """Blocks of one token that ``rank`` would send, and get, if those up to ``reach`` further on saw a block."""
        near = min(reach, rank) + min(reach, world - 1 - rank)
        across = last - rank - reach  # the first rank whose late block is within reach of the rank's early one
        return near + max(0, rank - max(0, across)), near + max(0, world - max(rank + 1, across))

    def peers(rank: int) -> RingPeers:
        within, beyond = count(rank, whole), count(rank, whole + 1)
        tokens = (size * inner + end * (outer - inner) for inner, outer in zip(within, beyond, strict=True))
        return RingPeers(*(Fraction(number, 2 * size) for number in tokens))

    places = {0, world - 1}
    for reach in (whole, whole + 1):
        turns = (reach, world - 1 - reach, last - reach, (last - reach) // 2, (last - 1 - reach) // 2)
        places.update(turn + step for turn in turns for step in (-1, 0, 1))

    def sent(peers: RingPeers) -> Fraction | int:
        return 2 * element_size * peers.served + max(4, element_size) * peers.visited

    return max((peers(rank) for rank in sorted(places) if 0 <= rank < world), key=lambda one: (sent(one), one))


def add_ring_attention(ledger: Ledger, peers: RingPeers, keys_and_values: int) -> None:
    """Ring attention of a rank with ``keys_and_values`` elements, which it sends to ``peers``."""
    gradients = Ledger(max(4, ledger.size))  # shares of its queries, in the accumulator's type
    for into, phase, others in (
        (ledger, "forward", peers.served),
        (ledger, "backward", peers.served),
        (gradients, "backward", peers.visited),
    ):
        if others:
            into.shard(phase, "ring_attention", "send_recv", 2, int(others * keys_and_values))
    ledger.bytes.update(gradients.bytes)


def add_gathered_keys(ledger: Ledger, ranks: int, keys_and_values: int) -> None:
    """Attention that takes the keys of all ``ranks`` at once: each has ``keys_and_values`` elements of them."""
    ledger.shard("forward", "gathered_key_value", "all_gather", ranks, keys_and_values)
    gradients = Ledger(max(4, ledger.size))
    gradients.shard("backward", "gathered_key_value", "reduce_scatter", ranks, keys_and_values)
    ledger.bytes.update(gradients.bytes)
