"""How ring ranks cut a sequence, and what queries of one rank see of another's keys.  Pure functions.

zigzag: the sequence is cut into 2R blocks; rank i holds blocks i and 2R-1-i, in this order.  Under a causal mask every
rank then has the same work with every other: a late block sees much and an early one little.
contiguous: R blocks, rank i holds block i.  One rank holds the whole sequence, as a single block, in either layout.

A rank's blocks are in ascending order, and so are its positions; its own queries see its own keys by an ordinary
causal mask.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from odysseus_kernels.planner.pipeline import piece_shares
from odysseus_kernels.planner.ring import TILE, Part, block_count, blocks, joined_parts, parts_in_sight

__all__ = [
    "Layout",
    "Piece",
    "block_count",
    "blocks",
    "check_layout",
    "inverse",
    "pair_kind",
    "padding_multiple",
    "piece_rows",
    "pieces",
    "positions",
    "prefix_pieces",
    "seen_parts",
    "sides",
    "striped_positions",
    "visible",
    "with_key_mask",
]

Layout = Literal["zigzag", "contiguous"]
Kind = Literal["full", "causal", "masked"]

# Masks are made for this many keys at most.
_MASK_KEYS = 4096
# Into how many parts a rank's keys are cut: each is a product, or several, of its own.
_PARTS = 8
_EMPTY, _FULL, _MASKED = 0, 1, 2
_PIECE_UNIT = 64


@dataclasses.dataclass(frozen=True)
class Piece:
    """Queries and keys that are computed together: ranges of a rank's own tokens.

    Attributes:
        queries, keys: of the rank that computes, and of the rank whose keys it visits; where it has a part of these,
            counted from the part's first.
        kind: ``"full"``: every query sees every key; ``"causal"``: query n sees keys 0 to n of the piece, which is
            square; ``"masked"``: as :func:`visible` says.
    """

    queries: slice
    keys: slice
    kind: Kind


def check_layout(layout: str) -> None:
    """Raises ValueError unless ``layout`` is one of :data:`Layout`."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout: expected one of {get_args(Layout)}, got {layout!r}")


def padding_multiple(world: int, layout: str) -> int:
    """The length of the whole sequence must divide by this."""
    check_layout(layout)
    return block_count(world, layout)


def positions(rank: int, world: int, length: int, layout: str, device: torch.device | None = None) -> Tensor:
    """int64 [length / world]: where in the sequence of ``length`` tokens each of ``rank``'s tokens lies.

    ``x[..., positions(...)]`` is what the rank holds of a sequence x.

    Raises:
        ValueError: ``length`` does not divide by :func:`padding_multiple`.
    """
    multiple = padding_multiple(world, layout)
    if length % multiple:
        raise ValueError(
            f"expected a length that divides by {multiple} ({world} ring ranks, {layout}), got {length}: pad it to "
            f"{-(-length // multiple) * multiple}"
        )
    size = length // multiple
    parts = [torch.arange(b * size, (b + 1) * size, device=device) for b in blocks(rank, world, layout)]
    return torch.cat(parts)


def inverse(world: int, length: int, layout: str, device: torch.device | None = None) -> Tensor:
    """int64 [length]: where in all ranks' tokens, one rank's after another's, each position lies.

    ``torch.cat(shards)[inverse(...)]`` is the sequence in natural order.
    """
    order = torch.cat([positions(rank, world, length, layout, device) for rank in range(world)])
    return torch.empty_like(order).scatter_(0, order, torch.arange(length, device=device))


def pair_kind(query_block: int, key_block: int, causal: bool) -> Literal["full", "diagonal", "empty"]:
    """What queries of one block see of the keys of another, documents and windows aside."""
    if not causal or key_block < query_block:
        return "full"
    return "diagonal" if key_block == query_block else "empty"


