"""Ulysses' attention block, group by group of heads, against fp64 on the whole sequence: output and every gradient."""

from __future__ import annotations

import pipelined_ulysses_cases as cases
import pipelined_ulysses_cost_cases as costs
import pytest
from pipelined_refusal_cases import MORE_MESSAGES

from odysseus_kernels.testing.spawn import RankPools

BOTH = (("symmetric", "fused"), ("collective", "fused"))
ALL = (*BOTH, ("symmetric", "unfused"), ("collective", "unfused"))
# What a rank has, and into how many groups its heads are cut.
PROBLEMS = [
    ({"rows": 8, "heads": 4, "kv_heads": 4}, 4),
    ({"rows": 8, "heads": 4, "kv_heads": 2, "bias": True, "norms": True}, 2),
    ({"rows": 8, "heads": 2, "kv_heads": 2, "documents": True, "batch": 1}, 2),
    ({"rows": 8, "heads": 6, "kv_heads": 3, "window": 11, "key_mask": True}, 3),
]
# Less usual ones, for which one type says enough.
ODD_PROBLEMS = [
    ({"rows": 5, "heads": 2, "kv_heads": 1, "bias": True}, 1),
    ({"rows": 1, "heads": 4, "kv_heads": 4}, 2),
    ({"rows": 8, "heads": 4, "kv_heads": 2, "rotation": False, "norms": True, "key_mask": True, "documents": True}, 2),
]


@pytest.mark.parametrize("world", (1, 2, 4))
@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16"))
def test_against_fp64(ranks: RankPools, dtype: str, world: int) -> None:
    modes = ALL if world == 2 else BOTH if world > 1 else (("auto", "fused"),)
    ranks(world).run(cases.check, dtype, modes, PROBLEMS)


@pytest.mark.parametrize("world", (2, 3))
def test_odd_shapes(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.check, "float64", BOTH, ODD_PROBLEMS)


def test_units_of_few_queries(ranks: RankPools) -> None:
    """Where a group has fewer key/value heads than ranks, its queries are cut, too."""
    ranks(3).run(cases.check, "float64", BOTH, PROBLEMS, 6)


@pytest.mark.parametrize("frozen", ((), ("x",), ("wq", "wk", "wv", "bq", "bk", "bv", "nq", "nk"), ("wo", "bo")))
def test_same_bytes_as_two_operators(ranks: RankPools, frozen: tuple[str, ...]) -> None:
    ranks(2).run(costs.same_bytes, frozen)


@pytest.mark.parametrize(
    "trained", (("wo",), ("nq", "nk"), ("bo",), ("bk",), ()), ids=("output", "norms", "last", "bias", "nothing")
)
def test_little_is_trained(ranks: RankPools, trained: tuple[str, ...]) -> None:
    """Nothing is sent for gradients that nobody wants."""
    everything = ("x", "wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo", "nq", "nk")
    ranks(2).run(costs.same_bytes, tuple(name for name in everything if name not in trained))


def test_every_transfer_has_attention_beside_it(ranks: RankPools) -> None:
    """Of the 2 + 3 exchanges the second and third have a unit behind each of their visits."""
    for found in ranks(2).run(costs.order_of_work):
        attention = [[said for said in stage if "heads" in said] for stage in found]
        assert [len(stage) for stage in attention] == [0, 2, 2, 0, 0]
        for stage in found[1:3]:
            assert [said.partition(" ")[0] for said in stage] == ["visit", "heads", "visit", "heads"]
        assert attention[1] == ["heads 0, rows 0", "heads 0, rows 11"]  # 16 / sqrt(2): as many keys as before
        assert attention[2] == ["heads 1, rows 0", "heads 1, rows 11"]


@pytest.mark.parametrize("world", (2, 4))
def test_the_number_of_groups_changes_rounding_only(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.groups_agree)


@pytest.mark.parametrize("world", (2, 4))
def test_memory(ranks: RankPools, world: int) -> None:
    """What is kept is what Ulysses keeps; beside it a call holds no more than its groups of heads account for."""
    for transport in ("symmetric", "collective"):
        whole = ranks(world).run(costs.memory, transport, 1)[0]
        for found in ranks(world).run(costs.memory, transport, 4):
            assert abs(found["saved"] - found["formula"]) <= 0.01 * found["formula"], found
            # The largest is the sum for y or dx, [L/N, d]: nothing has all tokens and the hidden width.
            assert found["largest"] <= 1, found
            assert found["saved"] == whole["saved"]
            assert found["peak"] < whole["peak"], (found, whole)


@pytest.mark.parametrize("groups", (2, 4))
def test_no_more_than_a_group_of_weights_is_given_at_once(ranks: RankPools, groups: int) -> None:
    """Each weight once in forward and once in backward; transports hold two ranks' at a time."""
    for passes in ranks(2).run(costs.given_at_once, groups):
        for parts in passes:
            assert len(parts) == groups + 3
            assert max(parts) <= 1 / groups + 1e-9 and sum(parts) == pytest.approx(1), parts


def test_a_choice_is_made_once_for_all_seeds_and_documents(ranks: RankPools) -> None:
    for found in ranks(2).run(cases.choices):
        assert found == ["backward", "forward"]


def test_graphs(ranks: RankPools) -> None:
    ranks(2).run(cases.graphs)


@pytest.mark.parametrize("world", (1, 2))
def test_dropout_is_that_of_one_process(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.dropped)


def test_bad_input(ranks: RankPools) -> None:
    expected = (
        "expected head_groups to divide the 2 key/value heads of a rank, got 3",
        "expected head_groups to divide the 2 key/value heads of a rank, got 0",
        "expected head_groups to divide the 2 key/value heads of a rank, got 'all'",
        "expected head_dim to divide 32 query and 16 key features, got 5",
        "expected cos [1 or 2, 16, 8], of its T tokens, got [1, 3, 8]",
        'attention: expected "sdpa" or "flash_attention_2", got \'eager\'',
        "expected dropout_seed with dropout=0.5",
        *MORE_MESSAGES,
        'got "tiles": no tile kernel does attention',
        "expected output_bias [12], a rank's share, got [24]",
        "expected x [batch, tokens, width] without empty dimensions, got [8, 24]",
        "expected output_weight [out_features, 32] for 32 query features, got [24, 31]",
    )
    for found in ranks(2).run(cases.refusals):
        for message, text in zip(found, expected, strict=True):
            assert text in message, (text, message)


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
@pytest.mark.parametrize(
    "what", ("groups", "documents", "dropout", "head_dim", "norms", "eps", "rotation", "bias", "frozen", "frozen bias")
)
def test_every_rank_learns_which_one_differs(ranks: RankPools, what: str, transport: str) -> None:
    phase = "backward" if "frozen" in what else "forward"
    for message in ranks(3).run(cases.odd_rank, what, transport):
        assert "rank 1 differs" in message and f"pipelined_ulysses {phase}" in message, message
