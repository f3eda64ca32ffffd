"""Ring attention sends what is seen, and nothing else: who sees whom, numbers, and bytes."""

from __future__ import annotations

import pytest
import ring_cases
import ring_sight_cases as cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odysseus_kernels.attention.layout import pieces, seen_pairs
from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.planner.ring import ring_peers
from odysseus_kernels.testing.spawn import RankPools

# Some that hide ranks from each other at 3 and 4 ranks, in one direction or both, and some that hide none.
WINDOWS = [
    {"rows": 12, "batch": 1, "window": window, "layout": layout, "width": 8}
    for layout in ("zigzag", "contiguous")
    for window in (2, 7, 14, 30)
]
DOCUMENTS = [
    {"rows": 12, "batch": 1, "documents": "packed", "layout": layout, "width": 8, "seed": seed, "causal": causal}
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
)
def test_who_sees_whom(
    world: int, half: int, layout: str, causal: bool, window: int | None, documents: str | None, seed: int
) -> None:
    window = window if causal else None
    problem = ring_cases.Problem(
        rows=2 * half, layout=layout, causal=causal, window=window, documents=documents, seed=seed
    )
    rules = {"causal": causal, "window": window, "documents": problem.ids(world)}
    found, truth = seen_pairs(world, problem.rows, layout, **rules), cases.seen(problem, world)
    if documents is None:
        assert found == truth
    for rank in range(world):
        for other in range(world):
            assert found[rank][other] or not truth[rank][other], "what is seen is visited"
            planned = pieces(rank, other, world, problem.rows, layout, **rules)
            assert found[rank][other] or not planned, "what is not visited is not planned"


@pytest.mark.parametrize("world", (2, 3, 4))
@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_against_fp64(ranks: RankPools, transport: str, world: int) -> None:
    problems = [*WINDOWS, *DOCUMENTS, *BOTH]
    ranks(world).run(ring_cases.check, "float64", (transport,), ("fused", "unfused"), problems)


@pytest.mark.parametrize("world", (2, 3, 4))
@pytest.mark.parametrize(("transport", "mode"), [("symmetric", "fused"), ("collective", "unfused")])
def test_bytes_are_those_of_what_is_seen(ranks: RankPools, transport: str, mode: str, world: int) -> None:
    problems = [*WINDOWS, *DOCUMENTS]
    everyone = ranks(world).run(cases.sent, transport, mode, "bfloat16", problems)
    saved = 0
    for index, problem in enumerate(problems):
        truth = cases.seen(ring_cases.Problem(**problem), world)
        elements = 2 * 2 * 12 * 8  # of k and v: 2 heads of 12 tokens
        for rank, found in enumerate(everyone):
            served = sum(truth[other][rank] for other in range(world) if other != rank)
            visited = sum(truth[rank][other] for other in range(world) if other != rank)
            assert ring_peers(truth, rank) == (served, visited)
            forward = served * elements * 2
            assert found[index] == (forward, forward + visited * elements * 4), f"rank {rank}, {problem}"
            saved += (world - 1) - served
    assert saved > 0


def test_visits_that_ranks_could_not_agree_on_are_refused() -> None:
    x = torch.zeros(2, 3)
    nobody = ((False, False), (False, True))
    with pytest.raises(ValueError, match="ring: pairs: expected 2 x 2, every rank with itself"):
        Exchange(print, (x,), pairs=nobody).check("ring", 2)
    with pytest.raises(ValueError, match="expected 3 x 3"):
        Exchange(print, (x,), pairs=((True, True), (True, True))).check("ring", 3)
    with pytest.raises(ValueError, match="got parts for each rank"):
        Exchange(print, addressed=(x,), pairs=((True, True), (True, True))).check("ring", 2)
    one, other = (Exchange(print, (x,), pairs=((True, seen), (True, True))) for seen in (True, False))
    assert one.described_pairs != other.described_pairs
