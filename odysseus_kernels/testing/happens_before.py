"""Proof that schedules are free of races and deadlocks, on the happens-before graph of their steps.

:func:`bind` turns a sequence of calls into what every rank really executes: the steps of ``comm/schedules/steps.py``
with the windows and counts of ``comm/schedules/leases.py``.  :func:`prove` builds the graph (program order within a
rank's stream, and from the signal to every wait that it satisfies) and checks

* every wait has a signal, and the graph has no cycle: no rank can wait for ever;
* a read sees exactly the write that was meant: that write happens before it, and no other write to the same memory lies
  between them or beside them;
* a write happens after all reads of what it replaces.

:func:`interleave` runs the same events in random orders as a cross-check that does not use the graph.  Two calls that
share a window overlap anywhere in it, whatever their parts, since sizes differ from call to call.
"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from odysseus_kernels.comm.schedules.leases import Lease, LeaseTable
from odysseus_kernels.comm.schedules.steps import (
    PARTIAL,
    SENT,
    SHARD,
    ChunkOrder,
    Kind,
    Program,
    Region,
    Schedule,
    Step,
    publication,
    sends_ahead_at,
    symmetric_schedule,
)

__all__ = ["CallSpec", "Event", "ScheduleError", "bind", "interleave", "prove"]

WINDOWS, CELLS = 16, 8


class ScheduleError(AssertionError):
    """A schedule that can race or hang; the message names the events."""


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """One operator call as far as its schedule depends on it."""

    program: Program
    gather_pieces: int = 1
    scatter_pieces: int = 1
    order: ChunkOrder = "ring"
    prefetch: bool = False  # sends the next call's shard ahead
    addressed: bool = False  # gives each rank something of its own, which nobody can send ahead


class Access(NamedTuple):
    """Memory touched: (owner, window) is what can overlap; the rest is what was meant."""

    owner: int
    window: int
    call: int
    buffer: str
    part: int
    meant: tuple[int, int]

    def overlaps(self, other: Access) -> bool:
        if (self.owner, self.window) != (other.owner, other.window):
            return False
        same_layout = (self.call, self.buffer) == (other.call, other.buffer)
        return not same_layout or self.part == other.part


class SharedWord(NamedTuple):
    """A signal word of a segment: owner, window, cell, the one rank that writes it."""

    owner: int
    window: int
    cell: int
    writer: int


@dataclasses.dataclass(frozen=True)
class Event:
    """A step as executed: real words, real counts, real windows."""

    rank: int
    stream: str
    kind: Kind
    label: str
    word: SharedWord | None = None
    value: int = 0
    reads: tuple[Access, ...] = ()
    writes: tuple[Access, ...] = ()
    event: tuple[int, int] | None = None  # call and number of what a RECORD marks and a DEPEND waits for

    @property
    def signals(self) -> bool:
        return self.kind in (Kind.SIGNAL, Kind.RELEASE)

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.label}"


MakeSchedule = Callable[..., Schedule]


def bind(
    world: int,
    calls: Sequence[CallSpec],
    make: MakeSchedule = symmetric_schedule,
    sends_at: Callable[[Schedule], int] = sends_ahead_at,
) -> list[list[Event]]:
    """For each rank, the events of ``calls`` back to back, with nothing between the calls but their credits."""
    return [_Binder(world, rank, make, sends_at).run(calls) for rank in range(world)]


class _Binder:
    """One rank's executor without data; leases in the order of ``SymmetricHostTransport._prepare``."""

    def __init__(self, world: int, rank: int, make: MakeSchedule, sends_at: Callable[[Schedule], int]) -> None:
        self._world, self._rank, self._make, self._sends_at = world, rank, make, sends_at
        self._table = LeaseTable(WINDOWS, CELLS)
        self._events: list[Event] = []

    def run(self, calls: Sequence[CallSpec]) -> list[Event]:
        ahead: Lease | None = None
        for number, call in enumerate(calls):
            schedule = self._make(
                call.program,
                self._world,
                self._rank,
                order=call.order,
                gather_pieces=call.gather_pieces,
                scatter_pieces=call.scatter_pieces,
                published=ahead is not None and not call.addressed,
                sent=ahead is not None and call.addressed,
            )
            leases: dict[str, Lease] = {}
            clean = set()
            if ahead is not None:
                arrived = SENT if call.addressed else SHARD
                leases[arrived] = ahead
                clean.add(arrived)
            for name in (SHARD, PARTIAL):
                if name in schedule.counts and name not in leases:
                    leases[name] = self._table.lease()
            upcoming = calls[number + 1] if call.prefetch else None
            pending = self._table.lease() if upcoming is not None else None
            ahead = None
            sends_at = self._sends_at(schedule)
            for index, step in enumerate(schedule.steps):
                if pending is not None and upcoming is not None and index == sends_at:
                    clean_ahead: set[str] = set()
                    pieces = 1 if upcoming.program.startswith("exchange") else upcoming.gather_pieces
                    name = SENT if upcoming.addressed else SHARD
                    for early in publication(self._rank, pieces, name):
                        self._add(number + 1, early, {name: pending}, clean_ahead)
                    ahead, pending = pending, None
                self._add(number, step, leases, clean)
            for name, lease in leases.items():
                self._table.give_back(lease, schedule.counts[name], schedule.readers[name])
        return self._events

    def _add(self, call: int, step: Step, leases: dict[str, Lease], clean: set[str]) -> None:
        for region in step.writes:
            if region.buffer not in clean:
                clean.add(region.buffer)
                lease = leases[region.buffer]
                for credit in lease.credits:
                    word = SharedWord(self._rank, lease.window, credit.cell, credit.reader)
                    label = f"call {call}: credit of window {lease.window} from rank {credit.reader} >= {credit.count}"
                    self._events.append(Event(self._rank, step.stream, Kind.WAIT, label, word, credit.count))
        word_here, value = None, 0
        if step.word is not None:
            lease = leases[step.word.buffer]
            word_here = SharedWord(step.word.owner, lease.window, step.word.cell, step.word.writer)
            value = lease.bases[step.word.cell] + step.value
        name = step.task.value if step.task else step.kind.value
        label = f"call {call}: {name} (rank {step.rank}, piece {step.piece})"
        if word_here is not None:
            label += f" of window {word_here.window} cell {word_here.cell} by rank {word_here.writer}: {value}"
        self._events.append(
            Event(
                self._rank,
                step.stream,
                step.kind,
                label,
                word_here,
                value,
                self._accesses(call, step, step.reads, leases),
                self._accesses(call, step, step.writes, leases),
            )
        )

    def _accesses(
        self, call: int, step: Step, regions: Iterable[Region], leases: dict[str, Lease]
    ) -> tuple[Access, ...]:
        rank = self._rank

        def meant(region: Region) -> tuple[int, int]:
            if region.buffer != PARTIAL:
                return (0, 0)
            # A partial result is one piece for one target, whichever cell it lies in.
            return (step.piece, step.rank if region.owner == rank else rank)

        return tuple(Access(r.owner, leases[r.buffer].window, call, r.buffer, r.part, meant(r)) for r in regions)


