"""Which communicator a collective between GPUs uses: a small one beside products, the caller's where it is alone."""

from __future__ import annotations

from typing import Any

import lane_cases
import pytest

from odysseus_kernels.comm.collective.lanes import StreamLane
from odysseus_kernels.testing.spawn import run_ranks

pytestmark = pytest.mark.without_ranks


def _lane(own: Any) -> StreamLane:
    """Without a GPU, on which it would make its stream."""
    given: Any = "the caller's"
    lane = object.__new__(StreamLane)
    lane._given, lane._own, lane._alone = lambda: given, own, False
    return lane


def test_a_collective_that_is_alone_takes_what_nccl_takes_by_default() -> None:
    lane = _lane("of few blocks")
    assert lane.group == "of few blocks"
    seen: list[Any] = []

    def fail() -> None:
        with lane.alone():
            seen.append(lane.group)
            raise KeyError("of a collective")

    with pytest.raises(KeyError, match="of a collective"):
        fail()
    assert seen == ["the caller's"]
    assert lane.group == "of few blocks", "what follows runs beside products again"


def test_without_a_communicator_of_its_own_everything_takes_the_callers() -> None:
    lane = _lane(None)
    assert lane.group == "the caller's"
    with lane.alone():
        assert lane.group == "the caller's"


def test_what_is_unfused_is_alone_and_what_is_fused_is_not() -> None:
    """A reduce-scatter of 16 bits, too, which is sent as an all-to-all and added in fp32."""
    for told in run_ranks(lane_cases.told, 2):
        assert set(told) == {
            f"{name} {mode}" for name in ("all_gather_linear", "linear_reduce_scatter") for mode in ("unfused", "fused")
        }
        for name, alone in told.items():
            assert alone and set(alone) == {name.endswith("unfused")}, (name, alone)
