"""Ring attention as torch sees it: registered, traced, compiled, recomputed."""

from __future__ import annotations

import pytest
import ring_graph_cases as cases

from odysseus_kernels.testing.spawn import RankPools


@pytest.mark.parametrize("world", (1, 2))
def test_opcheck(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.run_opcheck)


@pytest.mark.parametrize(
    "backend",
    # Of one graph the backends see the same operators; inductor's code around such operators: tests/ops/test_graphs.py.
    ("aot_eager", pytest.param("inductor", marks=pytest.mark.complete)),
)
def test_compile_with_fullgraph(ranks: RankPools, backend: str) -> None:
    ranks(2).run(cases.run_compiled, backend, timeout=200)


def test_compile_with_dynamic_shapes(ranks: RankPools) -> None:
    ranks(2).run(cases.run_compiled_shapes)


def test_activation_checkpointing(ranks: RankPools) -> None:
    ranks(2).run(cases.run_checkpointed)


def test_ranks_may_want_different_gradients(ranks: RankPools) -> None:
    ranks(2).run(cases.run_some_gradients)