def prove(events: Sequence[Sequence[Event]]) -> int:
    """Checks the graph of all ranks' events; returns the number of (read, write) and (write, write) pairs examined.

    Raises:
        ScheduleError: the first thing that can go wrong.
    """
    flat = [event for rank in events for event in rank]
    successors, waiting = _edges(flat)
    clocks, order, sequence = _clocks(flat, successors, waiting)

    def before(a: int, b: int) -> bool:
        stream, position = order[a]
        return a != b and clocks[b][stream] >= position

    memory: dict[tuple[int, int], tuple[list[tuple[int, Access]], list[tuple[int, Access]]]] = {}
    for index, event in enumerate(flat):
        for kind, accesses in enumerate((event.reads, event.writes)):
            for access in accesses:
                memory.setdefault((access.owner, access.window), ([], []))[kind].append((index, access))
    pairs = 0
    for reads, writes in memory.values():
        writes.sort(key=lambda item: sequence[item[0]])
        for position, (second, access) in enumerate(writes):
            for first, earlier in writes[:position]:
                pairs += 1
                if earlier.overlaps(access) and not before(first, second):
                    raise ScheduleError(f"two writes are not ordered: {flat[first]} | {flat[second]}")
        for reader, access in reads:
            latest: tuple[int, Access] | None = None
            for writer, written in writes:
                pairs += 1
                if not written.overlaps(access) or writer == reader:
                    continue  # what a step writes, it writes after it has read
                if before(writer, reader):
                    latest = (writer, written)
                elif not before(reader, writer):
                    raise ScheduleError(f"a read and a write are not ordered: {flat[reader]} | {flat[writer]}")
            if latest is None:
                raise ScheduleError(f"a read has no write before it: {flat[reader]}")
            if latest[1] != access:
                raise ScheduleError(f"a read sees another write than was meant: {flat[reader]} | {flat[latest[0]]}")
    return pairs


