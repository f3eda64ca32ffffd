"""linear_log_probs: torch's log_softmax, entropies, the likeliest ids and gradients, wherever the weight lies."""

from __future__ import annotations

import log_prob_cases as cases
import pytest

from odysseus_kernels.testing.spawn import RankPools

EVERY = pytest.mark.parametrize("placement", cases.PLACEMENTS)


@EVERY
@pytest.mark.parametrize(
    ("dtype", "world"), (("float64", 1), ("float64", 2), ("float64", 4), ("float32", 2), ("bfloat16", 2))
)
def test_against_fp64(ranks: RankPools, placement: str, dtype: str, world: int) -> None:
    ranks(world).run(cases.check, placement, dtype)


@EVERY
def test_each_gradient_alone(ranks: RankPools, placement: str) -> None:
    ranks(2).run(cases.each_gradient_alone, placement)


def test_ties(ranks: RankPools) -> None:
    ranks(2).run(cases.ties)


@pytest.mark.parametrize("world", (2, 4))
def test_bytes_equal_the_formula(ranks: RankPools, world: int) -> None:
    """Weights travel once in each direction, whatever the chunks; or a few numbers of each row."""
    peers, weight = world - 1, cases.VOCABULARY * (cases.FEATURES + 1) * 4
    for counted in ranks(world).run(cases.traffic, "zero3"):
        assert counted == {
            "forward all_gather": peers * weight,
            "backward all_gather": peers * weight,
            "backward reduce_scatter": peers * weight,
        }
    rows = cases.ROWS * world
    numbers = (1 + 1 + 3 + cases.TOP) * 4 + cases.TOP * 8  # log-sum, entropy, three ids, the likeliest; their ids
    for counted in ranks(world).run(cases.traffic, "vocab_parallel"):
        assert counted == {
            "forward all_gather": peers * rows * numbers,
            "backward all_reduce": 2 * peers * -(-rows * cases.FEATURES // world) * 4,
        }
    assert ranks(world).run(cases.traffic, "whole") == [{}] * world


@EVERY
def test_logits_of_all_rows_never_exist(ranks: RankPools, placement: str) -> None:
    for largest, bound, logits in ranks(2).run(cases.largest_allocation, placement):
        assert largest <= bound <= logits / 16


def test_opcheck(ranks: RankPools) -> None:
    ranks(2).run(cases.opcheck)


def test_refusals(ranks: RankPools) -> None:
    for said in ranks(2).run(cases.messages):
        assert "expected placement to be one of ('whole', 'zero3', 'vocab_parallel'), got 'cut'" in said["placement"]
        assert "expected ids of an integer dtype, got torch.float32" in said["float ids"]
        assert "expected ids of shape [2, 3, K] for hidden [2, 3, 8], got [3, 1]" in said["shape"]
        assert "expected a temperature above 0, got 0.0" in said["temperature"]
        assert "expected top_k from 0 to the 10 ids of the vocabulary, got 11" in said["top_k"]
        assert "expected ids from 0 to 9 or ignore_index -100, got 10" in said["above"]
        assert "got -3" in said["below"]
        assert "expected chunk_rows of at least 1, got 0" in said["chunks"]


def test_ranks_that_differ(ranks: RankPools) -> None:
    for said in ranks(2).run(cases.differing):
        assert len(said) == 2
        assert all("top 1" in text and "top 2" in text for text in said)
