"""Multiprocessors that sums hold beside products."""

from __future__ import annotations

import math

import pytest

from odysseus_kernels.planner.hardware import KNOWN_GPUS, PCIE5_BYTES_PER_S
from odysseus_kernels.planner.sums import SUM_BYTES_PER_S, SUM_MULTIPROCESSORS, sum_multiprocessors

pytestmark = pytest.mark.without_ranks


@pytest.mark.parametrize(
    ("world", "link", "held"),
    (
        (8, 0, 4),  # unknown
        (8, PCIE5_BYTES_PER_S, 4),
        (8, 280e9, 4),  # 320 GB/s read: what four add
        (8, 281e9, 5),
        (8, 450e9, 7),
        (2, 450e9, 12),  # half of what is added is the rank's own
        (8, 900e9, 13),
        (2, 900e9, 16),  # 23 would slow products down
    ),
)
def test_four_unless_the_link_is_faster(world: int, link: float, held: int) -> None:
    assert sum_multiprocessors(world, link) == held


def test_a_sum_keeps_up_with_every_known_link_or_holds_all_that_it_may() -> None:
    for gpu in KNOWN_GPUS:
        for world in range(2, 17):
            held = sum_multiprocessors(world, gpu.link_bytes_per_s)
            assert SUM_MULTIPROCESSORS <= held <= 16, gpu.name
            brought = held * SUM_BYTES_PER_S * (world - 1) / world
            assert brought >= gpu.link_bytes_per_s or held == 16, gpu.name


@pytest.mark.parametrize(("world", "link"), ((1, 1e9), (2, -1.0), (2, math.inf), (2, math.nan)))
def test_misuse(world: int, link: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        sum_multiprocessors(world, link)