def _edges(flat: Sequence[Event]) -> tuple[list[list[int]], list[int]]:
    """Successors of each event, and how many predecessors each has."""
    successors: list[list[int]] = [[] for _ in flat]
    waiting = [0] * len(flat)
    last: dict[tuple[int, str], int] = {}
    signals: dict[SharedWord, list[tuple[int, int]]] = defaultdict(list)
    recorded: dict[tuple[int, tuple[int, int]], int] = {}

    def edge(a: int, b: int) -> None:
        successors[a].append(b)
        waiting[b] += 1

    for index, event in enumerate(flat):
        stream = (event.rank, event.stream)
        if stream in last:
            edge(last[stream], index)
        last[stream] = index
        if event.kind is Kind.RECORD and event.event is not None:
            recorded[event.rank, event.event] = index
        if event.kind is Kind.DEPEND and event.event is not None:
            # In the order in which the host enqueues: a stream does not wait for an event that is not yet recorded.
            if (event.rank, event.event) not in recorded:
                raise ScheduleError(f"a stream depends on an event that is not recorded before: {event}")
            edge(recorded[event.rank, event.event], index)
        if event.signals and event.word is not None:
            if event.word.writer != event.rank:
                raise ScheduleError(f"a word is set by a rank that is not its writer: {event}")
            if signals[event.word] and signals[event.word][-1][0] >= event.value:
                raise ScheduleError(f"a word does not grow: {event}")
            signals[event.word].append((event.value, index))
    for index, event in enumerate(flat):
        if event.kind is Kind.WAIT and event.word is not None and event.value > 0:  # words begin at 0
            enough = [signal for value, signal in signals[event.word] if value >= event.value]
            if not enough:
                raise ScheduleError(f"a wait has no signal: {event}")
            edge(enough[0], index)
    return successors, waiting


def _clocks(
    flat: Sequence[Event], successors: list[list[int]], waiting: list[int]
) -> tuple[list[list[int]], list[tuple[int, int]], list[int]]:
    """Vector clock of each event, an entry for each stream; its (stream, position); its place in one total order."""
    streams = {key: number for number, key in enumerate(dict.fromkeys((e.rank, e.stream) for e in flat))}
    counters = [0] * len(streams)
    order = []
    for event in flat:
        stream = streams[event.rank, event.stream]
        counters[stream] += 1
        order.append((stream, counters[stream]))
    clocks = [[0] * len(streams) for _ in flat]
    missing = list(waiting)
    ready = [index for index, count in enumerate(missing) if count == 0]
    sequence = [0] * len(flat)
    done = 0
    while ready:
        index = ready.pop()
        done += 1
        sequence[index] = done
        stream, position = order[index]
        clocks[index][stream] = position
        for successor in successors[index]:
            clock, other = clocks[successor], clocks[index]
            for entry, value in enumerate(other):
                if value > clock[entry]:
                    clock[entry] = value
            missing[successor] -= 1
            if missing[successor] == 0:
                ready.append(successor)
    if done < len(flat):
        stuck = [str(flat[index]) for index, count in enumerate(missing) if count > 0 and flat[index].kind is Kind.WAIT]
        raise ScheduleError(f"deadlock: these waits are on a cycle or behind one: {'; '.join(stuck[:4])}")
    return clocks, order, sequence


def interleave(events: Sequence[Sequence[Event]], seed: int) -> None:
    """Runs all sequences in one random order that signals and events allow, checking what every read finds.

    A sequence is a rank's events, or those of one stream of it.

    Raises:
        ScheduleError: no rank can go on, or a read found other data than was meant.
    """
    choose = random.Random(seed)
    position = [0] * len(events)
    words: dict[SharedWord, int] = defaultdict(int)
    recorded: set[tuple[int, tuple[int, int]]] = set()

    def enabled(event: Event) -> bool:
        if event.kind is Kind.DEPEND and event.event is not None:
            return (event.rank, event.event) in recorded
        return event.kind is not Kind.WAIT or event.word is None or words[event.word] >= event.value

    # Memory of a window: what each part holds, as long as the layout is that of the last write.
    memory: dict[tuple[int, int], dict[int, Access]] = defaultdict(dict)
    while True:
        unfinished = [rank for rank, at in enumerate(position) if at < len(events[rank])]
        if not unfinished:
            return
        able = [rank for rank in unfinished if enabled(events[rank][position[rank]])]
        if not able:
            stuck = "; ".join(str(events[rank][position[rank]]) for rank in unfinished[:4])
            raise ScheduleError(f"deadlock: no rank can go on: {stuck}")
        rank = choose.choice(able)
        # Long runs of one rank find more than fair turns do.
        for _ in range(choose.choice((1, 1, 2, 5, 50))):
            if position[rank] == len(events[rank]) or not enabled(events[rank][position[rank]]):
                break
            event = events[rank][position[rank]]
            if event.kind is Kind.RECORD and event.event is not None:
                recorded.add((event.rank, event.event))
            _perform(event, words, memory)
            position[rank] += 1


def _perform(event: Event, words: dict[SharedWord, int], memory: dict[tuple[int, int], dict[int, Access]]) -> None:
    if event.signals and event.word is not None:
        words[event.word] = event.value
    for access in event.reads:
        found = memory[access.owner, access.window].get(access.part)
        if found != access:
            raise ScheduleError(f"{event} found {found}, meant {access}")
    for access in event.writes:
        window = memory[access.owner, access.window]
        if any(not _same_layout(access, other) for other in window.values()):
            window.clear()
        window[access.part] = access


def _same_layout(a: Access, b: Access) -> bool:
    return (a.call, a.buffer) == (b.call, b.buffer)
