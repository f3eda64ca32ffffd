"""What one call sends ahead for the next: free of races and deadlocks behind and before every program."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from odysseus_kernels.comm.schedules.collective import collective_schedule, sends_ahead_after
from odysseus_kernels.comm.schedules.leases import Lease, LeaseTable
from odysseus_kernels.comm.schedules.steps import (
    SENT,
    SHARD,
    Kind,
    Schedule,
    Task,
    sends_ahead_at,
    symmetric_schedule,
)
from odysseus_kernels.testing import happens_before
from odysseus_kernels.testing.happens_before import CallSpec, ScheduleError, bind, interleave, prove

pytestmark = pytest.mark.without_ranks

EXCHANGES = ("exchange", "exchange:given", "exchange:made")
SENDERS = ("gather", "scatter", "gather+scatter", *EXCHANGES)
RECEIVERS = ("gather", "gather+scatter", "exchange", "exchange:given")


@pytest.mark.parametrize("world", (2, 3, 4, 8))
@pytest.mark.parametrize("sender", SENDERS)
@pytest.mark.parametrize("receiver", RECEIVERS)
def test_what_any_call_sends_ahead(sender: Any, receiver: Any, world: int) -> None:
    """Back to back, so that windows are used again while others hold what was sent ahead."""
    for addressed in (False, True) if receiver.startswith("exchange") else (False,):
        pair = [CallSpec(sender, 2, 3, prefetch=True), CallSpec(receiver, 2, 3, addressed=addressed)]
        events = bind(world, pair * 4)
        assert prove(events) > 0
        for seed in range(3):
            interleave(events, seed)


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("sender", SENDERS)
def test_a_window_that_does_not_outlive_the_call_that_sends_ahead_is_caught(
    sender: Any, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:

    class Short(LeaseTable):
        """When a call gives back a window, all that are leased are free again."""

        leased: list[int]

        def lease(self) -> Lease:
            lease = super().lease()
            self.leased = [*getattr(self, "leased", []), lease.window]
            return lease

        def give_back(self, lease: Lease, counts: Any, readers: Any) -> None:
            super().give_back(lease, counts, readers)
            self._free = [*(window for window in self.leased if window not in self._free), *self._free]
            self.leased = []

    monkeypatch.setattr(happens_before, "LeaseTable", Short)
    with pytest.raises(ScheduleError, match="not ordered|another write|does not grow"):
        prove(bind(world, [CallSpec(sender, prefetch=True), CallSpec("gather+scatter")] * 3))


# Other senders signal something else before anybody reads the shard, which orders it as well.
@pytest.mark.parametrize("sender", ("gather", "scatter", "exchange:given", "exchange:made"))
def test_a_shard_that_is_signalled_before_it_is_sent_ahead_is_caught(
    sender: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    early = happens_before.publication
    monkeypatch.setattr(happens_before, "publication", lambda *which: early(*which)[::-1])
    with pytest.raises(ScheduleError, match="not ordered"):
        prove(bind(3, [CallSpec(sender, prefetch=True), CallSpec("gather")] * 2))


@pytest.mark.parametrize("program", ("exchange", "exchange:given"))
@pytest.mark.parametrize(
    ("left_out", "found"),
    (
        pytest.param(
            lambda step: step.kind is Kind.WAIT and step.word.buffer == SHARD and step.word.is_ready,
            "not ordered",
            id="read before it has arrived",
        ),
        pytest.param(
            lambda step: step.kind is Kind.RELEASE and step.word.buffer == SENT,
            "no signal|deadlock",
            id="never released",
        ),
    ),
)
def test_a_broken_use_of_what_was_sent_ahead_is_caught(program: Any, left_out: Any, found: str) -> None:
    calls = [CallSpec("scatter", prefetch=True), CallSpec(program, addressed=True)] * 3
    prove(bind(3, calls))

    def broken(program: Any, world: int, rank: int, **options: Any) -> Schedule:
        whole = symmetric_schedule(program, world, rank, **options)
        steps = tuple(step for step in whole.steps if step.word is None or not left_out(step))
        return dataclasses.replace(whole, steps=steps)

    with pytest.raises(ScheduleError, match=found):
        prove(bind(3, calls, broken))


def test_what_is_sent_ahead_holds_up_nothing() -> None:
    """It comes behind what the call publishes itself, and before its first wait."""
    for program in SENDERS:
        schedule = symmetric_schedule(program, 4, 1, gather_pieces=2, scatter_pieces=2)
        before = schedule.steps[: sends_ahead_at(schedule)]
        assert Kind.WAIT not in {step.kind for step in before}
        published = [step for step in schedule.steps if step.task is Task.PUBLISH]
        assert [step for step in before if step.task is Task.PUBLISH] == published
        steps = collective_schedule(program, 4, 1, gather_pieces=5, scatter_pieces=5)
        first, second = sends_ahead_after(steps)
        tasks = {step.task for step in steps.steps[first + 1 :] if step.kind is Kind.ISSUE}
        assert not tasks & {Task.ALL_GATHER, Task.LATE_GATHER, Task.GIVEN}
        # The second delays nothing at all.
        assert first < second
        later = {step.kind for step in steps.steps[second + 1 :]}
        assert Kind.ISSUE not in later
        assert Kind.FINISH not in later or steps.steps[second].task not in (None, Task.ALL_GATHER, Task.LATE_GATHER)
