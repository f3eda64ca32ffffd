"""The time of a pipelined block against its schedule, carried out step by step."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odysseus_kernels.comm.schedules.collective import collective_schedule, sends_ahead_after
from odysseus_kernels.comm.schedules.steps import Kind, Task
from odysseus_kernels.ops._ulysses_groups import HeadGroups
from odysseus_kernels.ops._ulysses_heads import BackwardHeads
from odysseus_kernels.planner.pipeline import fit_head_groups, grouped_seconds, piece_shares, pipelined_seconds

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


def stages_of(groups: int, steps: tuple[float | None, ...]) -> list[float | None]:
    """What the groups at each stage of Ulysses' block take together; None where no step of theirs is there."""
    block = object.__new__(BackwardHeads)
    block._groups = HeadGroups(groups, 1, groups, groups, 1)
    found = []
    for stage in range(block.stages):
        there = [one for step, one in enumerate(steps) if one is not None for _ in block._at(stage, step)]
        found.append(sum(there) / groups if there else None)
    return found


def groups_carried_out(groups: int, ranks: int, times: dict, *, ahead: bool) -> float:
    """Seconds of rank 0's steps in all exchanges of a block: one host, and one link that carries what is issued."""
    given = stages_of(groups, (times["given"][0], None, None, times["given"][1]))
    made = stages_of(groups, (times["made"][0], None, times["made"][1], times.get("summed")))
    computed = stages_of(groups, (times["before"], times["attention"], None, times["after"]))
    now = free = 0.0
    early = None  # when what was sent ahead for a stage is there
    if ahead:
        free, early = given[0] / (ranks - 1), 0.0
    for stage, (gets, makes, work) in enumerate(zip(given, made, computed, strict=True)):
        visit = (work or 0.0) / ranks
        if gets is None and makes is None:
            now += visit * ranks
            continue
        kind = "exchange" if gets is not None and makes is not None else None
        program = kind or ("exchange:given" if makes is None else "exchange:made")
        schedule = collective_schedule(program, ranks, 0)
        first, _ = sends_ahead_after(schedule)
        following = given[stage + 1] if stage + 1 < len(given) else None
        done, later = {}, None
        for index, step in enumerate(schedule.steps):
            key = step.task, step.piece
            if step.kind is Kind.ISSUE:
                if key == (Task.GIVEN, 0) and early is not None:
                    done[key] = early
                else:
                    seconds = gets if step.task is Task.GIVEN else makes
                    free = done[key] = max(now, free) + seconds / (ranks - 1)
            elif step.kind is Kind.FINISH:
                now = max(now, done[key])
            elif step.task is Task.VISIT:
                now += visit
            if index == first and following is not None:
                free = later = max(now, free) + following / (ranks - 1)
        early = later
    return now


@given(
    groups=st.sampled_from((1, 2, 3, 4, 8)),
    ranks=st.integers(2, 5),
    values=st.tuples(*[SECONDS] * 8),
    backward=st.booleans(),
    ahead=st.booleans(),
)
def test_seconds_of_groups_of_heads_are_those_of_the_exchanges(groups, ranks, values, backward, ahead) -> None:
    times = {"given": values[:2], "made": values[2:4], "before": values[4], "attention": values[5], "after": values[6]}
    if backward:
        times["summed"] = values[7]
    found = grouped_seconds(groups, ranks, **times, ahead=ahead)
    assert found == pytest.approx(groups_carried_out(groups, ranks, times, ahead=ahead), abs=1e-9)
    compute = times["before"] + times["attention"] + times["after"]
    link = sum(times["given"]) + sum(times["made"]) + times.get("summed", 0)
    assert max(compute, link) - 1e-9 <= found <= compute + link + 1e-9


@pytest.mark.parametrize("groups", (3, 4, 8))
def test_what_stays_open_is_one_group(groups: int) -> None:
    """Where attention hides all that travels beside it: the first group's projections, and the last one's output."""
    times = {"given": (0.1, 0.1), "made": (1.2, 0.5), "before": 0.6, "attention": 9.0, "after": 0.2}
    # One of two visits goes by before the first group's heads leave, and before the last one's output does; the weights
    # of this stage and the next have arrived by then.
    opened = max(0.0, 1.2 - 0.6 / 2) + max(0.0, 0.5 - 0.2 / 2)
    assert grouped_seconds(groups, 2, **times, ahead=True) == pytest.approx(9.8 + opened / groups)


def test_groups_that_divide_a_ranks_heads() -> None:
    assert [fit_head_groups(wanted, 6) for wanted in (1, 2, 3, 4, 5, 6, 64)] == [1, 2, 3, 3, 3, 6, 6]
    assert [fit_head_groups(4, heads) for heads in (0, 1, 5, 7, 8)] == [1, 1, 1, 1, 4]
