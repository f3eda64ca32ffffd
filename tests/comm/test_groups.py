"""Several groups, groups made again, ranks that disagree about the transport, and weights that are sent ahead."""

from __future__ import annotations

import uuid

import group_cases as cases
import pytest

from odysseus_kernels.testing.spawn import RankPools, run_ranks

TRANSPORTS = ("symmetric", "collective")


def test_groups_side_by_side(ranks: RankPools) -> None:
    ranks(4).run(cases.subgroups)


def test_group_made_again_under_its_name() -> None:
    for reasons in run_ranks(cases.made_again, 2, uuid.uuid4().hex, timeout=60):
        # Given back with the group, not at the end of the process.  (The first group is held by the test's ranks.)
        assert reasons[1:] == ["the transport was closed"] * 2


def test_different_transports_in_the_first_call() -> None:
    for error, message in run_ranks(cases.different_transports, 3, timeout=60):
        assert error == "RankMismatchError" and "rank 0 differs" in message and "'collective'" in message


def test_endless_timeout(ranks: RankPools) -> None:
    ranks(2).run(cases.endless_timeout)


def test_a_process_group_out_of_step_is_not_used_again() -> None:
    outcomes = run_ranks(cases.out_of_step, 2, timeout=60, expect_failure=True)
    (first, _), (second, message), seconds = outcomes[0].result
    assert first == "SignalTimeoutError"
    assert second == "CommunicationError" and "make it again" in message
    assert seconds < 1


def test_reduce_dtype(ranks: RankPools) -> None:
    ranks(3).run(cases.wide_sum)


def test_autocast(ranks: RankPools) -> None:
    ranks(2).run(cases.autocast)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_weights_sent_ahead_before_an_optimizer_step(ranks: RankPools, transport: str) -> None:
    ranks(2).run(cases.stepped_weights, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_step_between_sending_and_using(ranks: RankPools, transport: str) -> None:
    for found in ranks(2).run(cases.step_between, transport):
        assert found == {"served": 0, "open": 2, "dropped": 1}


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_weights_sent_ahead_are_used(ranks: RankPools, transport: str, bias: bool) -> None:
    for found in ranks(2).run(cases.adopted, transport, bias):
        assert found == [True, True]  # the second product's in forward, the first one's in backward


def test_ranks_that_send_different_things_ahead() -> None:
    for error, message in run_ranks(cases.different_prefetches, 3, timeout=60):
        assert error == "RankMismatchError" and "rank 0 differs" in message and "sends ahead" in message
