"""Several ranks in one process on one GPU: the transport's calls back to back, captured, and with a rank missing.

They run in a process of its own, which has as many hardware queues as there are streams, and all kernels loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import virtual_cases as cases

from odysseus_kernels.testing.spawn import RankPool

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def process() -> Iterator[RankPool]:
    """One process; ranks are within."""
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}
    with RankPool(1, timeout=90, environment=environment) as pool:
        yield pool


def test_unwritten_memory_is_nan(process: RankPool) -> None:
    process.run(cases.memory_is_poisoned, 2)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16", "float64"))
@pytest.mark.parametrize("world", (2, 3, 4))
def test_calls_back_to_back(process: RankPool, world: int, dtype: str) -> None:
    assert process.run(cases.back_to_back, world, dtype, world) == [48]


@pytest.mark.parametrize("world", (2, 4))
def test_shards_sent_ahead(process: RankPool, world: int) -> None:
    process.run(cases.sent_ahead, world)


@pytest.mark.parametrize("world", (2, 4))
def test_whole_tensors_in_place(process: RankPool, world: int) -> None:
    process.run(cases.whole_tensors, world)


@pytest.mark.parametrize("world", (2, 3))
def test_graphs_are_replayed_between_eager_calls(process: RankPool, world: int) -> None:
    process.run(cases.captured, world)


@pytest.mark.parametrize("program", ("gather", "scatter"))
def test_a_rank_that_never_calls_is_named(process: RankPool, program: str) -> None:
    (told,) = process.run(cases.dropped_rank, 3, program)
    assert len(told) == 2
    for rank, (error, message, seconds) in enumerate(told):
        assert error == "SignalTimeoutError"
        assert f"operator (forward): rank {rank} waited for rank 2 to " in message
        assert "chunk" in message
        assert "within 1 s" in message
        assert seconds < 10
