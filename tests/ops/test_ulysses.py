"""Ulysses' operators: every mode × transport × dtype × number of ranks against fp64, bytes, refusals, graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import ulysses_cases as cases
import ulysses_properties as properties
from covering import every_pair

from odysseus_kernels.testing.spawn import RankPool, RankPools

OPERATORS = tuple(cases.CHECKS)
TRANSPORTS = ("symmetric", "collective")
# Query heads that share key and value heads on one rank; the other cases have fewer of these than ranks.
BASE: dict[str, Any] = {"heads": 2}


@every_pair(operator=OPERATORS, transport=TRANSPORTS, dtype=("float64", "float32", "bfloat16"), world=(1, 2, 3, 4))
def test_against_fp64(ranks: RankPools, operator: str, transport: str, dtype: str, world: int) -> None:
    ranks(world).run(cases.check, operator, dtype, transport, BASE)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("world", "problem"),
    (
        pytest.param(2, {"kv_heads": 1}, id="one key head, 2 ranks"),
        pytest.param(3, {"kv_heads": 1, "heads": 1}, id="one key head, 3 ranks"),
        pytest.param(4, {"kv_heads": 2}, id="two key heads, 4 ranks"),
        pytest.param(2, {"bias": False, "contiguous": False}, id="strided, no bias"),
        pytest.param(2, {"batch": (), "rows": 1}, id="single row"),
        pytest.param(2, {"batch": (2, 2), "rows": 70}, id="long rows in two batch dimensions"),
    ),
)
def test_shapes(ranks: RankPools, operator: str, transport: str, world: int, problem: dict[str, Any]) -> None:
    ranks(world).run(cases.check, operator, "float64", transport, problem)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("operator", OPERATORS[:2])
@pytest.mark.parametrize(
    ("world", "problem"),
    (
        pytest.param(4, {"rings": 2}, id="2 rings of 2"),
        pytest.param(4, {"rings": 2, "kv_heads": 1}, id="2 rings of 2, one key head"),
        pytest.param(3, {"rings": 3, "batch": ()}, id="3 rings of 1"),
        pytest.param(4, {"rings": 4, "kv_heads": 1}, id="4 rings of 1"),
    ),
)
@pytest.mark.parametrize("dtype", ("float64", "bfloat16"))
def test_weights_cut_over_several_rings(
    ranks: RankPools, operator: str, transport: str, world: int, problem: dict[str, Any], dtype: str
) -> None:
    ranks(world).run(cases.check, operator, dtype, transport, problem)


@pytest.mark.parametrize(("world", "problem"), ((2, {"kv_heads": 1}), (3, {}), (4, {"kv_heads": 2})))
def test_references(ranks: RankPools, world: int, problem: dict[str, Any]) -> None:
    ranks(world).run(cases.check_references, problem)


@every_pair(mode=("fused", "unfused"), transport=TRANSPORTS, world=(1, 2, 4))
def test_bytes_equal_the_formula(ranks: RankPools, mode: str, transport: str, world: int) -> None:
    """Weights f·Pa forward, 2·f·Pa backward; activations 2·f·(L/N)·(d + κ) each way.

    κ is N·head_dim where there are fewer key and value heads than ranks.
    """
    tokens, head_dim, features = 12, 12, 24
    for rings, dtype in ((1, "float32"), (1, "bfloat16"), (2, "float32")):
        size = world // rings
        for kv_heads in {1, size} if size else ():
            share = (world - 1) / world * getattr(torch, dtype).itemsize
            inside = (size - 1) / size * getattr(torch, dtype).itemsize
            d, kappa = 2 * size * head_dim, max(size, kv_heads) * head_dim
            weights, out = (d + 2 * kv_heads * head_dim) * features * share, d * features * share
            qkv, o = tokens * (d + 2 * kappa) * inside, tokens * d * inside
            expected = {
                "linear_all_to_all": _by_collective(weights, qkv),
                "all_to_all_linear": _by_collective(out, o),
            }
            expected = {name: counts for name, counts in expected.items() if counts}
            for found in ranks(world).run(properties.traffic, mode, transport, dtype, kv_heads, rings):
                assert found == expected


def _by_collective(weights: float, activations: float) -> dict[str, int]:
    counts = {
        "forward all_gather": weights,
        "backward all_gather": weights,
        "backward reduce_scatter": weights,
        "forward all_to_all": activations,
        "backward all_to_all": activations,
    }
    return {name: round(count) for name, count in counts.items() if count}


@pytest.mark.parametrize(("world", "kv_heads"), ((2, 2), (4, 2), (4, 1)))
def test_bytes_of_attention(ranks: RankPools, world: int, kv_heads: int) -> None:
    tokens, head_dim, share = 12, 12, 4 * (world - 1) / world
    count = round(tokens * head_dim * (2 * world + 2 * max(world, kv_heads) + 2 * world) * share)
    expected = {f"ulysses_attention {phase} all_to_all": count for phase in ("forward", "backward")}
    assert ranks(world).run(properties.attention_traffic, kv_heads) == [expected] * world


@pytest.mark.parametrize("world", (1, 2))
def test_any_subset_of_gradients(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.some_gradients)


def test_default_attention_is_causal(ranks: RankPools) -> None:
    ranks(3).run(cases.causal)


def test_the_same_bits_every_time(ranks: RankPools) -> None:
    ranks(4).run(cases.same_mode_same_bits)


EXPECTED = {
    "inner": ("weight_shard", "in_features 7"),
    "bias": ("[6]", "[5]"),
    "biases": ("1 and 2",),
    "vector": ("[..., tokens, features]", "[8]"),
    "heads": ("2 ranks", "(6, 3)", "can be 1, 3"),
    "head counts": ("each of 2 weights", "(4,)"),
    "head rows": ("12 rows", "8 heads"),
    "no heads": ("above 0", "(0,)"),
    "tiles": ('"tiles"',),
    "out inner": ("in_features 7", "[2, 4, 8]"),
    "out length": ("divides by 2 ranks", "[2, 3, 6]"),
    "out bias": ("[4]", "[8]"),
    "out dtype": ("float32", "float64"),
    "zero3 group": ("multiple of the group's 2 ranks", "1 ranks"),
    "attention dims": ("[batch, heads, tokens, head_dim]", "[2, 4, 8]"),
    "attention heads": ("2 ranks", "(3, 3)", "can be 1, 3"),
    "attention kv": ("4 query, 3 key and 3 value heads",),
    "attention dtype": ("float32", "float64"),
}


def test_refusals(ranks: RankPools) -> None:
    for messages in ranks(2).run(properties.messages):
        assert set(messages) == set(EXPECTED)
        for name, parts in EXPECTED.items():
            for part in parts:
                assert part in messages[name], f"{name}: {part!r} is not in {messages[name]!r}"


@pytest.mark.parametrize(
    ("transport", "mode"), (("symmetric", "fused"), ("collective", "fused"), ("collective", "unfused"))
)
@pytest.mark.parametrize("what", ("bias", "frozen", "frozen bias"))
def test_every_rank_learns_which_one_means_another_projection(
    ranks: RankPools, what: str, transport: str, mode: str
) -> None:
    for message in ranks(3).run(properties.odd_rank, what, transport, mode):
        assert "rank 1 differs" in message and "linear_all_to_all" in message, message


def test_an_attention_of_another_shape_is_refused(ranks: RankPools) -> None:
    for message in ranks(2).run(properties.attention_that_returns_nonsense):
        assert "[1, 1, 8, 'any']" in message and "[1, 8, 1, 8]" in message


@pytest.mark.parametrize("world", (1, 2))
def test_opcheck(ranks: RankPools, world: int) -> None:
    ranks(world).run(properties.opcheck)


def test_inputs_that_attention_ignores(ranks: RankPools) -> None:
    ranks(2).run(cases.unused_inputs)


def test_saved_for_backward(ranks: RankPools) -> None:
    """The input of the projections, and what the output projection has received: as many elements as its input."""
    for first, both in ranks(3).run(properties.saved):
        assert first == [] and both == [2 * 6 * 3 * 24]


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("operator", OPERATORS[:2])
def test_no_weight_is_ever_whole(ranks: RankPools, operator: str, world: int) -> None:
    """Fused, on shared memory, not even a shard of another rank is copied; unfused the whole weight is."""
    assert max(ranks(world).run(properties.largest_allocation, operator, "fused")) < 1
    assert min(ranks(world).run(properties.largest_allocation, operator, "unfused")) >= world


def test_modes_that_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODYSSEUS_CACHE_DIR", str(tmp_path))  # read when it is used, so forked ranks do
    with RankPool(2, timeout=120) as pool:
        pool.run(cases.measured)


def test_compile_and_recompute(ranks: RankPools) -> None:
    ranks(2).run(properties.compiled, timeout=200)
