"""The operators as torch sees them: registered, traced, compiled, recomputed."""

from __future__ import annotations

import graph_cases as cases
import pytest

from odysseus_kernels.testing.spawn import RankPools


@pytest.mark.parametrize("world", (1, 2))
def test_opcheck(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.run_opcheck)


@pytest.mark.parametrize("gathered", ("regather", "save"))
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile_with_fullgraph(ranks: RankPools, backend: str, gathered: str) -> None:
    ranks(2).run(cases.run_compiled, backend, gathered, timeout=200)


def test_compile_with_dynamic_shapes(ranks: RankPools) -> None:
    ranks(2).run(cases.run_compiled_shapes)


@pytest.mark.parametrize("world", (2, 3))
def test_activation_checkpointing(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.run_checkpointed)


def test_any_subset_of_gradients(ranks: RankPools) -> None:
    ranks(2).run(cases.run_some_gradients)


def test_unused_projection(ranks: RankPools) -> None:
    ranks(2).run(cases.run_unused_output)
