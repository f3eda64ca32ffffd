"""Streams that share hardware queues, and graphs that keep edges and forget the order of enqueueing."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from schedule_edits import only_begin

import odysseus_kernels as ody
from odysseus_kernels.comm.device.transport import SymmetricDeviceTransport
from odysseus_kernels.comm.schedules import streams as device_streams
from odysseus_kernels.comm.schedules.device import FINAL, PREVIOUS_USE
from odysseus_kernels.comm.schedules.steps import Kind, Step
from odysseus_kernels.comm.schedules.streams import COMPUTE, COPY_STREAMS, LOCAL, SIGNALS, STREAMS, WAITS
from odysseus_kernels.testing.device_events import DeviceCall, bind_device, by_stream, collapsed, shared
from odysseus_kernels.testing.happens_before import Access, Event, ScheduleError, interleave, prove
from odysseus_kernels.testing.replays import edges, prove_replays, replayed

pytestmark = pytest.mark.without_ranks


def partitions(names: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Every way in which streams can share queues: for each stream the first one of its queue."""
    if not names:
        yield {}
        return
    *others, name = names
    for found in partitions(tuple(others)):
        for queue in {**dict.fromkeys(found.values()), name: None}:
            yield {**found, name: queue}


def test_every_sharing_of_queues_is_free_of_deadlocks() -> None:
    calls = [
        DeviceCall("gather+scatter", gather_pieces=2, scatter_pieces=3),
        DeviceCall("scatter", scatter_pieces=3),
        DeviceCall("gather", gather_pieces=2),
        DeviceCall("gather+scatter", "switch", gather_pieces=2, scatter_pieces=3),
        DeviceCall("scatter", "tiles"),
        DeviceCall("gather", "tiles", gather_pieces=2, captured=True),
    ]
    events = bind_device(3, calls)
    sharings = list(partitions(STREAMS))
    assert len(sharings) == 203 and collapsed(events) == shared(events, sharings[0])
    for queues in sharings:
        prove_replays(shared(events, queues))


@pytest.mark.parametrize("world", range(2, 17))
def test_replays_end_in_any_order(world: int) -> None:
    """Several calls in one capture, many pieces, fewer slots than pieces, shards that were sent ahead."""
    pieces = 4 if world <= 8 else 3
    calls = [
        DeviceCall("gather", windows=(0, 0, 1), gather_pieces=pieces, slots=2 * pieces, ahead=2),
        DeviceCall("gather+scatter", "chunks", (1, 0, 2), 2, pieces, published=True, ahead=pieces),
        DeviceCall("scatter", windows=(0, 0, 5), scatter_pieces=pieces),
        DeviceCall("gather", "chunks", (2, 0, 5), pieces, slots=2, published=True),
        DeviceCall("gather", "tiles", (0, 0, 5), 2, captured=True),
        DeviceCall("scatter", "tiles", (0, 0, 5), captured=True),
        DeviceCall("gather+scatter", "chunks", (0, 1, 5), pieces, 1, slots=2 * pieces, order="sequence"),
    ]
    events = bind_device(world, calls)
    assert prove_replays(events) == prove_replays(collapsed(events)) > 0


def test_a_rank_leaves_queues_for_others() -> None:
    """Of the eight that a process has unless it asks for another number: what every kind of call uses."""
    programs: tuple[Any, ...] = ("gather", "scatter", "gather+scatter")
    calls = [DeviceCall(program, gather_pieces=3, scatter_pieces=3, ahead=2) for program in programs]
    calls += [DeviceCall(program, "switch", gather_pieces=3, scatter_pieces=3) for program in programs]
    calls += [DeviceCall(program, "tiles", captured=end) for program in programs[:2] for end in (False, True)]
    calls += [DeviceCall("gather", published=True), DeviceCall("gather", "drop")]
    used = [{step.stream for step in call.schedule(4, 0).steps} for call in calls]
    assert set().union(*used) == set(STREAMS) and len(STREAMS) == 6
    switched = [streams for call, streams in zip(calls, used, strict=True) if call.kind == "switch"]
    assert not set().union(*switched) & set(COPY_STREAMS), "a switch needs no streams of copies"
    # Pipelines and exchanges are the process group's, which has a stream for them.
    assert not SymmetricDeviceTransport.serves_pipeline and not SymmetricDeviceTransport.serves_exchange


@pytest.mark.parametrize(("given", "warns"), ((None, False), ("8", False), ("6", False), ("5", True), ("1", True)))
def test_fewer_queues_than_streams_are_said_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, given: str | None, warns: bool
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given)
    device_streams.check_queues.cache_clear()
    for _ in range(2):
        device_streams.check_queues()
    found = [str(warning.message) for warning in recwarn if issubclass(warning.category, ody.FallbackWarning)]
    assert len(found) == warns
    assert all("expected at least 6, a queue for each stream" in text and f"got {given}." in text for text in found)


# ---- several groups in one process ----------------------------------------------------------------------------------

_GROUPS = ((0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3))  # rows and columns of a mesh, and all of it
_OWN_WINDOWS = 100_000


