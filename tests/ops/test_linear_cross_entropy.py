"""Losses of distributed heads: torch's cross-entropy, its gradients, exact bytes, and never the logits of all rows."""

from __future__ import annotations

import linear_cross_entropy_cases as cases
import pytest
import torch
from covering import every_pair

from odysseus_kernels.testing.spawn import RankPools

WORLDS = (1, 2, 3, 4)


@every_pair(kind=cases.KINDS, dtype=("float64", "float32", "bfloat16", "float16"), world=WORLDS)
def test_against_fp64(ranks: RankPools, kind: str, dtype: str, world: int) -> None:
    ranks(world).run(cases.check, kind, dtype, [{}])


@pytest.mark.parametrize("world", (1, 3))
@pytest.mark.parametrize("kind", cases.KINDS)
def test_shapes_labels_and_chunks(ranks: RankPools, kind: str, world: int) -> None:
    problems = [
        {"valid": 0.0},
        {"silent_rank": world - 1},
        {"valid": 1.0, "bias": False, "contiguous": False},
        {"ignore_index": 3},  # a label that is also a row of the vocabulary
        {"rows": (1,), "vocabulary": 1, "features": 5, "valid": 1.0},
    ]
    ranks(world).run(cases.check, kind, "float64", problems, ("symmetric",), ("fused",), (1, 4, 1024))


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("rows", ((13, 0, 5, 1), (0, 7)), ids=str)
def test_zero3_with_rows_of_its_own_on_each_rank(ranks: RankPools, rows: tuple[int, ...], world: int) -> None:
    for dtype in ("float64", "bfloat16"):
        ranks(world).run(cases.check, "zero3", dtype, [{"rows": rows}], ("symmetric", "collective"), ("fused",))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_any_subset_of_gradients(ranks: RankPools, kind: str) -> None:
    ranks(2).run(cases.subsets_of_gradients, kind)


def formula(kind: str, world: int, size: int, bias: bool) -> dict[str, int]:
    """f times the elements of a global tensor, that is (N-1) times those of a rank's part, in bytes.

    Rows R = 13 of each rank, d = 24, V/N = 20; statistics and logsumexp are fp32, targets int64.
    """
    rows, weight, wide = 13, 20 * 24 + (20 if bias else 0), 4
    peers = world - 1
    if kind == "zero3":
        return {
            "forward all_gather": peers * weight * size,
            "backward all_gather": peers * weight * size,
            "backward reduce_scatter": peers * weight * size,
        }
    if kind == "sharded":
        return {
            "forward all_gather": peers * (rows * 24 * size + rows * 8),  # tokens; targets
            "forward all_to_all": peers * rows * 2 * wide,  # statistics
            "backward all_gather": peers * (rows * 24 * size + (rows + 1) * wide),  # tokens; logsumexp and grad
            "backward reduce_scatter": peers * rows * 24 * size,
        }
    tokens = world * rows  # on every rank
    part = -(-tokens * 24 // world)
    return {"forward all_gather": peers * tokens * 2 * wide, "backward all_reduce": 2 * peers * part * size}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_bytes_equal_the_formula(ranks: RankPools, kind: str, world: int) -> None:
    for transport, mode, dtype, bias in (
        ("symmetric", "fused", "float32", True),
        ("symmetric", "unfused", "bfloat16", False),
        ("collective", "fused", "bfloat16", True),
        ("collective", "unfused", "float32", False),
    ):
        size = getattr(torch, dtype).itemsize
        for counted in ranks(world).run(cases.traffic, kind, transport, mode, dtype, bias):
            assert counted == (formula(kind, world, size, bias) if world > 1 else {})


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_logits_of_all_rows_never_exist(ranks: RankPools, kind: str, dtype: str) -> None:
    for largest, chunk, gathered, logits in ranks(2).run(cases.largest_allocation, kind, dtype):
        assert largest <= max(chunk, gathered)
        assert max(chunk, gathered) <= logits / 16  # the bound means something


@pytest.mark.parametrize("world", (1, 2))
def test_opcheck(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.opcheck)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_compiled_and_recomputed(ranks: RankPools, kind: str) -> None:
    ranks(2).run(cases.compiled, kind, "aot_eager", timeout=200)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_autocast(ranks: RankPools, kind: str) -> None:
    ranks(2).run(cases.under_autocast, kind)


EXPECTED = {
    "width": ("zero3_linear_cross_entropy", "weight_shard", "in_features 7", "hidden [2, 3, 8]"),
    "dtype": ("hidden's dtype torch.float32", "torch.float64"),
    "bias": ("bias_shard of shape [5]", "[4]"),
    "bias dtype": ("bias of hidden's dtype", "torch.float64"),
    "float targets": ("integer dtype", "torch.float32"),
    "targets": ("[2, 3]", "got [2, 2]"),
    "chunks": ("at least 1", "got 0"),
    "tokens": ("sharded", "replicated", "'cut'"),
    "empty": ("at least one row", "[0, 3, 8]"),
    "above": ("from 0 to 9", "got 10"),
    "below": ("from 0 to 9", "got -3"),
    "below replicated": ("from 0 to 9", "got -3"),
}


def test_refusals(ranks: RankPools) -> None:
    for messages in ranks(2).run(cases.messages):
        assert set(messages) == set(EXPECTED)
        for name, parts in EXPECTED.items():
            for part in parts:
                assert part in messages[name], f"{name}: {part!r} is not in {messages[name]!r}"


def test_different_numbers_of_sharded_tokens(ranks: RankPools) -> None:
    for message in ranks(3).run(cases.different_rows):
        assert "rank 1 differs" in message


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize(("mode", "transport"), (("fused", "symmetric"), ("unfused", "collective")))
def test_losses_of_each_row(ranks, kind, mode, transport):
    for world in (1, 2, 3):
        ranks(world).run(cases.each_row, kind, mode, transport)
