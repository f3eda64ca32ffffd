"""The happens-before proof over pipelines, on shared memory and over collectives, and that it catches broken ones."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from odysseus_kernels.comm.pipeline import Pipeline
from odysseus_kernels.comm.schedules.collective import collective_schedule
from odysseus_kernels.comm.schedules.steps import PARTIAL, SHARD, Kind, Schedule, Step, Task, symmetric_schedule
from odysseus_kernels.testing.happens_before import CallSpec, ScheduleError, bind, interleave, prove

pytestmark = pytest.mark.without_ranks

PIPELINES = ("pipeline", "pipeline:given")
WORLDS = range(2, 17)


@pytest.mark.parametrize("world", WORLDS)
def test_pipelines_are_free_of_races_and_deadlocks(world: int) -> None:
    """Back to back, and between the programs of operators."""
    for pieces in (1, 2, 5) if world <= 4 else (3,) if world <= 8 else (2,):
        for programs in (
            ("pipeline",) * 4,
            ("pipeline:given",) * 4,
            ("gather", "pipeline", "scatter", "pipeline:given", "gather+scatter", "pipeline", "exchange", "pipeline"),
        ):
            events = bind(world, [CallSpec(program, pieces, pieces) for program in programs])
            assert prove(events) > 0
            interleave(events, seed=world)


Edit = Callable[[list[Step]], list[Step]]


def without(match: Callable[[Step], bool]) -> Edit:
    return lambda steps: [step for step in steps if not match(step)]


def waits(step: Step, *, ready: bool, buffer: str | None = None) -> bool:
    word = step.word
    return step.kind is Kind.WAIT and word is not None and word.is_ready == ready and buffer in (None, word.buffer)


def released_before_processing(steps: list[Step]) -> list[Step]:
    """Shards are given back before the last piece was processed."""
    release = [s for s in steps if s.kind is Kind.RELEASE and s.word is not None and s.word.buffer == SHARD]
    rest = [s for s in steps if s not in release]
    last = max(index for index, step in enumerate(rest) if step.task is Task.PROCESS)
    return rest[:last] + release + rest[last:]


def all_published_late(steps: list[Step]) -> list[Step]:
    """What is signalled is written after the signal."""
    for index, step in enumerate(steps):
        if step.kind is Kind.SIGNAL and step.word is not None and step.word.buffer == SHARD:
            steps[index - 1], steps[index] = steps[index], steps[index - 1]
    return steps


def one_cell(steps: list[Step]) -> list[Step]:
    """All partial results in one cell, with the words of two."""

    def move(step: Step) -> Step:
        return dataclasses.replace(
            step,
            reads=tuple(r._replace(part=0) if r.buffer == PARTIAL else r for r in step.reads),
            writes=tuple(w._replace(part=0) if w.buffer == PARTIAL else w for w in step.writes),
        )

    return [move(step) for step in steps]


def add_before_own_send(steps: list[Step]) -> list[Step]:
    """Every rank wants the parts of a piece before it sends its own."""
    for piece in range(max(step.piece for step in steps) + 1):
        adds = [s for s in steps if s.piece == piece and (s.task is Task.ADD or waits(s, ready=True, buffer=PARTIAL))]
        rest = [s for s in steps if s not in adds]
        first = next(i for i, s in enumerate(rest) if s.task is Task.PRODUCE and s.piece == piece)
        steps = rest[:first] + adds + rest[first:]
    return steps


def broken(edit: Edit) -> Callable[..., Schedule]:
    def make(program: Any, world: int, rank: int, **options: Any) -> Schedule:
        whole = symmetric_schedule(program, world, rank, **options)
        return dataclasses.replace(whole, steps=tuple(edit(list(whole.steps))))

    return make


# Not with two ranks: there what a peer sends tells that it has read what it was sent before.
@pytest.mark.parametrize("world", (3, 4))
@pytest.mark.parametrize(
    ("edit", "found"),
    (
        pytest.param(without(lambda s: waits(s, ready=False)), "not ordered", id="dropped credits"),
        pytest.param(without(lambda s: waits(s, ready=True, buffer=SHARD)), "not ordered", id="consumed too early"),
        pytest.param(without(lambda s: waits(s, ready=True, buffer=PARTIAL)), "not ordered", id="added too early"),
        pytest.param(without(lambda s: s.kind is Kind.RELEASE), "no signal", id="dropped releases"),
        pytest.param(all_published_late, "not ordered", id="signalled before it is written"),
        pytest.param(one_cell, "not ordered", id="one cell for two that travel"),
        pytest.param(add_before_own_send, "deadlock", id="add before the send"),
    ),
)
def test_broken_pipelines_are_caught(world: int, edit: Edit, found: str) -> None:
    calls = [CallSpec("pipeline", 5, 5)] * 3
    prove(bind(world, calls))
    with pytest.raises(ScheduleError, match=found):
        prove(bind(world, calls, broken(edit)))


def test_shards_released_before_processing_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one window; with two, later calls order the accesses."""
    from odysseus_kernels.comm.schedules import leases

    calls = [CallSpec("pipeline:given", 3, 3)] * 4
    monkeypatch.setattr(leases, "_ROTATION", 1)
    prove(bind(3, calls))
    with pytest.raises(ScheduleError, match="not ordered"):
        prove(bind(3, calls, broken(released_before_processing)))


