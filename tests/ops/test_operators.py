"""Every operator × mode × transport × dtype × gathered choice × world size against fp64 on unsharded data."""

from __future__ import annotations

from typing import Any

import operator_cases as cases
import pytest
import torch
from covering import every_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from odysseus_kernels.testing.spawn import RankPools

OPERATORS = tuple(cases.CHECKS)
TRANSPORTS = ("symmetric", "collective")
DTYPES = ("float64", "float32", "bfloat16", "float16")
WORLDS = (1, 2, 3, 4)

# Several weights, so that input gradients add up; for the other operators only the first counts.
BASE = {"before": (2,), "rows": 12, "features": 24, "outputs": (16, 8)}


@every_pair(operator=OPERATORS, transport=TRANSPORTS, dtype=DTYPES, world=WORLDS)
def test_against_fp64(ranks: RankPools, operator: str, transport: str, dtype: str, world: int) -> None:
    ranks(world).run(cases.check, operator, dtype, transport, BASE)


@pytest.mark.parametrize("world", (2, 3))
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "problem",
    (
        pytest.param({"before": (), "rows": 7, "features": 5, "outputs": (3,)}, id="no batch, odd sizes"),
        pytest.param({"before": (), "rows": 5, "inner": (3,), "features": 6, "outputs": (4,)}, id="sequence first"),
        pytest.param({"before": (2, 3), "rows": 3, "inner": (2,), "features": 4, "outputs": (5,)}, id="four dims"),
        pytest.param({"before": (3,), "rows": 1, "features": 9, "outputs": (7,)}, id="single row"),
        pytest.param({"before": (2,), "rows": 150, "features": 8, "outputs": (6,)}, id="long rows in a batch"),
        pytest.param({"before": (2,), "rows": 6, "features": 8, "outputs": (6,), "contiguous": False}, id="strided"),
        pytest.param({"before": (2,), "rows": 6, "features": 8, "outputs": (6,), "bias": False}, id="no bias"),
    ),
)
def test_shapes(ranks: RankPools, operator: str, transport: str, world: int, problem: dict[str, Any]) -> None:
    ranks(world).run(cases.check, operator, "float64", transport, problem, (1, 3, "auto"), ("regather",))


@pytest.mark.parametrize("before", ((), (2,)))
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_bias_gradients_are_the_same_bits(
    ranks: RankPools, dtype: str, transport: str, before: tuple[int, ...]
) -> None:
    """Ranks visit chunks in orders of their own; a replicated parameter must not drift apart by that."""
    for world in (2, 3, 4):
        first, *others = ranks(world).run(cases.bias_gradients, dtype, transport, before)
        for other in others:
            assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world=st.sampled_from((2, 3, 4)),
    operator=st.sampled_from(OPERATORS),
    transport=st.sampled_from(TRANSPORTS),
    before=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 40),
    inner=st.lists(st.integers(1, 3), max_size=1),
    features=st.integers(4, 33),
    outputs=st.lists(st.integers(4, 17), min_size=1, max_size=3),
    pieces=st.one_of(st.just("auto"), st.integers(1, 9)),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    ranks: RankPools,
    world: int,
    operator: str,
    transport: str,
    before: list[int],
    rows: int,
    inner: list[int],
    features: int,
    outputs: list[int],
    pieces: int | str,
    seed: int,
) -> None:
    problem = {
        "before": tuple(before),
        "rows": rows,
        "inner": tuple(inner),
        "features": features,
        "outputs": tuple(outputs),
        "seed": seed,
    }
    ranks(world).run(cases.check, operator, "float64", transport, problem, (pieces,), ("regather",))
