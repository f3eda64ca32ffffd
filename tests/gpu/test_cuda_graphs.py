"""Forward and backward of the operators in CUDA graphs, on ranks that may share one GPU."""

from __future__ import annotations

from collections.abc import Callable

import cuda_cases as cases
import pytest

from odysseus_kernels.testing.spawn import RankPool

pytestmark = pytest.mark.gpu

OPERATORS = ("all_gather_linear", "linear_reduce_scatter")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("mode", "dtype"), (("fused", "float32"), ("fused", "bfloat16"), ("unfused", "bfloat16"), ("tiles", "bfloat16"))
)
def test_replays_equal_eager_calls(gpu_ranks: Callable[[int], RankPool], operator: str, mode: str, dtype: str) -> None:
    assert gpu_ranks(2).run(cases.captured_operator, operator, mode, dtype) == [5, 5]
