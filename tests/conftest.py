"""Ranks for all tests: persistent processes, one pool for each world size; and what may run beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from odysseus_kernels.testing.spawn import RankPools


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """``ranks(world_size).run(function, *arguments)`` runs a module's function on that many ranks."""
    with RankPools(threads=1, timeout=120) as pools:
        yield pools


# Files that start no ranks, keep one core busy and take long.  With ``-n 2 --dist loadgroup`` they run beside all other
# tests, which stay in order in one process: ranks want the machine for themselves, and share one set of pools.
_WITHOUT_RANKS = {
    "comm/test_device_schedule.py",
    "comm/test_schedule.py",
    "comm/test_symmetric_device.py",
    "kernels/test_compiled.py",
    "kernels/test_interpreted.py",
    "kernels/test_specialized.py",
    "test_ext_cuda.py",
    "test_ext_cuda_binary.py",
    "test_run_gpu.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups tests for parallel runs, and skips tests marked ``gpu`` where there is none."""
    for item in items:
        if config.pluginmanager.hasplugin("xdist"):
            name = item.path.relative_to(Path(__file__).parent).as_posix()
            item.add_marker(pytest.mark.xdist_group(name if name in _WITHOUT_RANKS else "ranks"))
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU that torch can use"))
