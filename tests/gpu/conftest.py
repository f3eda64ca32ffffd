"""GPU tests: skipped with a reason where nothing can run them; ranks as processes that may share one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cuda_cases import ENVIRONMENT

from odysseus_kernels import _ext
from odysseus_kernels.testing.spawn import RankPool

_HERE = Path(__file__).resolve().parent


def why_no_gpu() -> str:
    """One line that says why GPU tests cannot run here; empty where they can."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU that torch can use"
    return _ext.why_no_cuda() or str(_ext.load().cuda.why_unavailable())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    for item in items:
        if reason and _HERE in item.path.parents and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def gpu_ranks() -> Iterator[Callable[[int], RankPool]]:
    """``gpu_ranks(world)`` runs functions on ranks with GPU ``rank % count`` each and a Gloo group beside."""
    pools: dict[int, RankPool] = {}

    def get(world: int) -> RankPool:
        if world not in pools:
            pools[world] = RankPool(world, timeout=90, environment=ENVIRONMENT)
        return pools[world]

    yield get
    for pool in pools.values():
        pool.close()
