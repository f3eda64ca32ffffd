"""The happens-before proof over the schedules of devices: streams, copy engines, windows used again and again."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import pytest
from covering import every_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_edits import Edit, depends, one_part, swap, waits_for, without

from odysseus_kernels.comm.schedules.device import (
    AHEAD,
    FINAL,
    PREVIOUS_USE,
    RECEIVE,
    SLOT,
    STAGE,
    device_schedule,
    drop_schedule,
    tile_schedule,
)
from odysseus_kernels.comm.schedules.steps import SHARD, Kind, Step, Task
from odysseus_kernels.comm.schedules.streams import COMPUTE
from odysseus_kernels.testing.device_events import DeviceCall, bind_device, by_stream, collapsed
from odysseus_kernels.testing.happens_before import ScheduleError, interleave, prove
from odysseus_kernels.testing.replays import prove_replays, replayed

pytestmark = pytest.mark.without_ranks

# Program of each operator: (forward, backward); a backward with the gathered input kept only scatters.
OPERATORS = {
    "all_gather_linear": (("gather", "gather+scatter"), ("gather", "scatter")),
    "linear_reduce_scatter": (("scatter", "gather"),),
    "zero3_linear": (("gather", "gather+scatter"),),
}
WORLDS = range(2, 17)


@every_pair(operator=OPERATORS, order=("ring", "sequence"), world=WORLDS)
def test_operator_is_free_of_races_and_deadlocks(operator: str, order: Any, world: int) -> None:
    pieces = 3 if world <= 5 else 1
    for forward, backward in OPERATORS[operator]:
        # Back to back, in two windows of each kind that take turns and then in one again and again, as in a replay.
        programs = (forward, backward, backward, forward) if world <= 8 else (forward, backward, forward)
        windows = [(index % 2, index % 2, 7) for index in range(len(programs) - 1)] + [(0, 0, 7)]
        calls = [
            DeviceCall(program, "chunks", window, pieces, pieces, order=order)
            for program, window in zip(programs, windows, strict=True)
        ]
        events = bind_device(world, calls)
        assert prove(events) > 0
        assert prove_replays(events) > 0
        # One hardware queue; as any sharing has a part of its order, none of them can hang.
        assert prove_replays(collapsed(events)) > 0
        interleave(by_stream(events), world)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("program", ("gather", "scatter"))
def test_tile_kernels_are_free_of_races_and_deadlocks(program: Any, world: int) -> None:
    calls = [DeviceCall(program, "tiles", (index % 2, index % 2, 7), 2 if world < 9 else 1) for index in range(3)]
    events = bind_device(world, [*calls, calls[-1]])
    assert prove(events) > 0
    prove(collapsed(events))
    interleave(by_stream(events), 0)
    captured = bind_device(world, [dataclasses.replace(call, captured=True) for call in calls])
    prove(captured)
    assert prove_replays(captured) > 0


CALLS = st.builds(
    DeviceCall,
    program=st.sampled_from(("gather", "scatter", "gather+scatter")),
    windows=st.tuples(st.integers(0, 1), st.integers(0, 1), st.just(5)),
    gather_pieces=st.integers(1, 3),
    scatter_pieces=st.integers(1, 5),
    slots=st.integers(1, 3),
    order=st.sampled_from(("ring", "sequence")),
)
TILE_CALLS = st.builds(
    DeviceCall,
    program=st.sampled_from(("gather", "scatter")),
    kind=st.just("tiles"),
    windows=st.tuples(st.integers(0, 1), st.integers(0, 1), st.just(5)),
    gather_pieces=st.integers(1, 3),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(world=st.integers(2, 5), calls=st.lists(CALLS | TILE_CALLS, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_any_sequence_of_calls_with_any_number_of_hardware_queues(world: int, calls: Any, seed: int) -> None:
    events = bind_device(world, calls)
    prove(events)
    prove(collapsed(events))
    interleave(by_stream(events), seed)
    captured = bind_device(world, [dataclasses.replace(call, captured=True) for call in calls])
    prove_replays(captured)
    for fair in (False, True):
        interleave([replayed(rank, seed, fair=fair) for rank in captured], seed)


@pytest.mark.parametrize("world", (2, 3, 8))
def test_a_shard_sent_ahead_is_used_by_the_next_call_or_dropped(world: int) -> None:
    calls = [
        DeviceCall("gather", windows=(0, 0, 1), gather_pieces=2, ahead=3),
        DeviceCall("gather+scatter", windows=(1, 0, 2), gather_pieces=3, published=True, ahead=1),
        DeviceCall("gather", "drop", windows=(2, 0, 3)),
        DeviceCall("gather", windows=(2, 0, 3)),
        DeviceCall("gather", windows=(1, 0, 3)),
    ]
    events = bind_device(world, calls)
    prove(events)
    prove(collapsed(events))
    prove_replays(events)
    for seed in range(5):
        interleave(by_stream(events), seed)
        interleave([replayed(rank, seed) for rank in events], seed)
    # Without the drop the window's next use is taken for the old one.
    with pytest.raises(ScheduleError, match="does not grow"):
        prove(bind_device(world, [*calls[:2], *calls[3:]]))


@pytest.mark.parametrize("world", (2, 3, 8))
def test_a_shard_that_a_scatter_sends_ahead(world: int) -> None:
    calls = [
        DeviceCall("scatter", windows=(0, 0, 1), scatter_pieces=3, ahead=2),
        DeviceCall("gather", windows=(1, 0, 2), gather_pieces=2, published=True),
        DeviceCall("scatter", windows=(0, 1, 1), scatter_pieces=1, ahead=1),
        DeviceCall("gather+scatter", windows=(1, 0, 2), scatter_pieces=2, published=True, ahead=1),
        DeviceCall("gather", "drop", windows=(2, 0, 3)),
    ]
    events = bind_device(world, [*calls, *calls[:2]])
    prove(events)
    prove(collapsed(events))
    prove_replays(events)
    for seed in range(5):
        interleave(by_stream(events), seed)


# ---- schedules that are broken on purpose ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "found"),
    (
        pytest.param(
            without(lambda s: s.kind is Kind.WAIT and s.word is not None and s.word.buffer == AHEAD),
            "not ordered",
            id="overwritten while it is read",
        ),
        pytest.param(
            without(lambda s: s.kind is Kind.SIGNAL and s.word is not None and s.word.buffer == AHEAD),
            "no signal",
            id="never signalled",
        ),
    ),
)
def test_a_broken_way_to_send_ahead_is_caught(edit: Edit, found: str) -> None:
    calls = [
        DeviceCall("scatter", windows=(0, 0, 1), ahead=1),
        DeviceCall("gather", windows=(1, 0, 2), published=True),
    ] * 2
    prove(bind_device(3, calls))
    with pytest.raises(ScheduleError, match=found):
        prove(bind_device(3, calls, edit))


@pytest.mark.parametrize("world", (3, 4, 8))
@pytest.mark.parametrize(
    ("program", "edit", "found"),
    (
        pytest.param("gather", without(waits_for(SHARD, False)), "not ordered", id="fetch without waiting"),
        pytest.param("gather", without(waits_for(SHARD, True)), "not ordered", id="window overwritten too early"),
        pytest.param("gather", depends("copy", COMPUTE), "not ordered", id="slot credit dropped"),
        pytest.param("gather", depends(COMPUTE, "copy"), "not ordered", id="product does not wait for its chunk"),
        pytest.param("gather", depends("signals", "copy"), "not ordered", id="signal before the copy is done"),
        pytest.param("gather", depends("signals", "copy 0"), "not ordered", id="one of two copies not awaited"),
        pytest.param("gather", without(lambda s: s.kind is Kind.RELEASE), "no signal", id="chunk never released"),
        pytest.param("gather", one_part(SLOT), "not ordered", id="one slot for two in flight"),
        pytest.param("scatter", without(waits_for(RECEIVE, False)), "not ordered", id="sum without waiting"),
        pytest.param("scatter", depends("copy", "waits"), "not ordered", id="push without a credit"),
        pytest.param("scatter", depends("copy", COMPUTE), "not ordered", id="push before the product"),
        pytest.param("scatter", depends(COMPUTE, "copy"), "not ordered", id="stage overwritten in flight"),
        pytest.param("scatter", depends("local", COMPUTE), "not ordered", id="sum without the own part"),
        pytest.param("scatter", one_part(STAGE), "not ordered", id="one stage for two in flight"),
        pytest.param("scatter", swap(lambda s: s.task is Task.ADD), "not ordered", id="credit before the sum"),
        pytest.param("scatter", depends(COMPUTE, "local"), "not ordered", id="call ends before its sums"),
    ),
)
def test_broken_schedules_are_caught(world: int, program: Any, edit: Edit, found: str) -> None:
    calls = [DeviceCall(program, gather_pieces=2, scatter_pieces=4)] * 3
    prove(bind_device(world, calls))
    with pytest.raises(ScheduleError, match=found):
        prove(bind_device(world, calls, edit))


def test_a_swapped_wait_is_caught() -> None:
    """A wait behind the copy that needs it, in the order of its own stream."""

    def late(steps: list[Step], rank: int) -> list[Step]:
        first = next(i for i, s in enumerate(steps) if s.kind is Kind.WAIT and s.value > 0)
        record = next(i for i in range(first, len(steps)) if steps[i].kind is Kind.RECORD)
        steps[first], steps[record] = steps[record], steps[first]
        return steps

    with pytest.raises(ScheduleError, match="not ordered"):
        prove(bind_device(3, [DeviceCall("gather")] * 2, late))


def test_events_that_are_not_recorded_yet_are_caught() -> None:
    def early(steps: list[Step], rank: int) -> list[Step]:
        last = max(i for i, s in enumerate(steps) if s.kind is Kind.RECORD)
        return [*steps[:last], *steps[last + 1 :], steps[last]]

    with pytest.raises(ScheduleError, match="not recorded before"):
        prove(bind_device(2, [DeviceCall("gather")], early))


def test_one_queue_needs_the_order_of_enqueueing() -> None:
    """Streams alone would allow sums first; a single hardware queue would then wait for ever."""

    def sums_first(steps: list[Step], rank: int) -> list[Step]:
        begin = steps[0]
        credits = [s for s in steps if s.stream == "local" and s.kind is Kind.WAIT]
        return [begin, *credits, *(s for s in steps[1:] if s not in credits)]

    events = bind_device(3, [DeviceCall("scatter")], sums_first)
    prove(events)
    with pytest.raises(ScheduleError, match="deadlock"):
        prove(collapsed(events))


# ---- the schedules themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_every_piece_is_moved_and_computed_once(world: int) -> None:
    for rank in (0, world - 1):
        steps = device_schedule("gather+scatter", world, rank, gather_pieces=2, scatter_pieces=3).steps
        done = defaultdict(list)
        for step in steps:
            if step.task is not None:
                done[step.task].append((step.rank, step.piece))
        others = [peer for peer in range(world) if peer != rank]
        assert done[Task.PUBLISH] == [(rank, 0), (rank, 1)]
        assert sorted(done[Task.FETCH]) == sorted((p, i) for p in others for i in range(2))
        assert sorted(done[Task.CONSUME]) == sorted([(rank, -1), *((p, i) for p in others for i in range(2))])
        assert sorted(done[Task.PRODUCE]) == sorted((p, i) for p in range(world) for i in range(3))
        assert sorted(done[Task.PUSH]) == sorted((p, i) for p in others for i in range(3))
        assert done[Task.ADD] == [(rank, 0), (rank, 1), (rank, 2)]


@pytest.mark.parametrize("make", (device_schedule, tile_schedule))
@pytest.mark.parametrize("program", ("gather", "scatter"))
def test_every_stream_is_joined(make: Any, program: Any) -> None:
    """What the caller does next happens after everything in the call, which a capture demands."""
    steps = make(program, 4, 1).steps
    recorded = {step.event: step.stream for step in steps if step.kind is Kind.RECORD}
    joined = set()
    for step in reversed(steps):
        if step.stream == COMPUTE and step.kind is Kind.DEPEND:
            joined.add(recorded[step.event])
        elif step.stream == COMPUTE and step.kind is not Kind.RECORD:
            break
    assert {step.stream for step in steps} == joined | {COMPUTE}


def test_no_two_ranks_fetch_from_one_peer_at_once() -> None:
    fetches = [[s.rank for s in device_schedule("gather", 8, r).steps if s.task is Task.FETCH] for r in range(8)]
    pushes = [[s.rank for s in device_schedule("scatter", 8, r).steps if s.task is Task.PUSH] for r in range(8)]
    for at_once in (*zip(*fetches, strict=True), *zip(*pushes, strict=True)):
        assert len(set(at_once)) == 8


def test_values_stay_within_a_use() -> None:
    steps = device_schedule("gather+scatter", 3, 0, gather_pieces=64, scatter_pieces=64).steps
    values = [s.value for s in steps if s.word is not None]
    assert min(values) == PREVIOUS_USE and max(values) == FINAL
    assert [s.value for s in drop_schedule(3, 0).steps if s.word is not None] == [FINAL, FINAL]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        device_schedule("gather", 2, 2)
    with pytest.raises(ValueError, match="expected from 1 to 64"):
        device_schedule("gather", 2, 0, gather_pieces=65)
    with pytest.raises(ValueError, match="broadcast"):
        device_schedule("broadcast", 2, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tile kernel"):
        tile_schedule("gather+scatter", 2, 0)
