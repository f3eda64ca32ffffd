"""Schedules as data: who copies, signals, waits, computes and releases what, in which order.

A schedule is the tuple of :class:`Step` that one rank runs for one call of an operator.  It is made by a pure function
of (program, ranks, rank, chunk order, pieces); a transport executes it, ``testing/happens_before.py`` proves that it
is free of races and deadlocks for any number of calls back to back, and nothing else decides an order anywhere.

Four programs carry every operator, and a backward runs the first two in one call:

``gather``
    every rank publishes its shard and consumes all shards, its own first, straight from the owners' buffers;
``scatter``
    every rank produces partial results for all others, its own last, and adds up what it is sent;
``exchange``
    every rank visits all others, its own last: it reads what they publish and makes something for them, and takes what
    they make for it.  In ``exchange:given`` nothing is made, and the rank itself comes first; in ``exchange:made``
    nothing is published;
``pipeline``
    piece by piece, every rank consumes that piece of all shards, computes, and produces partial results for all others
    as in ``scatter``.  In ``pipeline:given`` nothing is produced.

Words.  A signal :class:`Word` has exactly one writer and only grows.  ``ready`` (written by the buffer's owner) counts
what was published in a cell; ``done`` (written by one reader) says up to which count that reader has finished, which is
the owner's credit to overwrite.  Values here count from the start of the call; a lease (``comm/schedules/leases.py``)
adds what earlier calls left in the word.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

__all__ = [
    "SHARD",
    "PARTIAL",
    "SENT",
    "ChunkOrder",
    "Kind",
    "Program",
    "Region",
    "Schedule",
    "Step",
    "Task",
    "Word",
    "chunk_order",
    "piece_bounds",
    "publication",
    "sends_ahead_at",
    "symmetric_schedule",
]

ChunkOrder = Literal["ring", "sequence"]
Program = Literal[
    "gather", "scatter", "gather+scatter", "exchange", "exchange:given", "exchange:made", "pipeline", "pipeline:given"
]

SHARD = "shard"
PARTIAL = "partial"
# What an exchange shares and an earlier call has sent ahead, beside what it gives each rank for itself.
SENT = "sent"
PROGRAMS = ", ".join(f'"{name}"' for name in get_args(Program))
# Two cells for outgoing partial results: one is read by its target while the next is computed.
PARTIAL_CELLS = 2


class Kind(enum.Enum):
    """What a step does."""

    COPY = "copy"
    SIGNAL = "signal"
    WAIT = "wait"
    COMPUTE = "compute"
    RELEASE = "release"
    ISSUE = "issue"
    FINISH = "finish"
    RECORD = "record"
    DEPEND = "depend"


class Task(enum.Enum):
    """Which callback a COPY, COMPUTE, ISSUE or FINISH step stands for."""

    PUBLISH = "publish"
    FETCH = "fetch"
    PUSH = "push"
    CONSUME = "consume"
    PRODUCE = "produce"
    ADD = "add"
    ALL_GATHER = "all_gather"
    LATE_GATHER = "late_gather"
    ALL_TO_ALL = "all_to_all"
    PROCESS = "process"
    CONCLUDE = "conclude"
    VISIT = "visit"
    TAKE = "take"
    GIVEN = "given"
    MADE = "made"


class Region(NamedTuple):
    """A part of a buffer that other ranks or collectives touch: owner rank, buffer name, part."""

    owner: int
    buffer: str
    part: int


class Word(NamedTuple):
    """A signal word beside a cell of the owner's buffer; ``writer`` is the owner (ready) or one reader (done)."""

    owner: int
    buffer: str
    cell: int
    writer: int

    @property
    def is_ready(self) -> bool:
        return self.owner == self.writer


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One step of one rank.

    Attributes:
        kind: what the step does.
        task: the callback it stands for (COPY, COMPUTE, ISSUE, FINISH).
        rank: the rank whose chunk is meant: source of a consumed shard, target or source of a partial result.
        piece: which piece of that chunk.
        word: the word that is set (SIGNAL, RELEASE) or waited for (WAIT).
        value: the word's value, counted from the start of the call.
        reads, writes: regions touched; the proof's subject.
        stream: queue within which steps run in order; on a CPU host there is one.
        event: what a RECORD marks in its stream and a DEPEND of another stream waits for; each is recorded once.
        inside: the step happens within a kernel that waits and signals by itself (``comm/schedules/device.py``).
    """

    kind: Kind
    task: Task | None = None
    rank: int = -1
    piece: int = 0
    word: Word | None = None
    value: int = 0
    reads: tuple[Region, ...] = ()
    writes: tuple[Region, ...] = ()
    stream: str = "compute"
    event: int = -1
    inside: bool = False


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of one rank, with what has to be leased for them.

    Attributes:
        steps: in execution order.
        counts: for each shared buffer, how far its cells' words are advanced by the call.
        readers: for each shared buffer and cell, the ranks whose ``done`` reaches the count at the end of the call.
            In a cell that is written several times only the last write's reader does.
    """

    steps: tuple[Step, ...]
    counts: dict[str, tuple[int, ...]]
    readers: dict[str, tuple[tuple[int, ...], ...]]


