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


def carried_out(pieces: int, ranks: int, times: dict[str, float], *, backward: bool) -> float:
    """Seconds of rank 0's steps: one host, and one link that carries what is issued in that order."""
    shares = piece_shares(pieces)
    ends = [sum(shares[:index]) / sum(shares) for index in range(pieces + 1)]
    parts = list(itertools.pairwise(ends))[:: -1 if backward else 1]
    schedule = collective_schedule("pipeline", ranks, 0, gather_pieces=pieces, scatter_pieces=pieces, holds=backward)
    now, free, done = 0.0, 0.0, {}
    for step in schedule.steps:
        start, stop = parts[step.piece]
        part = stop - start
        if step.kind is Kind.ISSUE:
            free = max(now, free) + part * times["gathered" if step.task is Task.ALL_GATHER else "scattered"]
            done[step.task, step.piece] = free
        elif step.kind is Kind.FINISH:
            now = max(now, done[step.task, step.piece])
        elif step.task is Task.CONSUME:
            now += part * times["before"] / ranks
        elif step.task is Task.PROCESS:
            now += (stop**2 - start**2) * times["attention"]
        elif step.task is Task.PRODUCE:
            now += part * times["after"] / ranks
    return now


@given(
    pieces=st.sampled_from((1, 2, 3, 4, 8, 11)),
    ranks=st.integers(2, 5),
    values=st.tuples(*[SECONDS] * 5),
    backward=st.booleans(),
)
def test_seconds_are_those_of_the_schedule(pieces, ranks, values, backward) -> None:
    times = dict(zip(("gathered", "scattered", "before", "attention", "after"), values, strict=True))
    found = pipelined_seconds(pieces, ranks, **times, backward=backward)
    assert found == pytest.approx(carried_out(pieces, ranks, times, backward=backward), abs=1e-9)
    compute = times["before"] + times["attention"] + times["after"]
    link = times["gathered"] + times["scattered"]
    assert max(compute, link) - 1e-9 <= found <= compute + link + 1e-9


def test_pieces_that_are_small_at_the_ends_hide_more_than_equal_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The goal's balance: a link that takes as long as the products."""
    times = {"gathered": 2.0, "scattered": 1.0, "before": 0.3, "attention": 2.2, "after": 0.5}
    tapered = pipelined_seconds(8, 2, **times, backward=True)
    monkeypatch.setattr("odysseus_kernels.planner.pipeline.piece_shares", lambda pieces: (1,) * pieces)
    assert tapered < 0.95 * pipelined_seconds(8, 2, **times, backward=True)


def test_a_window_leaves_less_to_the_last_pieces() -> None:
    times = {"gathered": 1.0, "scattered": 1.0, "before": 0.1, "attention": 3.0, "after": 0.1}
    causal = pipelined_seconds(8, 2, **times)
    even = pipelined_seconds(8, 2, **times, pairs=lambda start, stop: stop - start)
    assert even < causal
