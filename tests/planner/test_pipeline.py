"""The time of a pipelined block against its schedule, carried out step by step."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odysseus_kernels.comm.schedules.collective import collective_schedule
from odysseus_kernels.comm.schedules.steps import Kind, Task
from odysseus_kernels.planner.pipeline import piece_shares, pipelined_seconds

SECONDS = st.floats(0, 3, allow_subnormal=False)
CARRIED = {Task.ALL_GATHER: "gathered", Task.LATE_GATHER: "late", Task.ALL_TO_ALL: "scattered"}


def carried_out(pieces: int, ranks: int, times: dict[str, float], *, backward: bool) -> float:
    """Seconds of rank 0's steps: one host, and one link that carries what is issued in that order."""
    shares = piece_shares(pieces)
    ends = [sum(shares[:index]) / sum(shares) for index in range(pieces + 1)]
    parts = list(itertools.pairwise(ends))[:: -1 if backward else 1]
    late = "late" in times
    schedule = collective_schedule("pipeline", ranks, 0, gather_pieces=pieces, scatter_pieces=pieces, late=late)
    now, free, done = 0.0, 0.0, {}
    for step in schedule.steps:
        start, stop = parts[step.piece]
        part = stop - start
        if step.kind is Kind.ISSUE:
            free = max(now, free) + part * times[CARRIED[step.task]]
            done[step.task, step.piece] = free
        elif step.kind is Kind.FINISH:
            now = max(now, done[step.task, step.piece])
        elif step.task is Task.CONSUME:
            now += part * times["before"] / ranks
        elif step.task is Task.PROCESS:
            now += (stop**2 - start**2) * times["attention"]
        elif step.task is Task.PRODUCE:
            now += part * times["after"] / ranks
        elif step.task is Task.CONCLUDE:
            now += part * times["concluding"] / ranks
    return now


@given(
    pieces=st.sampled_from((1, 2, 3, 4, 8, 11)),
    ranks=st.integers(2, 5),
    values=st.tuples(*[SECONDS] * 7),
    backward=st.booleans(),
    late=st.booleans(),
)
def test_seconds_are_those_of_the_schedule(pieces, ranks, values, backward, late) -> None:
    names = ("gathered", "scattered", "before", "attention", "after", *(("late", "concluding") if late else ()))
    times = dict(zip(names, values, strict=False))
    found = pipelined_seconds(pieces, ranks, **times, backward=backward)
    assert found == pytest.approx(carried_out(pieces, ranks, times, backward=backward), abs=1e-9)
    compute = times["before"] + times["attention"] + times["after"] + times.get("concluding", 0)
    link = times["gathered"] + times["scattered"] + times.get("late", 0)
    assert max(compute, link) - 1e-9 <= found <= compute + link + 1e-9


def test_pieces_that_are_small_at_the_ends_hide_more_than_equal_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that takes as long as the products: what is not hidden shrinks to less than half."""
    times = {"gathered": 1.0, "late": 1.0, "scattered": 1.0, "before": 0.3, "attention": 1.9, "after": 0.4}
    times["concluding"] = 0.4
    tapered = pipelined_seconds(8, 2, **times, backward=True)
    monkeypatch.setattr("odysseus_kernels.planner.pipeline.piece_shares", lambda pieces: (1,) * pieces)
    assert tapered - 3.0 < 0.5 * (pipelined_seconds(8, 2, **times, backward=True) - 3.0)


def test_a_window_leaves_less_to_the_last_pieces() -> None:
    times = {"gathered": 1.0, "scattered": 1.0, "before": 0.1, "attention": 3.0, "after": 0.1}
    causal = pipelined_seconds(8, 2, **times)
    even = pipelined_seconds(8, 2, **times, pairs=lambda start, stop: stop - start)
    assert even < causal
