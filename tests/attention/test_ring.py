"""Ring attention against fp64 on the whole sequence: output and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import ring_cases as cases

from odysseus_kernels.testing.spawn import RankPools

TRANSPORTS = ("symmetric", "collective")
MODES = ("fused", "unfused")


@pytest.mark.parametrize("world", (1, 2, 3, 4))
@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16", "float16"))
@pytest.mark.parametrize(
    "problem",
    (
        pytest.param({}, id="causal"),
        pytest.param({"causal": False, "kv_heads": 4}, id="whole"),
        pytest.param({"documents": "packed"}, id="documents"),
        pytest.param({"window": 19}, id="window"),
    ),
)
def test_against_fp64(ranks: RankPools, dtype: str, world: int, problem: dict[str, Any]) -> None:
    ranks(world).run(cases.check, dtype, TRANSPORTS, MODES, problem)
