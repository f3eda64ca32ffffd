"""Operators make sure of their kernels before they rely on them."""

from __future__ import annotations

import importlib.util

import pytest
import tile_cases

from odysseus_kernels.testing.spawn import RankPools


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there are no kernels without Triton")
def test_each_operator_prepares_the_kernels_that_it_runs(ranks: RankPools) -> None:
    for found in ranks(2).run(tile_cases.prepared):
        assert found == {
            "all_gather_linear": ["gather_matmul"],
            "all_gather_linear backward": ["matmul_scatter", "weight_gradient", "weight_gradient"],
            "linear_reduce_scatter": ["matmul_scatter"],
            "linear_reduce_scatter backward": ["gather_matmul", "weight_gradient"],
            "all_gather_linear of a batch": [],
            "all_gather_linear of a batch backward": [],
        }