def chunk_order(world: int, rank: int, order: ChunkOrder = "ring") -> tuple[int, ...]:
    """Order in which ``rank`` visits the ranks' chunks.

    ``"ring"`` starts at the local one and walks up, so that no two ranks pull from one peer at once; ``"sequence"``
    is 0, 1, 2, ... on every rank, for consumers that need the sequence in order.
    """
    if order == "ring":
        return tuple((rank + step) % world for step in range(world))
    if order == "sequence":
        return tuple(range(world))
    raise ValueError(f'chunk order: expected "ring" or "sequence", got {order!r}')


def piece_bounds(rows: int, pieces: int, piece: int) -> tuple[int, int]:
    """First and last-plus-one row of ``piece`` when ``rows`` rows are cut into ``pieces`` as evenly as they can."""
    return rows * piece // pieces, rows * (piece + 1) // pieces


def _publish(rank: int, pieces: int, buffer: str = SHARD) -> Iterator[Step]:
    ready = Word(rank, buffer, 0, rank)
    for piece in range(pieces):
        yield Step(Kind.COPY, Task.PUBLISH, rank, piece, writes=(Region(rank, buffer, piece),))
        yield Step(Kind.SIGNAL, word=ready, value=piece + 1)


def _consume(
    world: int, rank: int, order: ChunkOrder, pieces: int, task: Task = Task.CONSUME, *, sent: bool = False
) -> Iterator[Step]:
    for source in chunk_order(world, rank, order):
        if source == rank:
            # The local shard is read where the caller has it: whole, and without waiting for anything.
            yield Step(Kind.COMPUTE, task, rank, -1)
            continue
        early = (Region(source, SENT, 0),) if sent else ()  # its owner signalled that before its shard
        for piece in range(pieces):
            yield Step(Kind.WAIT, rank=source, piece=piece, word=Word(source, SHARD, 0, source), value=piece + 1)
            yield Step(Kind.COMPUTE, task, source, piece, reads=(Region(source, SHARD, piece), *early))
        # One release for the whole chunk: the owner overwrites it at once or not at all.
        yield Step(Kind.RELEASE, rank=source, word=Word(source, SHARD, 0, rank), value=pieces)
        yield from (Step(Kind.RELEASE, rank=source, word=Word(source, SENT, 0, rank), value=1) for _ in early)