@pytest.mark.parametrize("world", (2, 3, 4, 16))
@pytest.mark.parametrize("program", PIPELINES)
@pytest.mark.parametrize("pieces", (1, 2, 3, 8))
@pytest.mark.parametrize(("early", "late"), ((True, False), (True, True), (False, True)))
def test_collectives_match_and_buffers_are_not_reused_in_flight(
    world: int, program: Any, pieces: int, early: bool, late: bool
) -> None:
    issued = []
    for rank in range(world):
        steps = collective_schedule(
            program, world, rank, gather_pieces=pieces, scatter_pieces=pieces, early=early, late=late
        ).steps
        issued.append([(step.task, step.piece) for step in steps if step.kind is Kind.ISSUE])
        check_buffers(steps)
        done = Counter((step.task, step.piece) for step in steps if step.kind is Kind.COMPUTE)
        assert all(done[Task.CONSUME, piece] == world * early for piece in range(pieces))
        assert all(done[Task.CONCLUDE, piece] == world * late for piece in range(pieces))
    assert all(order == issued[0] for order in issued)


def check_buffers(steps: tuple[Step, ...]) -> None:
    """No step touches what travels, what is read has arrived, and it is that of the step's own piece."""
    flying: dict[tuple[Any, int], set[Any]] = {}
    filled: dict[Any, int] = {}
    for step in steps:
        busy = set().union(*flying.values()) if flying else set()
        if step.kind is Kind.ISSUE:
            assert not busy & set(step.writes), step
            flying[step.task, step.piece] = {*step.reads, *step.writes}
            for region in step.reads:
                assert filled[region] == step.piece, step
        elif step.kind is Kind.FINISH:
            for region in flying.pop((step.task, step.piece)):
                filled[region] = step.piece
        else:
            assert not busy & {*step.reads, *step.writes}, step
            for region in step.reads:
                assert filled[region] == step.piece, step
            for region in step.writes:
                filled[region] = step.piece
    assert not flying


@pytest.mark.parametrize("task", (Task.ALL_GATHER, Task.LATE_GATHER, Task.ALL_TO_ALL))
def test_a_transfer_issued_while_its_buffer_is_used_is_caught(task: Task) -> None:
    """The check is not blind: every transfer of a piece is issued as early as that of the piece before."""
    steps = list(collective_schedule("pipeline", 3, 0, gather_pieces=4, scatter_pieces=4, late=True).steps)
    check_buffers(tuple(steps))
    for piece in (2, 3):
        issue = next(s for s in steps if s.kind is Kind.ISSUE and (s.task, s.piece) == (task, piece))
        steps.remove(issue)
        before = next(i for i, s in enumerate(steps) if s.kind is Kind.ISSUE and (s.task, s.piece) == (task, piece - 1))
        steps.insert(before, issue)
    with pytest.raises(AssertionError):
        check_buffers(tuple(steps))


@pytest.mark.parametrize("make", (symmetric_schedule, collective_schedule))
@pytest.mark.parametrize("world", (2, 5))
def test_every_piece_is_computed_once_and_in_order(make: Callable[..., Schedule], world: int) -> None:
    for rank in range(world):
        steps = [
            step
            for step in make("pipeline", world, rank, gather_pieces=3, scatter_pieces=3).steps
            if step.kind is Kind.COMPUTE
        ]
        others = [(rank + hop + 1) % world for hop in range(world - 1)]
        for piece in range(3):
            own = [(step.task, step.rank) for step in steps if step.piece == piece and step.task is not Task.ADD]
            assert own == [
                *((Task.CONSUME, source) for source in (rank, *others)),
                (Task.PROCESS, rank),
                *((Task.PRODUCE, target) for target in (*others, rank)),
            ]
            # The ranks below first: the order of the sum, on both transports.
            added = [step.rank for step in steps if step.piece == piece and step.task is Task.ADD]
            assert added == [(rank - hop - 1) % world for hop in range(world - 1)]
        # The last part of a piece is added after the own part was produced: in shared memory, which has two cells,
        # before the next piece is; over collectives when the next piece's results are on their way.
        order = [(step.task, step.piece) for step in steps if step.task in (Task.PRODUCE, Task.ADD)]
        if make is symmetric_schedule:
            assert [piece for _, piece in order] == sorted(piece for _, piece in order)
        else:
            produced, added = [(Task.PRODUCE, n) for n in range(3)], [(Task.ADD, n) for n in range(3)]
            expected = (produced[0], produced[1], added[0], produced[2], added[1], added[2])
            assert [one for one, _ in itertools.groupby(order)] == list(expected)


def test_bad_arguments() -> None:
    for make in (symmetric_schedule, collective_schedule):
        with pytest.raises(ValueError, match="one number of pieces, got 2 and 3"):
            make("pipeline", 2, 0, gather_pieces=2, scatter_pieces=3)
    with pytest.raises(ValueError, match="a pipeline that gathers something"):
        collective_schedule("pipeline", 2, 0, early=False)
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="conclude if there are any, got 1 without it"):
        Pipeline((x,), ((0, 2),), lambda *_: None, lambda _: None, late=1).check("test")
