"""Every operator on CUDA tensors against fp64 on unsharded data: ranks as processes, which may share one GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_cases as cases
import pytest

from odysseus_kernels.testing.spawn import RankPool

pytestmark = pytest.mark.gpu

Pools = Callable[[int], RankPool]

OPERATORS = ("all_gather_linear", "linear_reduce_scatter", "zero3_linear")
# Several weights, so that input gradients add up; for the other operators only the first counts.
BASE: dict[str, Any] = {"before": (2,), "rows": 12, "features": 24, "outputs": (16, 8)}
SHAPES: tuple[dict[str, Any], ...] = (
    {"before": (), "rows": 7, "features": 5, "outputs": (3,)},
    {"before": (), "rows": 5, "inner": (3,), "features": 6, "outputs": (4,)},
    {"before": (2, 3), "rows": 3, "inner": (2,), "features": 4, "outputs": (5,)},
    {"before": (3,), "rows": 1, "features": 9, "outputs": (7,)},
    {"before": (2,), "rows": 150, "features": 8, "outputs": (6,)},
    {"before": (2,), "rows": 6, "features": 8, "outputs": (6,), "contiguous": False},
    {"before": (2,), "rows": 6, "features": 8, "outputs": (6,), "bias": False},
)


@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16", "float16"))
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("world", (2, 4))
def test_against_fp64(gpu_ranks: Pools, world: int, operator: str, dtype: str) -> None:
    gathered = ("regather", "save") if world == 2 else ("regather",)
    gpu_ranks(world).run(cases.check, [(operator, dtype, "symmetric", BASE, ("auto",), gathered)])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("world", (2, 4))
def test_shapes(gpu_ranks: Pools, world: int, operator: str) -> None:
    pieces = (1, 3) if world == 2 else (2,)
    shapes = SHAPES if world == 2 else SHAPES[:3]
    checks = [(operator, "float64", "symmetric", shape, pieces, ("regather",)) for shape in shapes]
    gpu_ranks(world).run(cases.check, checks)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float32"))
@pytest.mark.parametrize("operator", OPERATORS[:2])
def test_one_kernel_whose_tiles_wait_and_signal(gpu_ranks: Pools, operator: str, dtype: str) -> None:
    """``mode="tiles"``, with rows of 16 bytes and without: through descriptors and through pointers."""
    shapes = (
        {"before": (), "rows": 40, "features": 64, "outputs": (48,), "bias": False},
        {"before": (), "rows": 33, "features": 21, "outputs": (19,), "bias": False},
    )
    checks = [(operator, dtype, "symmetric", shape, (1, 2), ("regather",)) for shape in shapes]
    gpu_ranks(2).run(cases.check, checks, ("tiles",))