def _scatter(
    world: int,
    rank: int,
    pieces: int,
    make: Task = Task.PRODUCE,
    take: Task = Task.ADD,
    *,
    given: tuple[str, ...] = (),
) -> Iterator[Step]:
    """Partial results leave piece by piece; within a piece the ring is walked and the rank's own part comes last.

    A target adds what it is sent one send later than it was produced, so that in step with its peers it never waits.
    Pieces outside, targets inside: then the sum in progress is one piece, not a chunk.  What is made for a rank is made
    from that rank's buffers ``given``.
    """
    sends = [(piece, hop) for piece in range(pieces) for hop in range(world - 1)]

    def target(hop: int) -> int:
        return (rank + hop + 1) % world

    def add(index: int) -> Iterator[Step]:
        piece, hop = sends[index]
        source = (rank - hop - 1) % world
        cell, value = index % PARTIAL_CELLS, index // PARTIAL_CELLS + 1
        yield Step(Kind.WAIT, rank=source, piece=piece, word=Word(source, PARTIAL, cell, source), value=value)
        yield Step(Kind.COMPUTE, take, source, piece, reads=(Region(source, PARTIAL, cell),))
        yield Step(Kind.RELEASE, rank=source, piece=piece, word=Word(source, PARTIAL, cell, rank), value=value)

    for index, (piece, hop) in enumerate(sends):
        cell, value, peer = index % PARTIAL_CELLS, index // PARTIAL_CELLS + 1, target(hop)
        shard = tuple(Region(peer, buffer, 0) for buffer in given)
        if given:  # what was sent ahead its owner signalled before its shard
            yield Step(Kind.WAIT, rank=peer, word=Word(peer, SHARD, 0, peer), value=1)
        if index >= PARTIAL_CELLS:
            reader = target(sends[index - PARTIAL_CELLS][1])
            credit = Word(rank, PARTIAL, cell, reader)
            yield Step(Kind.WAIT, rank=reader, piece=piece, word=credit, value=value - 1)
        yield Step(Kind.COMPUTE, make, peer, piece, reads=shard, writes=(Region(rank, PARTIAL, cell),))
        yield Step(Kind.SIGNAL, rank=peer, piece=piece, word=Word(rank, PARTIAL, cell, rank), value=value)
        yield from (Step(Kind.RELEASE, rank=peer, word=Word(peer, buffer, 0, rank), value=1) for buffer in given)
        if hop > 0:
            yield from add(index - 1)
        if hop == world - 2:
            yield Step(Kind.COMPUTE, make, rank, piece)
            yield from add(index)


def _pipeline(world: int, rank: int, pieces: int, *, given: bool) -> Iterator[Step]:
    """Each piece is consumed, processed and produced; the last part of a piece is added while peers may still be at it.

    It is added once the next piece has been processed, just before a partial result is produced again: a peer has had
    all that time to send it, and one sum is in progress at any time.
    """
    others = chunk_order(world, rank)[1:]
    sends = [(piece, hop) for piece in range(pieces) for hop in range(world - 1)]

    def add(piece: int, hop: int) -> Iterator[Step]:
        source, index = (rank - hop - 1) % world, piece * (world - 1) + hop
        cell, value = index % PARTIAL_CELLS, index // PARTIAL_CELLS + 1
        yield Step(Kind.WAIT, rank=source, piece=piece, word=Word(source, PARTIAL, cell, source), value=value)
        yield Step(Kind.COMPUTE, Task.ADD, source, piece, reads=(Region(source, PARTIAL, cell),))
        yield Step(Kind.RELEASE, rank=source, piece=piece, word=Word(source, PARTIAL, cell, rank), value=value)

    yield from _publish(rank, pieces)
    for piece in range(pieces):
        yield Step(Kind.COMPUTE, Task.CONSUME, rank, piece)
        for source in others:
            yield Step(Kind.WAIT, rank=source, piece=piece, word=Word(source, SHARD, 0, source), value=piece + 1)
            yield Step(Kind.COMPUTE, Task.CONSUME, source, piece, reads=(Region(source, SHARD, piece),))
        yield Step(Kind.COMPUTE, Task.PROCESS, rank, piece, reads=tuple(Region(o, SHARD, piece) for o in others))
        if piece == pieces - 1:
            for source in others:
                yield Step(Kind.RELEASE, rank=source, word=Word(source, SHARD, 0, rank), value=pieces)
        if given:
            continue
        if piece:
            yield from add(piece - 1, world - 2)
        for hop in range(world - 1):
            index, peer = piece * (world - 1) + hop, (rank + hop + 1) % world
            cell, value = index % PARTIAL_CELLS, index // PARTIAL_CELLS + 1
            if index >= PARTIAL_CELLS:
                reader = (rank + sends[index - PARTIAL_CELLS][1] + 1) % world
                credit = Word(rank, PARTIAL, cell, reader)
                yield Step(Kind.WAIT, rank=reader, piece=piece, word=credit, value=value - 1)
            yield Step(Kind.COMPUTE, Task.PRODUCE, peer, piece, writes=(Region(rank, PARTIAL, cell),))
            yield Step(Kind.SIGNAL, rank=peer, piece=piece, word=Word(rank, PARTIAL, cell, rank), value=value)
            if hop:
                yield from add(piece, hop - 1)
        yield Step(Kind.COMPUTE, Task.PRODUCE, rank, piece)
    if not given:
        yield from add(pieces - 1, world - 2)