def _of_group(event: Event, members: tuple[int, ...], number: int) -> Event:
    """An event of a group's rank as one of the process's: words, windows and streams are the group's own."""

    def access(one: Access) -> Access:
        # What a call takes anew may be any group's a moment ago.
        window = one.window + number * _OWN_WINDOWS if one.window >= 0 else one.window
        return one._replace(owner=members[one.owner], window=window, call=one.call * len(_GROUPS) + number)

    word = event.word
    return dataclasses.replace(
        event,
        rank=members[event.rank],
        stream=event.stream if event.stream == COMPUTE else f"{event.stream} of group {number}",
        word=word
        and word._replace(
            owner=members[word.owner], window=word.window + number * _OWN_WINDOWS, writer=members[word.writer]
        ),
        reads=tuple(map(access, event.reads)),
        writes=tuple(map(access, event.writes)),
        event=event.event and (event.event[0] * len(_GROUPS) + number, event.event[1]),
    )


def _several_groups(calls: list[DeviceCall], order: Callable[[int], list[int]]) -> list[list[Event]]:
    """Each process makes every call with every group that it is in, in the order of groups that ``order`` gives it."""
    bound: dict[tuple[int, int, int], list[Event]] = defaultdict(list)  # by group, call and process
    for number, members in enumerate(_GROUPS):
        for events in bind_device(len(members), calls):
            for event in events:
                found = re.match(r"call (\d+):", event.label)
                assert found is not None
                bound[number, int(found[1]), members[event.rank]].append(_of_group(event, members, number))
    return [
        [event for call in range(len(calls)) for number in order(rank) for event in bound[number, call, rank]]
        for rank in range(4)
    ]


def test_groups_that_overlap_share_any_number_of_queues() -> None:
    """Each group of a process has five streams beside the caller's, more together than there are queues."""
    calls = [
        DeviceCall("gather", gather_pieces=2),
        DeviceCall("gather+scatter", gather_pieces=2, scatter_pieces=3),
        DeviceCall("scatter", "switch", scatter_pieces=2),
        DeviceCall("scatter", "tiles"),
    ]
    events = _several_groups(calls, lambda rank: list(range(len(_GROUPS))))
    assert len({event.stream for event in events[0]}) == 3 * 5 + 1
    one_queue = [[dataclasses.replace(event, stream=COMPUTE) for event in rank] for rank in events]
    assert prove(events) > 0 and prove(one_queue) > 0
    assert prove_replays(events) == prove_replays(one_queue) > 0
    for seed in range(3):
        interleave(by_stream(events), seed)


def test_processes_that_call_groups_in_different_orders_are_caught() -> None:
    """Rows before columns on two of them, columns before rows on the others: each waits for the next one round."""
    columns_first = [2, 3, 0, 1, 4]
    events = _several_groups([DeviceCall("gather")], lambda rank: columns_first if rank in (0, 3) else list(range(5)))
    with pytest.raises(ScheduleError, match="deadlock"):
        prove(events)


def ancestors(events: list[Event], index: int) -> list[Event]:
    """What comes before one event of a rank, by the edges of its graph."""
    before: dict[int, list[int]] = defaultdict(list)
    nodes: list[Any] = [(e.stream, *((e.event, None) if e.kind is Kind.RECORD else (None, e.event))) for e in events]
    for first, following in enumerate(edges(nodes)):
        for second in following:
            before[second].append(first)
    found, left = set(), [index]
    while left:
        for first in before[left.pop()]:
            if first not in found:
                found.add(first)
                left.append(first)
    return [events[i] for i in sorted(found)]


def test_the_edges_of_graphs_delay_nothing_that_could_run() -> None:
    """What a step may come after, however many edges there are: seen on the labels of one rank's call."""
    world, pieces = 4, 4
    receive = 1000  # the window of partial results
    (gather,), (scatter,), (both,) = (
        bind_device(world, [DeviceCall(program, gather_pieces=pieces, scatter_pieces=pieces, slots=2 * pieces)])[:1]
        for program in ("gather", "scatter", "gather+scatter")
    )

    def named(events: list[Event], what: str) -> list[tuple[int, int]]:
        """(rank, piece) of the events that do ``what``, from their labels."""
        found = [re.search(rf": {what} \(rank (-?\d+), piece (-?\d+)\)", event.label) for event in events]
        return [(int(match[1]), int(match[2])) for match in found if match]

    def numbered(events: list[Event], stream: str, what: str) -> list[tuple[int, tuple[int, int]]]:
        return [(i, named([e], what)[0]) for i, e in enumerate(events) if e.stream == stream and named([e], what)]

    for index, (source, piece) in numbered(gather, WAITS, "wait"):
        before = ancestors(gather, index)
        assert not named(before, "fetch") and not named(before, "consume"), "waits run ahead of copies and products"
        # The first peer publishes a piece when this rank does.
        published = named(before, "publish")
        assert published == [(0, own) for own in range(pieces if source != 1 else piece + 1)]
    for index, (_, piece) in numbered(scatter, WAITS, "wait"):
        before = ancestors(scatter, index)
        assert named(before, "add") == [(0, own) for own in range(piece - 1)], "credit is given by the sums before"
        assert {sent for _, sent in named(before, "push")} == set(range(piece - 1))
    for index, (_, piece) in numbered(scatter, LOCAL, "wait"):
        assert {sent for _, sent in named(ancestors(scatter, index), "push")} == set(range(piece + 1))
    for stream in COPY_STREAMS:
        for index, _ in numbered(both, stream, "push"):
            before = ancestors(both, index)
            awaited = {e.word.window for e in before if e.stream == WAITS and e.word is not None}
            assert awaited == {receive}, "no push waits for a peer's shard"


