"""Ranks learn that they make the same call while the first product runs, and before anything of the call leaves."""

from __future__ import annotations

import uuid

import agreement_cases as cases
import pytest

from odysseus_kernels.comm.collective.agreement import Agreement
from odysseus_kernels.errors import RankMismatchError
from odysseus_kernels.testing.spawn import RankPools


@pytest.mark.parametrize("world", (2, 3))
def test_products_do_not_wait_for_peers_calls(ranks: RankPools, world: int) -> None:
    for seen in ranks(world).run(cases.computes_before_peers_come, uuid.uuid4().hex):
        assert set(seen) == {f"rank {peer}" for peer in range(world)}


@pytest.mark.parametrize("sends_ahead", (False, True))
@pytest.mark.parametrize("world", (2, 3))
def test_ranks_that_differ_are_told_and_go_on(ranks: RankPools, world: int, sends_ahead: bool) -> None:
    for rank, (message, seen) in enumerate(ranks(world).run(cases.nothing_leaves_before_ranks_agree, sends_ahead)):
        assert "[1, 9, 3]" in message and "[1, 8, 3]" in message
        # The first rank has nothing to multiply: it was sent something else ahead.
        assert bool(seen) == (rank > 0 and not sends_ahead)


def test_the_answer_is_waited_for_once() -> None:
    events: list[str] = []
    agreement = Agreement(lambda: events.append("answered"))
    assert not events
    agreement.wait()
    agreement.wait()
    assert events == ["answered"]


def test_ranks_that_differ_never_agree() -> None:
    def answer() -> None:
        raise RankMismatchError("rank 1 differs")

    agreement = Agreement(answer)
    for _ in range(2):
        with pytest.raises(RankMismatchError, match="rank 1 differs"):
            agreement.wait()
