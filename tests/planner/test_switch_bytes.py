"""Bytes and seconds of what a switch adds and copies, worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from odysseus_kernels.planner.cost_model import LINK_SHARE, MEMORY_SHARE, PRODUCT_SHARE, Work, link_seconds, predict
from odysseus_kernels.planner.hardware import KNOWN_GPUS, Hardware
from odysseus_kernels.planner.sums import SWITCH_BYTES_PER_S, sum_multiprocessors, switch_multiprocessors
from odysseus_kernels.planner.switch import switch_link_bytes, switch_traffic

pytestmark = pytest.mark.without_ranks

SIMPLE = Hardware("simple", {"float32": 1.0 / PRODUCT_SHARE}, 1.0 / MEMORY_SHARE, 1.0 / LINK_SHARE, 0.5, 0.25)


@pytest.mark.parametrize(
    ("collective", "world", "sent", "received"),
    (
        ("reduce_scatter", 8, 80, 10),  # a part for each of 8 owners, and one sum
        ("all_gather", 8, 10, 80),  # stored once, and all 8 chunks arrive, the own one too
        ("reduce_scatter", 2, 20, 10),
        ("reduce_scatter", 1, 0, 0),
        ("all_gather", 1, 0, 0),
    ),
)
def test_bytes_of_one_link(collective: str, world: int, sent: int, received: int) -> None:
    assert switch_traffic(collective, 10, world) == (sent, received)  # type: ignore[arg-type]


def test_other_collectives_are_refused() -> None:
    with pytest.raises(ValueError, match='"all_gather" or "reduce_scatter", got'):
        switch_traffic("all_to_all", 10, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gathered", "scattered", "busier"), ((0, 10, 80), (10, 0, 80), (10, 10, 90), (10, 30, 250), (30, 10, 250))
)
def test_the_busier_direction_is_what_takes_time(gathered: int, scattered: int, busier: int) -> None:
    assert switch_link_bytes(gathered, scattered, 8) == busier
    work = Work(1.0, 8, "float32", gathered, scattered, switched=True)
    assert math.isclose(link_seconds(work, SIMPLE), busier)


def test_an_all_reduce_gains_and_a_reduce_scatter_alone_does_not() -> None:
    """Of the link's time, at N = 8: 9 chunks instead of 14, and 8 instead of 7."""
    for gathered, ratio in ((10.0, 9 / 14), (0.0, 8 / 7)):
        ranks = Work(1.0, 8, "float32", gathered, 10.0)
        switch = dataclasses.replace(ranks, switched=True)
        assert math.isclose(link_seconds(switch, SIMPLE) / link_seconds(ranks, SIMPLE), ratio)
        by_mode = (predict(switch, SIMPLE), predict(ranks, SIMPLE))
        assert all((by_mode[0][mode] < by_mode[1][mode]) == (ratio < 1) for mode in ("unfused", "fused"))


@pytest.mark.parametrize(
    ("world", "link", "held"), ((8, 0, 4), (8, 450e9, 4), (8, 900e9, 4), (4, 900e9, 8), (2, 900e9, 15))
)
def test_few_multiprocessors_suffice(world: int, link: float, held: int) -> None:
    assert switch_multiprocessors(world, link) == held


def test_a_switch_holds_enough_for_every_known_link() -> None:
    for gpu in KNOWN_GPUS:
        for world in range(2, 17):
            held = switch_multiprocessors(world, gpu.link_bytes_per_s)
            assert held * SWITCH_BYTES_PER_S >= gpu.link_bytes_per_s / world
            if world > 3:
                assert held <= sum_multiprocessors(world, gpu.link_bytes_per_s)


@pytest.mark.parametrize(("world", "link"), ((1, 1e9), (2, -1.0), (2, math.inf), (2, math.nan)))
def test_misuse(world: int, link: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        switch_multiprocessors(world, link)
