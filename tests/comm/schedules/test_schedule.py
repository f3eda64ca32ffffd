"""The happens-before proof over every schedule, and that it catches schedules which are broken on purpose."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from covering import every_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from odysseus_kernels.comm.schedules.collective import collective_schedule
from odysseus_kernels.comm.schedules.steps import (
    PARTIAL,
    SHARD,
    Kind,
    Schedule,
    Step,
    Task,
    Word,
    chunk_order,
    piece_bounds,
    symmetric_schedule,
)
from odysseus_kernels.testing.happens_before import CallSpec, ScheduleError, bind, interleave, prove

pytestmark = pytest.mark.without_ranks

# Program of each operator: (forward, backward), backward also with the gathered input kept.
OPERATORS = {
    "all_gather_linear": (("gather", "gather+scatter"), ("gather", "scatter")),
    "linear_reduce_scatter": (("scatter", "gather"),),
    "zero3_linear": (("gather", "gather+scatter"),),
}
EXCHANGES = ("exchange", "exchange:given", "exchange:made")
WORLDS = range(2, 17)


@every_pair(operator=OPERATORS, order=("ring", "sequence"), world=WORLDS)
def test_operator_is_free_of_races_and_deadlocks(operator: str, order: Any, world: int) -> None:
    for forward, backward in OPERATORS[operator]:
        for pieces in (1, 3) if world <= 8 else (2,):
            forward_call = CallSpec(forward, pieces, pieces, order)
            backward_call = CallSpec(backward, pieces, pieces, order)
            events = bind(world, [forward_call, backward_call, backward_call, forward_call, forward_call])
            assert prove(events) > 0
            for seed in range(3):
                interleave(events, seed)


@pytest.mark.parametrize("world", WORLDS)
def test_exchange_is_free_of_races_and_deadlocks(world: int) -> None:
    """Back to back, each kind behind itself and behind each other, and between the programs of operators."""
    between = ("gather", "exchange", "scatter", "exchange:made", "gather+scatter", "exchange:given", "gather")
    for programs in ((*EXCHANGES, *EXCHANGES), *((program,) * 3 for program in EXCHANGES), between):
        events = bind(world, [CallSpec(program, 2, 2) for program in programs])
        assert prove(events) > 0
        interleave(events, world)


CALLS = st.builds(
    CallSpec,
    program=st.sampled_from(("gather", "scatter", "gather+scatter", *EXCHANGES)),
    gather_pieces=st.integers(1, 3),
    scatter_pieces=st.integers(1, 5),
    order=st.sampled_from(("ring", "sequence")),
    addressed=st.booleans(),
).map(
    lambda call: dataclasses.replace(call, addressed=call.addressed and call.program in ("exchange", "exchange:given"))
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    world=st.integers(2, 6),
    calls=st.lists(CALLS, min_size=1, max_size=8),
    ahead=st.sets(st.integers(0, 7)),
    seed=st.integers(0, 99),
)
def test_any_sequence_of_calls(world: int, calls: list[CallSpec], ahead: set[int], seed: int) -> None:
    # Any call may send ahead what the next one gathers, or shares in an exchange.
    gathers = [call.program not in ("scatter", "exchange:made") for call in calls]
    calls = [
        dataclasses.replace(call, prefetch=index in ahead and index + 1 < len(calls) and gathers[index + 1])
        for index, call in enumerate(calls)
    ]
    events = bind(world, calls)
    prove(events)
    interleave(events, seed)


# ---- schedules that are broken on purpose --------------------------------------------------------------------------

Edit = Callable[[list[Step], int], list[Step]]


def broken(edit: Edit) -> Callable[..., Schedule]:
    def make(program: Any, world: int, rank: int, **options: Any) -> Schedule:
        whole = symmetric_schedule(program, world, rank, **options)
        return dataclasses.replace(whole, steps=tuple(edit(list(whole.steps), rank)))

    return make


def without(match: Callable[[Step], bool]) -> Edit:
    def edit(steps: list[Step], rank: int) -> list[Step]:
        return [step for step in steps if not match(step)]

    return edit


def is_credit(step: Step) -> bool:
    return step.kind is Kind.WAIT and step.word is not None and not step.word.is_ready


def is_arrival(step: Step) -> bool:
    return step.kind is Kind.WAIT and step.word is not None and step.word.is_ready


def swap_wait_and_read(steps: list[Step], rank: int) -> list[Step]:
    """The first arrival is awaited after it is read."""
    for index, step in enumerate(steps):
        if is_arrival(step):
            steps[index], steps[index + 1] = steps[index + 1], steps[index]
            return steps
    return steps


def signal_before_data(steps: list[Step], rank: int) -> list[Step]:
    for index, step in enumerate(steps):
        if step.kind is Kind.SIGNAL:
            steps[index - 1], steps[index] = steps[index], steps[index - 1]
    return steps


def one_cell(steps: list[Step], rank: int) -> list[Step]:
    """All partial results in one cell, with the words of two."""

    def move(step: Step) -> Step:
        return dataclasses.replace(
            step,
            reads=tuple(r._replace(part=0) if r.buffer == PARTIAL else r for r in step.reads),
            writes=tuple(w._replace(part=0) if w.buffer == PARTIAL else w for w in step.writes),
        )

    return [move(step) for step in steps]


def release_before_read(steps: list[Step], rank: int) -> list[Step]:
    for index, step in enumerate(steps):
        if step.kind is Kind.RELEASE:
            steps[index - 1], steps[index] = steps[index], steps[index - 1]
    return steps


def wait_before_own_send(steps: list[Step], rank: int) -> list[Step]:
    """Every rank adds what it is sent before it sends: all wait for one another."""
    return [s for s in steps if s.task is Task.ADD or is_arrival(s)] + [
        s for s in steps if s.task is not Task.ADD and not is_arrival(s)
    ]


def releases(buffer: str) -> Callable[[Step], bool]:
    return lambda step: step.kind is Kind.RELEASE and step.word is not None and step.word.buffer == buffer


def _earlier(steps: list[Step], match: Callable[[Step], bool]) -> list[Step]:
    """Every step that matches is moved to before the visit that it follows."""
    done: list[Step] = []
    for step in steps:
        if match(step):
            visit = max(index for index, other in enumerate(done) if other.task is Task.VISIT)
            done.insert(visit, step)
        else:
            done.append(step)
    return done


def signal_made_before_visit(steps: list[Step], rank: int) -> list[Step]:
    return _earlier(steps, lambda s: s.kind is Kind.SIGNAL and s.word is not None and s.word.buffer == PARTIAL)


def take_before_visits(steps: list[Step], rank: int) -> list[Step]:
    """Every rank wants what is made for it before it makes anything."""

    def takes(step: Step) -> bool:
        return step.task is Task.TAKE or (is_arrival(step) and step.word is not None and step.word.buffer == PARTIAL)

    return [s for s in steps if takes(s)] + [s for s in steps if not takes(s)]


@pytest.mark.parametrize("world", (3, 4, 8))
@pytest.mark.parametrize(
    ("program", "edit", "found"),
    (
        pytest.param("scatter", without(is_credit), "not ordered", id="dropped credits"),
        pytest.param("gather", without(is_arrival), "not ordered", id="dropped waits"),
        pytest.param("gather", without(lambda s: s.kind is Kind.SIGNAL), "no signal", id="dropped signals"),
        pytest.param("scatter", without(lambda s: s.kind is Kind.RELEASE), "no signal", id="dropped releases"),
        pytest.param("gather", swap_wait_and_read, "not ordered", id="swapped wait"),
        pytest.param("gather", signal_before_data, "not ordered", id="signal before the data"),
        pytest.param("scatter", signal_before_data, "not ordered", id="partial signalled too early"),
        pytest.param("scatter", one_cell, "not ordered", id="one cell for two in flight"),
        pytest.param("scatter", release_before_read, "not ordered", id="released too early"),
        pytest.param("scatter", wait_before_own_send, "deadlock", id="wait before send"),
    ),
)
def test_broken_schedules_are_caught(world: int, program: Any, edit: Edit, found: str) -> None:
    calls = [CallSpec(program, 1, 3)] * 4
    prove(bind(world, calls))
    with pytest.raises(ScheduleError, match=found):
        prove(bind(world, calls, broken(edit)))


# Not with three ranks: there no cell is written twice in a call, and between calls every rank's takes order all visits.
@pytest.mark.parametrize("world", (4, 8))
@pytest.mark.parametrize(
    ("program", "edit", "found"),
    (
        pytest.param("exchange", without(is_credit), "not ordered", id="exchange without credits"),
        pytest.param("exchange", without(is_arrival), "not ordered", id="exchange without waits"),
        pytest.param("exchange", without(releases(SHARD)), "no signal", id="shards never released"),
        pytest.param("exchange", without(releases(PARTIAL)), "no signal", id="what was made never released"),
        pytest.param("exchange", swap_wait_and_read, "not ordered", id="visit before the shard arrived"),
        pytest.param("exchange", signal_before_data, "not ordered", id="given signalled too early"),
        pytest.param("exchange", signal_made_before_visit, "not ordered", id="made signalled before the visit"),
        pytest.param("exchange", one_cell, "not ordered", id="one cell for two that travel"),
        pytest.param("exchange", take_before_visits, "deadlock", id="take before the visits"),
        pytest.param("exchange:given", swap_wait_and_read, "not ordered", id="nothing made, no wait"),
        pytest.param("exchange:made", release_before_read, "not ordered", id="nothing given, released too early"),
    ),
)
def test_broken_exchanges_are_caught(world: int, program: Any, edit: Edit, found: str) -> None:
    calls = [CallSpec(program)] * 4
    prove(bind(world, calls))
    with pytest.raises(ScheduleError, match=found):
        prove(bind(world, calls, broken(edit)))


def test_interleavings_find_what_the_proof_finds() -> None:
    """The cross-check is not blind: it runs into a dropped credit too, within a few random orders."""
    events = bind(4, [CallSpec("scatter", 1, 3)] * 4, broken(without(is_credit)))

    def run_many() -> None:
        for seed in range(50):
            interleave(events, seed)

    with pytest.raises(ScheduleError, match="found"):
        run_many()


def test_leases_without_credits_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between calls only the credits of the leases order anything, at the latest when there is one window."""
    from odysseus_kernels.comm.schedules import leases
    from odysseus_kernels.comm.schedules.leases import LeaseTable

    give_back = LeaseTable.give_back
    monkeypatch.setattr(leases, "_ROTATION", 1)
    prove(bind(3, [CallSpec("gather")] * 4))
    monkeypatch.setattr(
        LeaseTable, "give_back", lambda self, lease, counts, readers: give_back(self, lease, counts, ())
    )
    with pytest.raises(ScheduleError, match="not ordered"):
        prove(bind(3, [CallSpec("gather")] * 4))


