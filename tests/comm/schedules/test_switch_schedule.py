"""The proof over schedules through a switch: windows that everybody reads, or stores to, used again and again."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_edits import Edit, depends, one_part, only_begin, swap, without

from odysseus_kernels.comm.schedules.device import FINAL, PREVIOUS_USE
from odysseus_kernels.comm.schedules.steps import Kind, Step, Task
from odysseus_kernels.comm.schedules.streams import COMPUTE, COPY_STREAMS
from odysseus_kernels.comm.schedules.switch import PARTS, PUSHED, switch_schedule
from odysseus_kernels.testing.device_events import DeviceCall, bind_device, by_stream, collapsed
from odysseus_kernels.testing.happens_before import ScheduleError, interleave, prove
from odysseus_kernels.testing.replays import prove_replays, replayed

pytestmark = pytest.mark.without_ranks

PROGRAMS = ("scatter", "gather", "gather+scatter")


def call(program: Any, pieces: int = 1, window: int = 0, sets: int = 2) -> DeviceCall:
    return DeviceCall(program, "switch", (window, window, 7), pieces, pieces, sets)


@pytest.mark.parametrize("world", range(2, 17))
@pytest.mark.parametrize("program", PROGRAMS)
def test_free_of_races_and_deadlocks(program: Any, world: int) -> None:
    """Back to back in windows that take turns and then in one again, beside calls that go from rank to rank."""
    pieces = 5 if world <= 5 else 3 if world <= 8 else 1
    calls = [call(program, pieces, index % 2) for index in range(3)]
    calls += [DeviceCall(program, "chunks", (0, 0, 7), pieces, pieces), call(program, pieces + 1)]
    events = bind_device(world, calls if world <= 8 else calls[-3:])
    assert prove(events) > 0
    assert prove_replays(events) == prove_replays(collapsed(events)) > 0
    prove(collapsed(events))
    interleave(by_stream(events), world)
    interleave([replayed(rank, world) for rank in events], world)


CALLS = st.builds(
    DeviceCall,
    program=st.sampled_from(PROGRAMS),
    kind=st.sampled_from(("switch", "switch", "chunks")),
    windows=st.tuples(st.integers(0, 1), st.integers(0, 1), st.just(5)),
    gather_pieces=st.integers(1, 5),
    scatter_pieces=st.integers(1, 5),
    slots=st.integers(1, 3),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(world=st.integers(2, 5), calls=st.lists(CALLS, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_any_sequence_of_calls(world: int, calls: Any, seed: int) -> None:
    events = bind_device(world, calls)
    prove(events)
    prove(collapsed(events))
    prove_replays(events)
    interleave(by_stream(events), seed)
    for fair in (False, True):
        interleave([replayed(rank, seed, fair=fair) for rank in events], seed)


# ---- schedules that are broken on purpose ---------------------------------------------------------------------------


def waits(buffer: str, previous: bool | None = None, *, ready: bool | None = None) -> Any:
    """Waits for a buffer's words: of the use before, and set by the buffer's owner, if that is asked."""
    return lambda s: (
        s.kind is Kind.WAIT
        and s.word is not None
        and s.word.buffer == buffer
        and previous in (None, s.value == PREVIOUS_USE)
        and ready in (None, s.word.is_ready)
    )


def one_wait(buffer: str, *, ready: bool) -> Edit:
    """A rank does not wait for one of its peers, the next one."""
    match = waits(buffer, False, ready=ready)
    return lambda steps, rank: [s for s in steps if not (match(s) and s.rank == (rank + 1) % 3)]


def reads_one_rank_less(steps: list[Step], rank: int) -> list[Step]:
    """The window of one rank is given back before the switch has read it: its release is not behind that read."""
    index = next(i for i, s in enumerate(steps) if s.task is Task.ADD)
    late = dataclasses.replace(steps[index], reads=steps[index].reads[:1], writes=(), task=Task.CONSUME)
    steps.insert(next(i for i in range(index, len(steps)) if steps[i].kind is Kind.SIGNAL) + 1, late)
    return steps


@pytest.mark.parametrize(
    ("program", "edit", "found"),
    (
        pytest.param("scatter", without(waits(PARTS, ready=False)), "not ordered", id="sum without waiting"),
        pytest.param("scatter", one_wait(PARTS, ready=False), "not ordered", id="sum before one peer's signal"),
        pytest.param("scatter", without(waits(PARTS, True)), "not ordered", id="window of an earlier use overwritten"),
        pytest.param("scatter", without(waits(PARTS, False, ready=True)), "not ordered", id="cells overwritten"),
        pytest.param("scatter", one_wait(PARTS, ready=True), "not ordered", id="one owner still reads"),
        pytest.param("scatter", swap(lambda s: s.task is Task.ADD), "not ordered", id="released before it is read"),
        pytest.param("scatter", reads_one_rank_less, "not ordered", id="released before all of it is read"),
        pytest.param("scatter", depends(COMPUTE, "waits"), "not ordered", id="product without room"),
        pytest.param("scatter", depends("signals", COMPUTE), "not ordered", id="signal before the product"),
        pytest.param("scatter", depends("local", COMPUTE), "not ordered", id="sum without the own part"),
        pytest.param("scatter", one_part(PARTS), "not ordered", id="one cell for all owners"),
        pytest.param("scatter", depends(COMPUTE, "local"), "not ordered", id="call ends before its sums"),
        pytest.param("scatter", without(lambda s: s.kind is Kind.RELEASE), "no signal", id="parts never announced"),
        pytest.param("gather", without(waits(PUSHED, ready=True)), "not ordered", id="chunk consumed too early"),
        pytest.param("gather", one_wait(PUSHED, ready=True), "not ordered", id="one peer's chunk not awaited"),
        pytest.param("gather", without(waits(PUSHED, True)), "not ordered", id="stored over an earlier use"),
        pytest.param(
            "gather", without(waits(PUSHED, False, ready=False)), "not ordered", id="stored over unread cells"
        ),
        pytest.param("gather", one_wait(PUSHED, ready=False), "not ordered", id="one reader not awaited"),
        pytest.param("gather", swap(lambda s: s.task is Task.PUBLISH), "not ordered", id="signal before the store"),
        pytest.param("gather", depends(COMPUTE, "waits"), "not ordered", id="product does not wait"),
        pytest.param("gather", depends("signals", COMPUTE), "not ordered", id="released before the product"),
        pytest.param("gather", one_part(PUSHED), "not ordered", id="one cell for all ranks"),
        pytest.param("gather", without(lambda s: s.kind is Kind.RELEASE), "no signal", id="chunks never released"),
    ),
)
def test_broken_schedules_are_caught(program: Any, edit: Edit, found: str) -> None:
    calls = [call(program, 5)] * 3
    prove(bind_device(3, calls))
    with pytest.raises(ScheduleError, match=found):
        prove(bind_device(3, calls, edit))


@pytest.mark.parametrize(
    ("program", "stream", "on"),
    (
        pytest.param("scatter", "local", "signals", id="arrivals before the own parts"),
        pytest.param("gather", "waits", "local", id="chunks before the own store"),
        pytest.param("gather+scatter", "waits", "local", id="chunks before the own sums"),
    ),
)
def test_an_edge_left_out_hangs_replays_only(program: Any, stream: str, on: str) -> None:
    events = bind_device(3, [call(program, 5)] * 2, only_begin(stream, on))
    prove_replays(collapsed(events))
    with pytest.raises(ScheduleError, match="a replay in another order may never end"):
        prove_replays(events)


# ---- the schedules themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", (2, 3, 8, 16))
def test_every_piece_is_made_added_stored_and_consumed_once(world: int) -> None:
    for rank in (0, world - 1):
        steps = switch_schedule("gather+scatter", world, rank, gather_pieces=2, scatter_pieces=3).steps
        done = {task: [(s.rank, s.piece) for s in steps if s.task is task] for task in Task}
        others = [peer for peer in range(world) if peer != rank]
        assert sorted(done[Task.PRODUCE]) == [(target, piece) for target in range(world) for piece in range(3)]
        assert done[Task.ADD] == [(rank, 0), (rank, 1), (rank, 2)]
        assert done[Task.PUBLISH] == [(rank, 0), (rank, 1)]
        assert sorted(done[Task.CONSUME]) == sorted([(rank, -1), *((p, i) for p in others for i in range(2))])
        assert not done[Task.FETCH] and not done[Task.PUSH], "nothing goes from rank to rank"
        adds = [s for s in steps if s.task is Task.ADD]
        assert all([region.owner for region in s.reads] == list(range(world)) for s in adds), "one load of all ranks"


def test_copies_have_no_stream_of_their_own() -> None:
    """What stores is a kernel on the device's own stream; copy engines have nothing to do."""
    for program in PROGRAMS:
        assert not {s.stream for s in switch_schedule(program, 4, 1).steps} & set(COPY_STREAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_stream_is_joined(program: Any) -> None:
    steps = switch_schedule(program, 4, 1, gather_pieces=3, scatter_pieces=3).steps
    recorded = {step.event: step.stream for step in steps if step.kind is Kind.RECORD}
    joined = set()
    for step in reversed(steps):
        if step.stream == COMPUTE and step.kind is Kind.DEPEND:
            joined.add(recorded[step.event])
        elif step.stream == COMPUTE and step.kind is not Kind.RECORD:
            break
    assert {step.stream for step in steps} == joined | {COMPUTE}


def test_values_stay_within_a_use() -> None:
    steps = switch_schedule("gather+scatter", 3, 0, gather_pieces=64, scatter_pieces=64).steps
    values = [s.value for s in steps if s.word is not None]
    assert min(values) == PREVIOUS_USE and max(values) == FINAL


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        switch_schedule("gather", 2, 2)
    with pytest.raises(ValueError, match="from 1 to 64 pieces and sets"):
        switch_schedule("gather", 2, 0, sets=0)
    with pytest.raises(ValueError, match="exchange"):
        switch_schedule("exchange", 2, 0)