def visible(
    query_positions: Tensor,
    key_positions: Tensor,
    query_documents: Tensor | None,
    key_documents: Tensor | None,
    *,
    causal: bool,
    window: int | None,
) -> Tensor:
    """bool [B or 1, queries, keys]: which keys each query sees, from positions [n] and document ids [B, n]."""
    distance = query_positions[:, None] - key_positions[None, :]
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        seen &= distance < window
    seen = seen[None]
    if query_documents is not None and key_documents is not None:
        seen = seen & (query_documents[:, :, None] == key_documents[:, None, :])
    return seen


def sides(documents: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Ids [B, L] that queries look for, and ids that keys have, of ``documents`` [B, L] or [2, B, L]; or no ids."""
    if documents is None or documents.ndim == 2:
        return documents, documents
    return documents[0], documents[1]


def with_key_mask(documents: Tensor | None, key_mask: Tensor | None) -> Tensor | None:
    """``documents``, or [2, B, L]: ids that queries look for, and ids that keys have; masked keys have no query's."""
    if key_mask is None:
        return documents
    queries = key_mask.new_zeros(key_mask.shape, dtype=torch.int64) if documents is None else documents.to(torch.int64)
    return torch.stack((queries, torch.where(key_mask.bool(), queries, queries.min() - 1)))


def pieces(
    rank: int,
    visited: int,
    world: int,
    rows: int,
    layout: str,
    *,
    causal: bool,
    window: int | None = None,
    documents: Tensor | None = None,
    keys: slice | None = None,
) -> list[Piece]:
    """What ``rank`` computes with the keys of ``visited``: disjoint pieces that hold every visible pair.

    Args:
        rank, visited, world: of the ring.
        rows: tokens of each rank.
        layout: see the module.
        causal, window: as in :func:`~odysseus_kernels.ring_attention`.
        documents: as :func:`sides` takes them, on the host.
        keys: which of ``visited``'s tokens, one of :func:`seen_parts`; None is all.
    """
    whole = keys is None or keys == slice(0, rows)
    if documents is None and window is None and whole:
        return _joined(rank, visited, world, rows, layout, causal)
    bounds = _tile_bounds(rows, len(blocks(rank, world, layout)))
    key_bounds = bounds if keys is None else [one for one in bounds if keys.start <= one[0] and one[1] <= keys.stop]
    first_key = 0 if keys is None else keys.start
    query_ids, key_ids = sides(documents)
    query_tiles = _Tiles.of(bounds, positions(rank, world, rows * world, layout), query_ids)
    key_tiles = _Tiles.of(key_bounds, positions(visited, world, rows * world, layout), key_ids)
    found = []
    for (start, stop), row in zip(bounds, _tile_states(query_tiles, key_tiles, causal, window).tolist(), strict=True):
        for first, last, state in _runs(row, key_bounds):
            taken = slice(first - first_key, last - first_key)
            found.append(Piece(slice(start, stop), taken, "full" if state == _FULL else "masked"))
    return found


def seen_parts(
    world: int, rows: int, layout: str, *, causal: bool, window: int | None = None, documents: Tensor | None = None
) -> tuple[Part, ...]:
    """The tokens of a rank, in parts, and which of ``world`` ranks look at each; arguments as those of :func:`pieces`.

    Where it says False, :func:`pieces` has none.  It follows from what all ranks are given alike, so that all come to
    the same.  Parts are tiles; neighbours that the same ranks look at are one, and of many those that differ least are.
    Of documents the smallest and largest id of each tile are compared.  A rank always looks at its own.
    """
    if documents is None or world == 1:
        return parts_in_sight(world, rows, layout, causal=causal, window=window)
    bounds = _tile_bounds(rows, len(blocks(0, world, layout)))
    where = [positions(rank, world, rows * world, layout) for rank in range(world)]
    bounds_of_all = [(rank * rows + start, rank * rows + stop) for rank in range(world) for start, stop in bounds]
    query_ids, key_ids = sides(documents)
    keys = _Tiles.of(bounds_of_all, torch.cat(where), key_ids)
    everyone = keys if query_ids is key_ids else _Tiles.of(bounds_of_all, torch.cat(where), query_ids)
    looked_at = torch.empty(len(bounds), world, world, dtype=torch.bool)
    for rank in range(world):
        queries = everyone.only(slice(rank * len(bounds), (rank + 1) * len(bounds)))
        states = _tile_states(queries, keys, causal, window)
        looked_at[:, rank] = (states != _EMPTY).any(0).view(world, -1).T
        looked_at[:, rank, rank] = True
    tables = looked_at.numpy()
    found = ((start, stop, table.tobytes()) for (start, stop), table in zip(bounds, tables, strict=True))
    return joined_parts(world, found, _PARTS)


def prefix_pieces(
    start: int, stop: int, where: Tensor, *, window: int | None = None, documents: Tensor | None = None
) -> list[Piece]:
    """What causal queries ``start`` to ``stop`` of some tokens compute with keys 0 to ``stop``: disjoint pieces.

    Queries are counted from ``start``.  Keys that no query sees are in no piece.

    Args:
        start, stop: of the queries among the tokens.
        where: int64 [at least stop], ascending: where in the sequence the tokens lie; on the host.
        window, documents: as in :func:`pieces`.
    """
    if documents is None and window is None:
        own = Piece(slice(0, stop - start), slice(start, stop), "causal")
        return [own, Piece(slice(0, stop - start), slice(0, start), "full")] if start else [own]
    rows = [(first, min(first + TILE, stop)) for first in range(start, stop, TILE)]
    columns = [(first, min(first + TILE, stop)) for first in range(0, stop, TILE)]
    queries, keys = (
        _Tiles.of(bounds, where, ids) for bounds, ids in zip((rows, columns), sides(documents), strict=True)
    )
    found = []
    for (first, last), row in zip(rows, _tile_states(queries, keys, True, window).tolist(), strict=True):
        for begin, end, state in _runs(row, columns):
            kind: Kind = "full" if state == _FULL else "masked"
            found.append(Piece(slice(first - start, last - start), slice(begin, end), kind))
    return found


def piece_rows(rows: int, pieces: int) -> tuple[int, ...]:
    """How many of a rank's ``rows`` tokens each of ``pieces`` has: in the sizes of ``planner.pipeline.piece_shares``.

    Together all, and each at least one.

    Raises:
        ValueError: fewer rows than pieces.
    """
    if not 1 <= pieces <= rows:
        raise ValueError(f"expected 1 to {rows} pieces of {rows} tokens, got {pieces}")
    # Products and attention work on tiles of so many rows.
    unit = _PIECE_UNIT if rows % _PIECE_UNIT == 0 and rows // _PIECE_UNIT >= pieces else 1
    units, shares = rows // unit, piece_shares(pieces)
    total = sum(shares)
    ends = [(2 * units * sum(shares[:index]) + total) // (2 * total) for index in range(pieces + 1)]
    ends = [max(index, min(units - pieces + index, end)) for index, end in enumerate(ends)]
    return tuple(unit * (stop - start) for start, stop in itertools.pairwise(ends))


def striped_positions(rank: int, world: int, length: int, pieces: int, device: torch.device | None = None) -> Tensor:
    """int64 [length / world]: where the tokens of ``rank`` lie, of ``length`` tokens that are striped.

    They are cut into ``pieces``, and each piece into ``world`` stripes of :func:`piece_rows`, of which rank r holds the
    r-th: a piece is a part of every rank's tokens, in the order of the ranks.  One piece is a contiguous cut.

    Raises:
        ValueError: ``length`` does not divide by ``world``, or there are fewer tokens than pieces on each rank.
    """
    if length % world:
        raise ValueError(f"expected a length that divides by {world} ranks, got {length}")
    sizes = piece_rows(length // world, pieces)
    everyone = torch.arange(length, device=device).split([world * size for size in sizes])
    return torch.cat([piece.view(world, -1)[rank] for piece in everyone])


def _joined(rank: int, visited: int, world: int, rows: int, layout: str, causal: bool) -> list[Piece]:
    """Pairs of blocks without documents and windows: always a rectangle, or the triangle of a rank's own tokens."""
    if not causal:
        return [Piece(slice(0, rows), slice(0, rows), "full")]
    if rank == visited:
        return [Piece(slice(0, rows), slice(0, rows), "causal")]
    own, other = blocks(rank, world, layout), blocks(visited, world, layout)
    size = rows // len(own)
    full = [(i, j) for i, q in enumerate(own) for j, k in enumerate(other) if pair_kind(q, k, causal) == "full"]
    if not full:
        return []
    (top, left), (bottom, right) = min(full), max(full)
    assert len(full) == (bottom - top + 1) * (right - left + 1), "what is seen of another rank is a rectangle"
    return [Piece(slice(top * size, (bottom + 1) * size), slice(left * size, (right + 1) * size), "full")]


def _tile_bounds(rows: int, count: int) -> list[tuple[int, int]]:
    """Tiles of a rank's tokens; none crosses from one block into another."""
    size = rows // count
    return [
        (start, min(start + TILE, (block + 1) * size))
        for block in range(count)
        for start in range(block * size, (block + 1) * size, TILE)
    ]


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """First and last position [tiles] and smallest and largest document id [B, tiles] of each tile."""

    first: Tensor
    last: Tensor
    smallest: Tensor | None = None
    largest: Tensor | None = None

    @staticmethod
    def of(bounds: list[tuple[int, int]], where: Tensor, documents: Tensor | None) -> _Tiles:
        first = torch.stack([where[start] for start, _ in bounds])
        last = torch.stack([where[stop - 1] for _, stop in bounds])
        if documents is None:
            return _Tiles(first, last)
        ends = [documents[:, where[start:stop]].aminmax(dim=1) for start, stop in bounds]
        return _Tiles(first, last, torch.stack([e.min for e in ends], 1), torch.stack([e.max for e in ends], 1))

    def only(self, tiles: slice) -> _Tiles:
        smallest, largest = (ids if ids is None else ids[:, tiles] for ids in (self.smallest, self.largest))
        return _Tiles(self.first[tiles], self.last[tiles], smallest, largest)


def _tile_states(queries: _Tiles, keys: _Tiles, causal: bool, window: int | None) -> Tensor:
    """int8 [query tiles, key tiles]: empty, full, or in need of a mask.  Never empty where a pair is visible."""
    nearest = queries.first[:, None] - keys.last[None, :]  # the smallest distance of a query from a key before it
    farthest = queries.last[:, None] - keys.first[None, :]
    empty, full = torch.zeros_like(nearest, dtype=torch.bool), torch.ones_like(nearest, dtype=torch.bool)
    if causal:
        empty |= farthest < 0
        full &= nearest >= 0
    if window is not None:
        empty |= nearest >= window
        full &= farthest < window
    if queries.smallest is not None and queries.largest is not None:
        assert keys.smallest is not None and keys.largest is not None
        apart = (queries.largest[:, :, None] < keys.smallest[:, None, :]) | (
            queries.smallest[:, :, None] > keys.largest[:, None, :]
        )
        single = (queries.smallest == queries.largest)[:, :, None] & (keys.smallest == keys.largest)[:, None, :]
        empty |= apart.all(0)
        full &= (single & (queries.smallest[:, :, None] == keys.smallest[:, None, :])).all(0)
    states = torch.where(full, _FULL, _MASKED).to(torch.int8)
    return states.masked_fill_(empty, _EMPTY)


def _runs(row: list[int], bounds: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(first key, last key + 1, state) of neighbouring tiles in one state, empty ones left out."""
    index = 0
    while index < len(row):
        state, begin = row[index], index
        while index < len(row) and row[index] == state:
            if state == _MASKED and bounds[index][1] - bounds[begin][0] > _MASK_KEYS:
                break
            index += 1
        if state != _EMPTY:
            yield bounds[begin][0], bounds[index - 1][1], state
