"""Sums and copies by the NVLink switch: needs two GPUs or more behind one, and is skipped elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import switch_cases as cases
import torch

from odysseus_kernels.testing.spawn import RankPool

pytestmark = pytest.mark.gpu


@pytest.fixture
def switched_ranks(gpu_ranks: Callable[[int], RankPool]) -> RankPool:
    """A rank for each GPU, at most eight; a skip that says why no switch adds for them."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: sums of a switch need two behind one")
    pool = gpu_ranks(min(torch.cuda.device_count(), 8))
    if reason := pool.run(cases.why_not)[0]:
        pytest.skip(reason)
    return pool


@pytest.mark.parametrize("mode", ("fused", "unfused"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("operator", cases.SETTINGS)
def test_against_fp64(switched_ranks: RankPool, operator: str, dtype: str, mode: Any) -> None:
    switched_ranks.run(cases.against_fp64, operator, dtype, mode)


def test_an_all_reduce_has_the_same_bits_on_all_ranks(switched_ranks: RankPool) -> None:
    switched_ranks.run(cases.same_bits)
