"""Exchanges on both transports: exact, in ring order, counted, and with errors that say who and what."""

from __future__ import annotations

import exchange_cases as cases
import exchange_failure_cases as failures
import pytest

from odysseus_kernels.testing.spawn import RankPools, run_ranks

TRANSPORTS = ("symmetric", "collective")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", (1, 2, 3, 4))
def test_all_that_is_given_and_made_arrives(ranks: RankPools, world: int, transport: str) -> None:
    ranks(world).run(cases.all_cases, transport)


@pytest.mark.parametrize(("world", "transport"), ((2, "symmetric"), (4, "symmetric"), (3, "collective")))
def test_between_operators(ranks: RankPools, world: int, transport: str) -> None:
    ranks(world).run(cases.between_operators, transport, world, 60 if transport == "symmetric" else 30)


@pytest.mark.parametrize("world", (2, 3, 4))
def test_sums_are_those_of_the_fixed_order(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.rounded_sums)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", (2, 3))
def test_bytes(ranks: RankPools, world: int, transport: str) -> None:
    ranks(world).run(cases.traffic, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", (2, 3, 4))
def test_parts_that_nobody_takes_are_not_moved(ranks: RankPools, world: int, transport: str) -> None:
    for found in ranks(world).run(cases.only_what_is_taken_moves, transport):
        for moved, taken in found:
            # Tensors of a bundle begin at multiples of 64 bytes.
            assert taken <= moved < taken + 64 * 8 * world and (moved == taken or transport == "collective")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", (1, 2, 3))
def test_all_to_all(ranks: RankPools, world: int, transport: str) -> None:
    ranks(world).run(cases.plain, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("what", ("shared", "received", "program", "operator", "parts"))
def test_every_rank_learns_which_one_differs(ranks: RankPools, transport: str, what: str) -> None:
    for error, message in ranks(3).run(failures.odd_rank, transport, what, 1):
        assert error == "RankMismatchError" and "rank 1 differs" in message and "probe forward" in message, message


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_rank_is_an_error_on_every_survivor(transport: str) -> None:
    outcomes = run_ranks(failures.killed_rank, 4, transport, 1, timeout=60, expect_failure=True)
    assert outcomes[1].exit_code == -9
    for survivor in (0, 2, 3):
        assert outcomes[survivor].ok, outcomes[survivor].describe()
        error, message, seconds = outcomes[survivor].result
        assert error == "PeerLostError" and "rank 1" in message and "probe (forward)" in message, (error, message)
        assert seconds < 0.5 + 2.0  # it died half a second after the others began to wait


@pytest.mark.parametrize("asked", ("auto", "symmetric"))
def test_a_transport_without_exchanges(asked: str) -> None:
    for used, messages in run_ranks(failures.not_served, 2, asked, timeout=60):
        assert used == ["collective"] * 3
        assert len(messages) == (1 if asked == "symmetric" else 0), messages
        assert all("serves no exchange" in message for message in messages)


def test_too_little_shared_memory_on_one_rank() -> None:
    for used, messages in run_ranks(failures.short_memory, 2, 1, timeout=60):
        assert used == ["symmetric", "collective", "collective", "symmetric"]
        assert len(messages) == 1 and "probe (forward) needs" in messages[0] and "rank 1" in messages[0], messages


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bad_exchanges_are_refused(ranks: RankPools, transport: str) -> None:
    found = ranks(2).run(failures.bad_exchanges, transport)[0]
    assert len(found) == 7
    for expected, message in found:
        assert expected in message, (expected, message)
