"""Ring attention sends what is seen, and nothing else: who sees which parts, numbers, and bytes."""

from __future__ import annotations

import itertools

import pytest
import ring_cases
import ring_sight_cases as cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_tiles import tiles_of

from odysseus_kernels.attention.layout import pieces, seen_parts
from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.planner.ring import Part, joined_parts, ring_peers
from odysseus_kernels.testing.spawn import RankPools, run_ranks

TILE = 4
# Some that hide ranks from each other at 3 and 4 ranks, in one direction or both, and some that hide none; smaller
# than a block of 12 or 24, and larger.
WINDOWS = [
    {"rows": 24, "batch": 1, "window": window, "layout": layout, "width": 8}
    for layout in ("zigzag", "contiguous")
    for window in (2, 7, 14, 30)
]
DOCUMENTS = [
    {"rows": 24, "batch": 1, "documents": "packed", "layout": layout, "width": 8, "seed": seed, "causal": causal}
    for layout in ("zigzag", "contiguous")
    for seed, causal in ((1, True), (2, False))
]
BOTH = [{"rows": 12, "documents": "packed", "window": 9, "width": 8}, {"rows": 12, "key_mask": True, "window": 4}]


@settings(max_examples=150, deadline=None)
@given(
    world=st.integers(1, 6),
    half=st.integers(1, 6),
    layout=st.sampled_from(("zigzag", "contiguous")),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 80)),
    documents=st.sampled_from((None, "packed", "scattered")),
    seed=st.integers(0, 99),
    tile=st.integers(1, 4),
)
def test_who_sees_what(
    world: int, half: int, layout: str, causal: bool, window: int | None, documents: str | None, seed: int, tile: int
) -> None:
    window = window if causal else None
    problem = ring_cases.Problem(
        rows=2 * half, layout=layout, causal=causal, window=window, documents=documents, seed=seed
    )
    rules = {"causal": causal, "window": window, "documents": problem.ids(world)}
    with tiles_of(tile):
        parts = seen_parts(world, problem.rows, layout, **rules)
        assert parts[0].start == 0 and parts[-1].stop == problem.rows and len(parts) <= 8
        assert all(one.stop == other.start for one, other in itertools.pairwise(parts))
        assert all(one.pairs != other.pairs for one, other in itertools.pairwise(parts))
        for part in parts:
            truth = cases.seen(problem, world, part.start, part.stop)
            if documents is None:
                assert part.pairs == truth
            for rank in range(world):
                for other in range(world):
                    taken = part.pairs[rank][other]
                    assert taken or not truth[rank][other], "what is seen is taken"
                    planned = pieces(rank, other, world, problem.rows, layout, **rules, keys=part.rows)
                    assert taken or not planned, "what is not taken is not planned"
                    for piece in planned:
                        assert 0 <= piece.keys.start < piece.keys.stop <= part.stop - part.start


def test_all_is_one_part_where_no_window_hides_anything() -> None:
    for layout in ("zigzag", "contiguous"):
        for causal in (True, False):
            assert len(seen_parts(4, 4096, layout, causal=causal)) == 1
        assert seen_parts(4, 4096, layout, causal=True, window=4 * 4096) == seen_parts(4, 4096, layout, causal=True)


def test_under_a_window_the_ends_of_blocks_travel() -> None:
    # Blocks of 2048 tokens, of which the next block sees the last 1023: two tiles of 512.
    parts = seen_parts(4, 4096, "zigzag", causal=True, window=1024)
    assert [(part.start, part.stop) for part in parts] == [(0, 1024), (1024, 2048), (2048, 3072), (3072, 4096)]
    alone = tuple(tuple(rank == other for other in range(4)) for rank in range(4))
    assert parts[0].pairs == parts[2].pairs == alone
    # Rank r's early block comes before rank r+1's, its late one before rank r-1's.
    assert parts[1].pairs == tuple(tuple(other in (rank, rank - 1) for other in range(4)) for rank in range(4))
    assert parts[3].pairs == tuple(tuple(other in (rank, rank + 1) for other in range(4)) for rank in range(4))
    assert [ring_peers(parts, rank) for rank in range(4)] == [
        (1 / 4, 1 / 4),
        (1 / 2, 1 / 2),
        (1 / 2, 1 / 2),
        (1 / 4, 1 / 4),
    ]


def test_of_many_parts_those_that_cost_least_are_joined() -> None:
    def pairs(*who: int) -> cases.Matrix:
        return tuple(tuple(rank == other or other in who for other in range(3)) for rank in range(3))

    def joined(*parts: Part, most: int | None = None) -> tuple[Part, ...]:
        flat = ((part.start, part.stop, bytes(seen for row in part.pairs for seen in row)) for part in parts)
        return joined_parts(3, flat, most)

    parts = [Part(0, 4, pairs()), Part(4, 6, pairs()), Part(6, 7, pairs(1)), Part(7, 99, pairs(1, 2))]
    assert joined(*parts) == (Part(0, 6, pairs()), *parts[2:])
    # 6 tokens to two more ranks, or 1 token to two more.
    assert joined(*parts, most=2) == (Part(0, 6, pairs()), Part(6, 99, pairs(1, 2)))
    assert joined(*parts, most=1) == (Part(0, 99, pairs(1, 2)),)
    # What has become equal is one part, too.
    apart = [Part(0, 50, pairs(1, 2)), Part(50, 51, pairs(1)), Part(51, 90, pairs(1, 2)), Part(90, 95, pairs())]
    assert joined(*apart, most=3) == (Part(0, 90, pairs(1, 2)), Part(90, 95, pairs()))


