"""The collective transport over NCCL; where there is one GPU, several ranks share it if NCCL can be made to."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_cases as cases
import pytest
import torch
import torch.distributed as dist
from cuda_cases import ENVIRONMENT

from odysseus_kernels.testing.spawn import RankPool

pytestmark = pytest.mark.gpu

_WORLD = 2
_LOOPBACK = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
# Name, environment, and whether each rank says that it is a machine of its own.
_WAYS = (
    ("a GPU for each rank", {}, False),
    ("NCCL_MULTI_RANK_GPU_ENABLE=1", {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}, False),
    ("a distinct NCCL_HOSTID for each rank", _LOOPBACK, True),
)
BASE = {"before": (2,), "rows": 12, "features": 24, "outputs": (16, 8)}


@pytest.fixture(scope="module")
def nccl_ranks() -> Iterator[RankPool]:
    """Ranks whose NCCL works; a skip with what NCCL says where it does not."""
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    reasons = []
    for name, variables, own_host in _WAYS[1:] if torch.cuda.device_count() < _WORLD else _WAYS[:1]:
        environment = {**ENVIRONMENT, **variables}
        with RankPool(_WORLD, timeout=60, backend="cpu:gloo,cuda:nccl", environment=environment) as pool:
            outcomes = pool.outcomes(cases.try_nccl, own_host, timeout=15)
            if all(outcome.ok and outcome.result == _WORLD for outcome in outcomes):
                yield pool
                return
        said = next((outcome.message for outcome in outcomes if not outcome.ok), "a wrong sum")
        lines = [line for line in said.splitlines() if line.strip()]
        reasons.append(f"{name}: {' '.join(lines)[-300:]}")
    pytest.skip("NCCL does not run here with two ranks: " + "; ".join(reasons))


def test_calls_travel_by_the_collective_transport(nccl_ranks: RankPool) -> None:
    assert nccl_ranks.run(cases.recorded_transport) == [["collective"]] * _WORLD


@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16", "float16"))
@pytest.mark.parametrize("operator", ("all_gather_linear", "linear_reduce_scatter", "zero3_linear"))
def test_against_fp64(nccl_ranks: RankPool, operator: str, dtype: str) -> None:
    nccl_ranks.run(cases.check, [(operator, dtype, "collective", BASE, ("auto", 3), ("regather", "save"))])
