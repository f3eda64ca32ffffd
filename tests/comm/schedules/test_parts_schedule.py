"""Exchanges in which ranks take some parts of what others have: proved as they touch memory, part by part."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from odysseus_kernels.comm.schedules.collective import collective_schedule
from odysseus_kernels.comm.schedules.steps import PARTIAL, SHARD, Kind, Region, Schedule, Step, Task, symmetric_schedule
from odysseus_kernels.testing.happens_before import CallSpec, ScheduleError, bind, interleave, prove

pytestmark = pytest.mark.without_ranks

EXCHANGES = ("exchange", "exchange:given", "exchange:made")
PARTS = 3
# Whether rank r takes part p of what rank s has.
Takes = Callable[[int, int, int], bool]


def drawn(world: int, seed: int) -> Takes:
    draw = random.Random(seed)
    tables = [[[r == s or draw.random() < 0.4 for s in range(world)] for r in range(world)] for _ in range(PARTS)]
    return lambda r, s, p: tables[p][r][s]


def in_parts(takes: Takes, published: Takes | None = None, added: Takes | None = None) -> Callable[..., Schedule]:
    """The transport's own schedules, whose steps touch only the parts that are taken.

    Args:
        takes: what visits read, and fill.
        published: by which table the owner publishes.
        added: by which table the owner adds what was made for it.
    """

    def make(program: Any, world: int, rank: int, **options: Any) -> Schedule:
        schedule = symmetric_schedule(program, world, rank, **options)
        if not program.startswith("exchange"):
            return schedule

        def touched(step: Step, part: int) -> bool:
            if step.task is Task.PUBLISH:
                return any((published or takes)(other, rank, part) for other in range(world) if other != rank)
            return (added or takes)(step.rank, rank, part) if step.task is Task.TAKE else takes(rank, step.rank, part)

        def cut(step: Step) -> Step:
            parts = [part for part in range(PARTS) if touched(step, part)]
            reads, writes = (
                tuple(Region(r.owner, r.buffer, r.part * PARTS + part) for r in regions for part in parts)
                for regions in (step.reads, step.writes)
            )
            return dataclasses.replace(step, reads=reads, writes=writes)

        return dataclasses.replace(schedule, steps=tuple(map(cut, schedule.steps)))

    return make


@pytest.mark.parametrize("world", (2, 3, 4, 5, 8))
def test_parts_are_free_of_races_and_deadlocks(world: int) -> None:
    """Nothing is read that was not written for this visit, and nothing is overwritten before its last reader."""
    between = ("gather", "exchange", "scatter", "exchange:made", "gather+scatter", "exchange:given", "gather")
    for seed in range(3):
        for programs in ((*EXCHANGES, *EXCHANGES), *((program,) * 3 for program in EXCHANGES), between):
            events = bind(world, [CallSpec(program) for program in programs], in_parts(drawn(world, seed)))
            assert prove(events) > 0
            interleave(events, seed)


def without(match: Callable[[Step], bool], make: Callable[..., Schedule]) -> Callable[..., Schedule]:
    def edited(*arguments: Any, **options: Any) -> Schedule:
        schedule = make(*arguments, **options)
        return dataclasses.replace(schedule, steps=tuple(step for step in schedule.steps if not match(step)))

    return edited


def waits_for(buffer: str) -> Callable[[Step], bool]:
    return lambda s: s.kind is Kind.WAIT and s.word is not None and s.word.buffer == buffer and s.word.is_ready


@pytest.mark.parametrize("world", (3, 4, 8))
def test_broken_parts_are_caught(world: int) -> None:
    def next_takes(r: int, s: int, p: int) -> bool:  # each rank something of the next one alone
        return r == s or (p == 0 and s == (r + 1) % world)

    def the_other_way(r: int, s: int, p: int) -> bool:
        return next_takes(s, r, p)

    def another(r: int, s: int, p: int) -> bool:
        return next_takes(r, s, (p + 1) % PARTS)

    calls = [CallSpec("exchange")] * 4
    prove(bind(world, calls, in_parts(next_takes)))
    for broken in (
        in_parts(next_takes, published=another),
        in_parts(next_takes, added=another),
        in_parts(next_takes, added=the_other_way),
    ):
        with pytest.raises(ScheduleError, match="no write before it|another write than was meant"):
            prove(bind(world, calls, broken))
    for buffer in (SHARD, PARTIAL):
        with pytest.raises(ScheduleError, match="not ordered|no write before it"):
            prove(bind(world, calls, without(waits_for(buffer), in_parts(next_takes))))


def packed_in_flight(steps: tuple[Step, ...]) -> list[Step]:
    """Transfers for which parts would be packed where an earlier transfer still reads."""
    flying: dict[tuple[Any, int], set[Region]] = {}
    found = []
    for step in steps:
        if step.kind is Kind.ISSUE:
            if set(step.reads) & set().union(*flying.values()):
                found.append(step)
            flying[step.task, step.piece] = {*step.reads, *step.writes}
        elif step.kind is Kind.FINISH:
            del flying[step.task, step.piece]
    return found


@pytest.mark.parametrize("world", range(2, 17))
@pytest.mark.parametrize("program", EXCHANGES)
def test_parts_are_packed_where_nothing_is_in_flight(program: Any, world: int) -> None:
    for rank in range(world):
        steps = collective_schedule(program, world, rank).steps
        assert not packed_in_flight(steps)
        if world > 3 and program != "exchange:made":  # all transfers at once, two of them out of the same place
            given = [s for s in steps if s.kind is Kind.ISSUE and s.task is Task.GIVEN]
            at_once = (*given, *(step for step in steps if step not in given))
            assert packed_in_flight(at_once)
