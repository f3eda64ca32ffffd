"""Layouts and pieces against their definition, without ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odysseus_kernels.attention import layout as layouts
from odysseus_kernels.attention.layout import (
    block_count,
    blocks,
    inverse,
    padding_multiple,
    pair_kind,
    piece_rows,
    pieces,
    positions,
    visible,
)

WORLDS = st.integers(1, 9)
LAYOUTS = st.sampled_from(("zigzag", "contiguous"))


@given(world=WORLDS, layout=LAYOUTS, size=st.integers(1, 7))
def test_every_token_has_one_place(world: int, layout: str, size: int) -> None:
    length = size * padding_multiple(world, layout)
    x = torch.randn(length)
    shards = [x[positions(rank, world, length, layout)] for rank in range(world)]
    assert {len(shard) for shard in shards} == {length // world}
    assert torch.equal(torch.cat(shards)[inverse(world, length, layout)], x)
    for rank in range(world):
        assert (positions(rank, world, length, layout).diff() > 0).all()


@given(world=st.integers(2, 9))
def test_zigzag_blocks(world: int) -> None:
    assert [blocks(rank, world, "zigzag") for rank in range(world)] == [
        (rank, 2 * world - 1 - rank) for rank in range(world)
    ]
    assert padding_multiple(world, "zigzag") == 2 * world
    assert padding_multiple(world, "contiguous") == world


def test_one_rank_is_not_cut() -> None:
    assert block_count(1, "zigzag") == padding_multiple(1, "zigzag") == 1
    assert torch.equal(positions(0, 1, 5, "zigzag"), torch.arange(5))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="divides by 6 .*got 20: pad it to 24"):
        positions(0, 3, 20, "zigzag")
    with pytest.raises(ValueError, match="'striped'"):
        padding_multiple(2, "striped")


@given(rows=st.integers(1, 5000), count=st.integers(1, 64))
def test_pieces_of_a_rank_are_small_at_both_ends(rows: int, count: int) -> None:
    if count > rows:
        with pytest.raises(ValueError, match=f"1 to {rows} pieces of {rows} tokens, got {count}"):
            piece_rows(rows, count)
        return
    found = piece_rows(rows, count)
    assert len(found) == count and sum(found) == rows and min(found) >= 1
    if rows % 64 == 0 and rows >= 64 * count:
        assert all(size % 64 == 0 for size in found)


def test_sizes_of_pieces() -> None:
    assert piece_rows(4096, 8) == (128, 512, 768, 768, 768, 640, 384, 128)
    assert piece_rows(20_000, 8) == (625, 2500, 3750, 3750, 3750, 3125, 1875, 625)
    assert piece_rows(8, 8) == (1,) * 8
    assert piece_rows(6, 4) == (1, 2, 2, 1)
    assert piece_rows(7, 1) == (7,)


def test_pairs_of_blocks() -> None:
    assert [pair_kind(1, key, True) for key in range(3)] == ["full", "diagonal", "empty"]
    assert [pair_kind(1, key, False) for key in range(3)] == ["full"] * 3


@given(world=st.integers(2, 8), size=st.integers(1, 5))
def test_causal_work_under_zigzag_is_balanced_and_not_masked(world: int, size: int) -> None:
    """Each rank has its own triangle and, for every other rank, half of a full square: no mask, nothing unseen."""
    rows = 2 * size
    for rank in range(world):
        for visited in range(world):
            (piece,) = pieces(rank, visited, world, rows, "zigzag", causal=True)
            work = (piece.queries.stop - piece.queries.start) * (piece.keys.stop - piece.keys.start)
            assert piece.kind == ("causal" if rank == visited else "full")
            assert work == (rows * rows if rank == visited else rows * rows // 2)


@settings(max_examples=60)
@given(
    world=st.integers(1, 4),
    layout=LAYOUTS,
    size=st.integers(1, 20),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 60)),
    documents=st.sampled_from((None, "packed", "scattered", "masked")),
    tile=st.integers(1, 9),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_pieces_hold_all_that_is_visible(
    world: int,
    layout: str,
    size: int,
    causal: bool,
    window: int | None,
    documents: str | None,
    tile: int,
    batch: int,
    seed: int,
) -> None:
    """Each visible pair lies in one piece; full pieces see all; a masked one sees something or could."""
    window = window if causal else None
    length = size * padding_multiple(world, layout)
    generator = torch.Generator().manual_seed(seed)
    ids = None
    if documents == "packed":
        ids = (torch.rand(batch, length, generator=generator) < 0.2).cumsum(1)
    elif documents == "scattered":
        ids = torch.randint(0, 3, (batch, length), generator=generator)
    elif documents == "masked":
        keys = torch.zeros(batch, length, dtype=torch.int64)
        keys[:, : length // 3] = keys[:, -2:] = -1
        ids = torch.stack((torch.zeros_like(keys), keys))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "TILE", tile)
        patch.setattr(layouts, "_MASK_KEYS", 3 * tile)
        for rank in range(world):
            for visited in range(world):
                q, k = positions(rank, world, length, layout), positions(visited, world, length, layout)
                q_ids, k_ids = (
                    None if side is None else side[:, where]
                    for side, where in zip(layouts.sides(ids), (q, k), strict=True)
                )
                seen = visible(q, k, q_ids, k_ids, causal=causal, window=window)
                covered = torch.zeros(len(q), len(k), dtype=torch.int64)
                found = pieces(rank, visited, world, len(q), layout, causal=causal, window=window, documents=ids)
                for piece in found:
                    covered[piece.queries, piece.keys] += 1
                    part = seen[:, piece.queries, piece.keys]
                    if piece.kind == "full":
                        assert part.all()
                    elif piece.kind == "causal":
                        assert torch.equal(part[0], torch.ones(part.shape[1:], dtype=torch.bool).tril())
                    else:
                        assert part.shape[1] <= tile
                        assert part.shape[2] <= max(3 * tile, tile)
                assert covered.max() <= 1 if found else True
                assert (covered.bool() | ~seen).all()
                if ids is None and window is None and causal and rank != visited:
                    assert covered.sum() == seen.sum()  # nothing is computed that is not seen


def test_documents_and_windows_skip_tiles() -> None:
    rows = 4096
    plain = pieces(0, 0, 1, rows, "zigzag", causal=True, window=512)
    work = sum((p.queries.stop - p.queries.start) * (p.keys.stop - p.keys.start) for p in plain)
    assert work <= 2 * 512 * rows + 512 * 512  # two tiles for each tile of queries
    documents = (torch.arange(rows) // 1024)[None]
    packed = pieces(0, 0, 1, rows, "zigzag", causal=True, documents=documents)
    for piece in packed:
        assert piece.queries.start // 1024 == piece.keys.start // 1024 == (piece.keys.stop - 1) // 1024


def test_window_is_that_of_transformers() -> None:
    masking = pytest.importorskip("transformers.masking_utils")
    rule = masking.sliding_window_causal_mask_function(3)
    where = torch.arange(8)
    expected = torch.tensor([[bool(rule(0, 0, q, k)) for k in range(8)] for q in where])
    assert torch.equal(visible(where, where, None, None, causal=True, window=3)[0], expected)