@pytest.mark.parametrize("world", (2, 3, 4))
@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_against_fp64(ranks: RankPools, transport: str, world: int) -> None:
    problems = [*WINDOWS, *DOCUMENTS, *BOTH]
    ranks(world).run(cases.check, "float64", TILE, (transport,), ("fused", "unfused"), problems)


@pytest.mark.parametrize("world", (2, 3, 4))
def test_sixteen_bits(ranks: RankPools, world: int) -> None:
    problems = [WINDOWS[1], WINDOWS[5], DOCUMENTS[0], DOCUMENTS[2], *BOTH]
    ranks(world).run(cases.check, "bfloat16", TILE, ("symmetric", "collective"), ("fused",), problems)


def test_real_tiles(ranks: RankPools) -> None:
    """Blocks of 768 tokens: a tile of 512 that nobody else sees, and one of 256."""
    problem = {"rows": 1536, "batch": 1, "heads": 1, "kv_heads": 1, "width": 8, "window": 200}
    ranks(2).run(ring_cases.check, "float64", ("symmetric", "collective"), ("fused",), [problem])
    counts = ranks(2).run(cases.sent, "collective", "fused", "float32", 512, [problem])
    # Of 1536 tokens 256 of rank 0's early block go to rank 1, and 256 of rank 1's late one to rank 0.
    assert counts == [[(2 * 256 * 8 * 4, 2 * 2 * 256 * 8 * 4)]] * 2


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_dropout_does_not_depend_on_parts(ranks: RankPools, transport: str) -> None:
    ranks(3).run(cases.dropped, transport)


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_bits_repeat(ranks: RankPools, transport: str) -> None:
    ranks(4).run(cases.repeated, transport, TILE, {"rows": 24, "window": 7, "documents": "packed"})


@pytest.mark.parametrize(("transport", "mode"), [("symmetric", "fused"), ("collective", "unfused")])
def test_gradients_of_keys_that_nobody_sees_are_zero(ranks: RankPools, transport: str, mode: str) -> None:
    everyone = ranks(3).run(cases.unseen_keys, transport, mode, TILE)
    assert all(unseen > 0 and parts == 4 for ((unseen, parts),) in everyone)


@pytest.mark.parametrize("world", (2, 3, 4))
@pytest.mark.parametrize(
    ("transport", "mode"), [("symmetric", "fused"), ("collective", "fused"), ("collective", "unfused")]
)
def test_bytes_are_those_of_what_is_seen(ranks: RankPools, transport: str, mode: str, world: int) -> None:
    problems = [*WINDOWS, *DOCUMENTS]
    everyone = ranks(world).run(cases.sent, transport, mode, "bfloat16", TILE, problems)
    for index, settings_ in enumerate(problems):
        problem = ring_cases.Problem(**settings_)
        rules = {"causal": problem.causal, "window": problem.window, "documents": problem.ids(world)}
        with tiles_of(TILE):
            parts = seen_parts(world, problem.rows, problem.layout, **rules)
        counted = cases.elements(problem, world, parts)
        whole = cases.elements(problem, world, [Part(0, problem.rows, ())])
        for rank, found in enumerate(everyone):
            served, visited = counted[rank]
            assert found[index] == (2 * served, 2 * served + 4 * visited), f"rank {rank}, {problem}"
            row = whole[rank][0], whole[rank][1]
            assert served <= row[0] and visited <= row[1]
            if problem.window in (2, 7) and row[0]:
                assert 2 * served <= row[0], "a window much smaller than a block: the ends of blocks"


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_another_window_on_one_rank_is_an_error_on_all(transport: str) -> None:
    for error, message in run_ranks(cases.other_window, 3, transport, timeout=60):
        assert error == "RankMismatchError" and "rank 1 differs" in message and "visits" in message, message


def test_visits_that_ranks_could_not_agree_on_are_refused() -> None:
    x = torch.zeros(2, 3)
    nobody, everybody = ((False, False), (False, True)), ((True, True), (True, True))
    with pytest.raises(ValueError, match="ring: pairs: expected 2 x 2, every rank with itself"):
        Exchange(print, (x,), pairs=nobody).check("ring", 2)
    with pytest.raises(ValueError, match="expected 3 x 3"):
        Exchange(print, (x,), pairs=everybody).check("ring", 3)
    with pytest.raises(ValueError, match="got parts for each rank"):
        Exchange(print, addressed=(x,), pairs=everybody).check("ring", 2)
    with pytest.raises(ValueError, match="ring: parts: expected 2 x 2, every rank with itself"):
        Exchange(print, (x, x), parts=(everybody, nobody)).check("ring", 2)
    with pytest.raises(ValueError, match=r"parts: expected one for each of \[2, 1\] tensors, got 2"):
        Exchange(print, (x, x), sums=(x,), parts=(everybody, everybody)).check("ring", 2)
    with pytest.raises(ValueError, match="parts: expected no pairs beside them"):
        Exchange(print, (x,), pairs=everybody, parts=(everybody,)).check("ring", 2)
    with pytest.raises(ValueError, match=r"sums\[0\]: expected a slice of a contiguous tensor's rows"):
        Exchange(print, sums=(torch.zeros(2, 3, 4)[..., 1:],), parts=(everybody,)).check("ring", 2)
    Exchange(print, (x.mT,), sums=(torch.zeros(2, 3, 5, 4)[:, :, 1:4],), parts=(everybody,)).check("ring", 2)
    one, other = (Exchange(print, (x,), pairs=((True, seen), (True, True))) for seen in (True, False))
    assert one.described_pairs != other.described_pairs
    tables = [(everybody, other.pairs), (other.pairs, everybody)]
    assert len({Exchange(print, (x, x), parts=parts).described_pairs for parts in tables}) == 2