def test_shards_released_before_the_visit_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one window; with two, a rank has heard of its readers' next call before it writes the first one again."""
    from odysseus_kernels.comm.schedules import leases

    calls = [CallSpec("exchange:given")] * 4
    monkeypatch.setattr(leases, "_ROTATION", 1)
    prove(bind(3, calls))
    with pytest.raises(ScheduleError, match="not ordered"):
        prove(bind(3, calls, broken(release_before_read)))


# ---- the schedules themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_ring_order_never_sends_two_ranks_to_one_peer(world: int) -> None:
    orders = [chunk_order(world, rank) for rank in range(world)]
    assert all(order[0] == rank for rank, order in enumerate(orders))
    for step in range(world):
        assert len({order[step] for order in orders}) == world


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows=st.integers(0, 1000), pieces=st.integers(1, 64))
def test_pieces_cover_all_rows_once(rows: int, pieces: int) -> None:
    bounds = [piece_bounds(rows, pieces, piece) for piece in range(pieces)]
    assert bounds[0][0] == 0 and bounds[-1][1] == rows
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= -(-rows // pieces)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("make", (symmetric_schedule, collective_schedule))
def test_every_piece_is_computed_once(make: Callable[..., Schedule], world: int) -> None:
    schedules = [make("gather+scatter", world, rank, gather_pieces=2, scatter_pieces=3) for rank in range(world)]
    for rank, schedule in enumerate(schedules):
        done = defaultdict(list)
        for step in schedule.steps:
            if step.kind is Kind.COMPUTE:
                done[step.task].append((step.rank, step.piece))
        others = [peer for peer in range(world) if peer != rank]
        assert sorted(done[Task.CONSUME]) == sorted([(rank, -1), *((p, i) for p in others for i in range(2))])
        assert sorted(done[Task.PRODUCE]) == sorted((p, i) for p in range(world) for i in range(3))
        assert sorted(done[Task.ADD]) == sorted((p, i) for p in others for i in range(3))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("make", (symmetric_schedule, collective_schedule))
@pytest.mark.parametrize("program", EXCHANGES)
def test_every_rank_is_visited_once_in_ring_order(program: Any, make: Callable[..., Schedule], world: int) -> None:
    for rank in range(world):
        schedule = make(program, world, rank)
        computed = [step for step in schedule.steps if step.kind is Kind.COMPUTE]
        ring = [(rank + hop + 1) % world for hop in range(world - 1)]
        made = program != "exchange:given"
        assert [step.rank for step in computed if step.task is Task.VISIT] == ([*ring, rank] if made else [rank, *ring])
        # What is taken is what the others made, the ranks below first: the order of the sum, on both transports.
        taken = [step.rank for step in computed if step.task is Task.TAKE]
        assert taken == ([(rank - hop - 1) % world for hop in range(world - 1)] if made else [])
        if made:  # the last one comes behind the own visit, which writes the own part of the sum
            assert [step.task for step in computed[-2:]] == [Task.VISIT, Task.TAKE]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("program", EXCHANGES)
def test_transfers_of_an_exchange_meet(program: Any, world: int) -> None:
    """In each transfer every rank sends to the one that expects it; it is about the one that visits with it."""
    issued = [
        [step for step in collective_schedule(program, world, rank).steps if step.kind is Kind.ISSUE]
        for rank in range(world)
    ]
    for steps in zip(*issued, strict=True):
        assert len({(step.task, step.piece) for step in steps}) == 1
        for rank, step in enumerate(steps):
            target = (2 * rank - step.rank) % world
            assert steps[target].rank == rank
            assert target == (rank + (step.piece + 1) * (1 if step.task is Task.MADE else -1)) % world


@every_pair(
    world=WORLDS,
    program=("gather", "scatter", "gather+scatter", *EXCHANGES),
    pieces=(1, 2, 5),
    ahead=(0, 1, 2),
    cuts_own=(False, True),
)
def test_collectives_match_and_buffers_are_not_reused_in_flight(
    world: int, program: Any, pieces: int, cuts_own: bool, ahead: int
) -> None:
    options = {"gather_pieces": pieces, "scatter_pieces": pieces, "cuts_own": cuts_own, "ahead": ahead}
    issued = []
    for rank in range(world):
        steps = collective_schedule(program, world, rank, **options).steps
        issued.append([(step.task, step.piece) for step in steps if step.kind is Kind.ISSUE])
        flying: dict[tuple[Any, int], set[Any]] = {}
        filled: set[Any] = set()
        for step in steps:
            busy = set().union(*flying.values()) if flying else set()
            if step.kind is Kind.ISSUE:
                assert not busy & set(step.writes), step
                flying[step.task, step.piece] = {*step.reads, *step.writes}
                filled -= set(step.writes)
            elif step.kind is Kind.FINISH:
                filled |= flying.pop((step.task, step.piece))
            else:
                assert not busy & {*step.reads, *step.writes}, step
                assert set(step.reads) <= filled, step
        assert not flying
    assert all(order == issued[0] for order in issued)


def test_bad_arguments() -> None:
    for make in (symmetric_schedule, collective_schedule):
        with pytest.raises(ValueError, match="rank 2 of 2"):
            make("gather", 2, 2)
        with pytest.raises(ValueError, match="expected"):
            make("broadcast", 2, 0)
    with pytest.raises(ValueError, match="at least 1 piece"):
        symmetric_schedule("gather", 2, 0, gather_pieces=0)
    with pytest.raises(ValueError, match="ring"):
        chunk_order(2, 0, "random")  # type: ignore[arg-type]
    assert Word(1, "shard", 0, 1).is_ready and not Word(1, "shard", 0, 0).is_ready
