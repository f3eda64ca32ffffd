"""The pipelined attention block against fp64 on the whole sequence: output and every gradient."""

from __future__ import annotations

import pipelined_cases as cases
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
