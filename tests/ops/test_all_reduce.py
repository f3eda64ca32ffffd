"""Tensor parallelism's operators: every mode × transport × dtype × number of ranks against fp64, bytes, refusals."""

from __future__ import annotations

from typing import Any

import all_reduce_cases as cases
import pytest
import torch
from covering import every_pair

from odysseus_kernels.testing.spawn import RankPools

OPERATORS = tuple(cases.CHECKS)
TRANSPORTS = ("symmetric", "collective")


@every_pair(operator=OPERATORS, transport=TRANSPORTS, dtype=("float64", "float32", "bfloat16"), world=(1, 2, 3, 4))
def test_against_fp64(ranks: RankPools, operator: str, transport: str, dtype: str, world: int) -> None:
    ranks(world).run(cases.check, operator, dtype, transport, {})


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "problem",
    (
        pytest.param({"before": (37,)}, id="blocks that do not divide"),
        pytest.param({"before": (1,)}, id="fewer rows than ranks"),
        pytest.param({"before": (2, 3, 4), "contiguous": False, "bias": False}, id="strided, no bias"),
        pytest.param({"before": (2, 300), "outputs": (8,)}, id="long"),
    ),
)
def test_shapes(ranks: RankPools, operator: str, transport: str, world: int, problem: dict[str, Any]) -> None:
    ranks(world).run(cases.check, operator, "float64", transport, problem, (1, 4, 7))


def test_references(ranks: RankPools) -> None:
    ranks(3).run(cases.check_references)


@every_pair(mode=("fused", "unfused"), transport=TRANSPORTS, world=(1, 2, 3, 4))
def test_bytes_equal_the_formula(ranks: RankPools, mode: str, transport: str, world: int) -> None:
    """2·(N-1)/N of the sum; rows that do not divide are filled up to a multiple of the ranks."""
    for dtype, rows, pieces in (("float32", 6, 1), ("bfloat16", 6, 4), ("float32", 5, 4)):
        lines = -(-2 * rows // world) * world
        share = 2 * (world - 1) * lines // world * getattr(torch, dtype).itemsize
        expected = {
            "linear_all_reduce forward all_reduce": 10 * share,
            "column_parallel_linear backward all_reduce": 24 * share,
        }
        for found in ranks(world).run(cases.traffic, mode, transport, dtype, rows, pieces):
            assert found == (expected if world > 1 else {})


def test_any_subset_of_gradients(ranks: RankPools) -> None:
    ranks(2).run(cases.some_gradients)


def test_no_rows(ranks: RankPools) -> None:
    ranks(2).run(cases.no_rows)


EXPECTED = {
    "row inner": ("linear_all_reduce", "in_features 7", "[2, 4, 8]"),
    "row bias": ("[6]", "[5]"),
    "row dtype": ("float32", "float64"),
    "row tiles": ('"tiles"',),
    "column inner": ("column_parallel_linear", "in_features 7"),
    "column biases": ("1 and 2",),
    "column tiles": ('"tiles"',),
}


def test_refusals(ranks: RankPools) -> None:
    for messages in ranks(2).run(cases.messages):
        assert set(messages) == set(EXPECTED)
        for name, parts in EXPECTED.items():
            for part in parts:
                assert part in messages[name], f"{name}: {part!r} is not in {messages[name]!r}"


@pytest.mark.parametrize("world", (1, 2))
def test_opcheck(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.opcheck)


def test_compile_with_fullgraph(ranks: RankPools) -> None:
    ranks(2).run(cases.compiled, timeout=200)


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
@pytest.mark.parametrize("mode", ("fused", "unfused"))
def test_an_all_reduce_is_one_call(ranks: RankPools, mode: str, transport: str) -> None:
    for counted in ranks(2).run(cases.calls, mode, transport, 6):
        assert counted == [
            ("all_reduce forward", 1), ("column_parallel_linear backward", 1), ("linear_all_reduce forward", 1)
        ]  # fmt: skip