# ---- schedules that are broken on purpose ---------------------------------------------------------------------------


@pytest.mark.parametrize("world", (2, 3, 8, 16))
@pytest.mark.parametrize(
    ("program", "stream", "on"),
    (
        pytest.param("gather", "waits", "local", id="fetch before the own publication"),
        pytest.param("scatter", "local", "signals", id="arrivals before the own pushes"),
        pytest.param("scatter", "waits", "local", id="credit before the own sum"),
        pytest.param("gather+scatter", "waits", "local", id="fetch before the own sums"),
    ),
)
def test_an_edge_left_out_hangs_replays_only(world: int, program: Any, stream: str, on: str) -> None:
    """Enqueued in the order of the steps it runs, in any number of queues; as a graph it may not."""
    calls = [DeviceCall(program, gather_pieces=2, scatter_pieces=4)] * 2
    events = bind_device(world, calls, only_begin(stream, on))
    prove_replays(collapsed(events))
    if world <= 3:
        prove(events)
        interleave(by_stream(events), 0)
        assert any(hangs(events, seed) for seed in range(10)), "an order that the proof speaks of"
    with pytest.raises(ScheduleError, match="a replay in another order may never end: .* wait"):
        prove_replays(events)


def hangs(events: list[list[Event]], seed: int) -> bool:
    try:
        interleave([replayed(rank, seed) for rank in events], seed)
    except ScheduleError as error:
        return "deadlock" in str(error)
    return False


def test_a_tile_kernel_that_gathers_needs_its_edge_in_a_graph() -> None:
    call = DeviceCall("gather", "tiles", gather_pieces=2)
    with pytest.raises(ScheduleError, match="may never end: .* in stream compute"):
        prove_replays(bind_device(3, [call]))
    prove_replays(bind_device(3, [dataclasses.replace(call, captured=True)]))


@pytest.mark.parametrize("world", (2, 3, 8))
def test_a_spinning_kernel_ahead_of_its_copies_needs_queues_of_its_own(world: int) -> None:
    """With a queue for each stream it ends; where there are too few, its copies stand behind it for ever."""

    def kernel_first(steps: list[Step], rank: int) -> list[Step]:
        inside = [step for step in steps if step.inside]
        return [steps[0], *inside, *(step for step in steps[1:] if not step.inside)]

    calls = [DeviceCall("gather", "tiles", gather_pieces=2)] * 2
    events = bind_device(world, calls, kernel_first)
    prove(events)
    interleave(by_stream(events), 0)
    own = {name: name for name in STREAMS}
    assert shared(events, own) == events
    for stream in (LOCAL, WAITS, *COPY_STREAMS, SIGNALS):
        # A stream shares the queue of the products, everything else has one of its own.
        for check in (prove, prove_replays):
            with pytest.raises(ScheduleError, match="deadlock"):
                check(shared(events, {**own, stream: COMPUTE}))
    prove(collapsed(bind_device(world, calls)))


@pytest.mark.parametrize("world", (2, 3, 8))
def test_streams_that_are_merged_wrongly_are_caught(world: int) -> None:
    """Waits for arrivals in the stream of the signals, in front of what peers wait for."""

    def merged(steps: list[Step], rank: int) -> list[Step]:
        waits = [s for s in steps if s.stream == "local" and s.kind is Kind.WAIT and s.value == 1]
        first = next(i for i, s in enumerate(steps) if s.stream == "signals" and s.word is not None)
        steps[first:first] = [dataclasses.replace(wait, stream="signals") for wait in waits]
        return [step for step in steps if step not in waits]

    with pytest.raises(ScheduleError, match="deadlock"):
        prove(bind_device(world, [DeviceCall("scatter", scatter_pieces=3)], merged))


@pytest.mark.parametrize("world", (2, 3, 8))
@pytest.mark.parametrize("program", ("gather", "scatter"))
def test_a_wait_for_the_end_of_its_own_use_is_caught(world: int, program: Any) -> None:
    def late(steps: list[Step], rank: int) -> list[Step]:
        return [dataclasses.replace(s, value=FINAL) if s.value == PREVIOUS_USE else s for s in steps]

    events = bind_device(world, [DeviceCall(program, scatter_pieces=2)] * 2, late)
    for check in (prove, prove_replays):
        with pytest.raises(ScheduleError, match="deadlock"):
            check(events)