def _scatter_lease(world: int, rank: int, pieces: int) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    sends = pieces * (world - 1)
    counts, readers = [], []
    for cell in range(PARTIAL_CELLS):
        writes = range(cell, sends, PARTIAL_CELLS)
        counts.append(len(writes))
        readers.append(((rank + writes[-1] % (world - 1) + 1) % world,) if writes else ())
    return tuple(counts), tuple(readers)


@functools.lru_cache(maxsize=1024)
def symmetric_schedule(
    program: Program,
    world: int,
    rank: int,
    *,
    order: ChunkOrder = "ring",
    gather_pieces: int = 1,
    scatter_pieces: int = 1,
    published: bool = False,
    sent: bool = False,
) -> Schedule:
    """Steps of ``rank`` for ``program`` on a transport whose ranks read one another's buffers.

    ``gather+scatter`` publishes first, then scatters, then consumes: the shards arrive while the scattered product
    runs.  ``published`` leaves the publication out because an earlier call has sent the shard ahead.  An exchange is in
    ring order and in one piece; with ``sent`` what it shares was sent ahead, and it publishes the rest.  A pipeline has
    as many pieces to gather as to scatter.

    Raises:
        ValueError: fewer than two ranks, no such program, or a rank or a number of pieces out of range.
    """
    if world < 2 or not 0 <= rank < world:
        raise ValueError(f"schedule: expected 0 <= rank < world and world >= 2, got rank {rank} of {world}")
    if min(gather_pieces, scatter_pieces) < 1:
        raise ValueError(f"schedule: expected at least 1 piece, got {gather_pieces} and {scatter_pieces}")
    if program not in get_args(Program):
        raise ValueError(f"program: expected one of {PROGRAMS}, got {program!r}")
    exchange = program.startswith("exchange")
    if exchange:
        gather_pieces = scatter_pieces = 1
    pipeline = program.startswith("pipeline")
    if pipeline and gather_pieces != scatter_pieces:
        raise ValueError(f"schedule: expected one number of pieces, got {gather_pieces} and {scatter_pieces}")
    steps: list[Step] = []
    counts: dict[str, tuple[int, ...]] = {}
    readers: dict[str, tuple[tuple[int, ...], ...]] = {}
    if program not in ("scatter", "exchange:made"):
        counts[SHARD] = (gather_pieces,)
        readers[SHARD] = (tuple(peer for peer in range(world) if peer != rank),)
        if sent:
            counts[SENT], readers[SENT] = (1,), readers[SHARD]
        if not (published or pipeline):
            steps.extend(_publish(rank, gather_pieces))
    if program not in ("gather", "exchange:given", "pipeline:given"):
        counts[PARTIAL], readers[PARTIAL] = _scatter_lease(world, rank, scatter_pieces)
        if exchange:
            given = () if program == "exchange:made" else (SHARD, SENT) if sent else (SHARD,)
            steps.extend(_scatter(world, rank, 1, Task.VISIT, Task.TAKE, given=given))
        elif not pipeline:
            steps.extend(_scatter(world, rank, scatter_pieces))
    if program in ("gather", "gather+scatter"):
        steps.extend(_consume(world, rank, order, gather_pieces))
    if program == "exchange:given":
        steps.extend(_consume(world, rank, "ring", 1, Task.VISIT, sent=sent))
    if pipeline:
        steps.extend(_pipeline(world, rank, gather_pieces, given=program == "pipeline:given"))
    return Schedule(tuple(steps), counts, readers)


def publication(rank: int, gather_pieces: int = 1, buffer: str = SHARD) -> tuple[Step, ...]:
    """The steps that send ahead: the publication that a later schedule, ``published`` or with ``sent``, leaves out."""
    return tuple(_publish(rank, gather_pieces, buffer))


def sends_ahead_at(schedule: Schedule) -> int:
    """Index of the step before which a call of ``schedule`` runs the :func:`publication` of what it sends ahead.

    Right after its own publication, so that peers have the whole call to read it; or, where it publishes nothing,
    before it first waits: what it makes for its peers is not held up.  No step depends on it, and it depends on none.
    """
    kinds = [step.kind for step in schedule.steps]
    if kinds[0] in (Kind.COPY, Kind.SIGNAL):
        return next(index for index, kind in enumerate(kinds) if kind not in (Kind.COPY, Kind.SIGNAL))
    return kinds.index(Kind.WAIT)
