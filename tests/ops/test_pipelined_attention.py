"""The pipelined attention block against fp64 on the whole sequence: output and every gradient."""

from __future__ import annotations

import pipelined_cases as cases
import pipelined_refusal_cases as refusal_cases
import pytest

from odysseus_kernels.testing.spawn import RankPools

BOTH = (("symmetric", "fused"), ("collective", "fused"))
ALL = (*BOTH, ("symmetric", "unfused"), ("collective", "unfused"))
PROBLEMS = [
    {},
    {"bias": True, "norms": True, "kv_heads": 2},
    {"documents": True},
    {"window": 11, "batch": 1},
    {"gathered": "save", "bias": True},
]
# Less usual ones, for which one type says enough.
ODD_PROBLEMS = [
    {"pieces": 1},
    {"pieces": 16, "rows": 16, "batch": 1},
    {"rows": 14, "pieces": [1, 5, 6, 2]},
    {"rotation": False, "norms": True},
    {"key_mask": True},
    {"key_mask": True, "documents": True, "pieces": [3, 13]},
    {"window": 2, "documents": True, "norms": True},
]


# More than one tile of 512 tokens: empty, full and masked ones.
TILES = {"rows": 800, "batch": 1, "kv_heads": 1, "window": 700, "documents": True, "pieces": [100, 400, 300]}


@pytest.mark.parametrize("world", (1, 2, 3, 4))
@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16"))
def test_against_fp64(ranks: RankPools, dtype: str, world: int) -> None:
    modes = ALL if world == 2 else BOTH if world > 1 else (("auto", "fused"),)
    ranks(world).run(cases.check, dtype, modes, PROBLEMS)


@pytest.mark.parametrize("world", (1, 2, 3))
def test_odd_shapes(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.check, "float64", BOTH if world > 1 else (("auto", "fused"),), ODD_PROBLEMS)


def test_tiles_of_masks(ranks: RankPools) -> None:
    ranks(2).run(cases.check, "float64", BOTH, [TILES])


RINGS = [
    {"rows": 8, "pieces": 2, "bias": True, "norms": True},
    {"rows": 8, "documents": True, "pieces": [1, 5, 2]},
    {"rows": 8, "window": 9, "key_mask": True, "pieces": 1},
    {"rows": 6, "gathered": "save", "pieces": 3, "bias": True},
]


@pytest.mark.parametrize(("world", "ring"), ((2, 2), (4, 2), (3, 3)))
@pytest.mark.parametrize("dtype", ("float64", "bfloat16"))
def test_crossed_with_a_ring(ranks: RankPools, dtype: str, world: int, ring: int) -> None:
    modes = (*BOTH, ("symmetric", "unfused")) if world == 4 else BOTH
    ranks(world).run(cases.check, dtype, modes, [{**problem, "ring": ring} for problem in RINGS])


# Windows smaller than a block of 6 to 16 tokens, which lies in two tiles or more, and documents that straddle blocks.
PARTS = [
    {"rows": 12, "window": 3, "pieces": 2, "bias": True},
    {"rows": 12, "documents": True, "pieces": [1, 8, 3], "kv_heads": 1},
    {"rows": 12, "window": 7, "documents": True, "key_mask": True, "pieces": 3, "gathered": "save"},
]


@pytest.mark.parametrize(("world", "ring"), ((2, 2), (4, 2), (3, 3), (4, 4)))
@pytest.mark.parametrize("dtype", ("float64", "bfloat16"))
def test_parts_of_a_ring(ranks: RankPools, dtype: str, world: int, ring: int) -> None:
    modes = (*BOTH, ("symmetric", "unfused")) if (world, ring) == (4, 2) else BOTH
    ranks(world).run(cases.check_parts, dtype, modes, 3, [{**problem, "ring": ring} for problem in PARTS])


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
@pytest.mark.parametrize(("world", "ring"), ((4, 2), (3, 3)))
def test_bytes_of_a_ring_are_those_of_parts(ranks: RankPools, world: int, ring: int, transport: str) -> None:
    whole = ranks(world).run(cases.ring_bytes, transport, 3, {"rows": 12, "ring": ring})
    for problem in PARTS[:2]:
        found = ranks(world).run(cases.ring_bytes, transport, 3, {**problem, "ring": ring})
        for counts in found:
            assert all(recorded == expected for recorded, expected in counts)
        if "window" in problem:  # the last tile of each block to one rank at most, instead of all to all
            assert all(4 * some[0][0] <= every[0][0] for some, every in zip(found, whole, strict=True))


def test_graphs(ranks: RankPools) -> None:
    ranks(2).run(cases.graphs)


@pytest.mark.parametrize("world", (1, 2))
def test_dropout_does_not_depend_on_pieces(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.dropped)


def test_bad_input(ranks: RankPools) -> None:
    expected = (
        "expected 1 to 8 pieces of this rank's 8 tokens, got 9",
        "expected numbers of rows that are 8 together, each at least 1, got [4, 5]",
        "expected pieces to be a whole number or numbers of rows, got 'many'",
        "expected head_dim to divide 16 query and 8 key features, got 5",
        "expected cos [1 or 2, 16, 8], of its T tokens, got [1, 3, 8]",
        "expected the query norm's weight [8], got [9]",
        "expected window to be a whole number of tokens of at least 1, got 0",
        "expected dropout_seed with dropout=0.5",
        'attention: expected "sdpa" or "flash_attention_2", got \'eager\'',
        *refusal_cases.MORE_MESSAGES,
        "expected documents [batch, whole length] = [2, 16]",
        'got "tiles": no tile kernel does attention',
        "expected output_weight [out_features, 16] for 16 query features, got [24, 15]",
        "expected as many value as key features",
        "expected x [batch, tokens, width] without empty dimensions, got [8, 24]",
        "expected output_weight of x's dtype torch.float32, got torch.float64",
    )
    for found in ranks(2).run(refusal_cases.refusals):
        for message, text in zip(found, expected, strict=True):
            assert text in message, (text, message)


@pytest.mark.parametrize("what", ("pieces", "documents", "dropout", "head_dim", "norms", "eps", "rotation"))
def test_every_rank_learns_which_one_differs(ranks: RankPools, what: str) -> None:
    for message in ranks(3).run(refusal_cases.odd_rank, what):
        assert "rank 1 differs" in message and "pipelined_attention forward" in message, message


def test_nothing_is_as_long_and_wide_as_the_gathered_input(ranks: RankPools) -> None:
    """Of 8 pieces the largest has 6 of 32 rows; in backward two tensors of it arrive from 2 ranks, in one buffer."""
    for found in ranks(2).run(cases.private_memory, 8):
        assert found["largest"] <= 2 * 2 * 6 / 32, found  # of two gathered inputs it would be 4
        whole = ranks(2).run(cases.private_memory, 1)[0]
        assert found["peak"] < whole["peak"] - 2, (found, whole)
