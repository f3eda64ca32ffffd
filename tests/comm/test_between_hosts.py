"""Operators between hosts over the collective transport: tapered pieces in the order for slow links, exact."""

from __future__ import annotations

import between_hosts_cases as cases
import pytest
import torch

from odysseus_kernels.testing.spawn import RankPools


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("world", (2, 3, 4))
def test_operators_are_exact(ranks: RankPools, world: int, dtype: torch.dtype) -> None:
    ranks(world).run(cases.operators, dtype, world)
