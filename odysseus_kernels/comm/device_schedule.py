"""Schedules for devices with copy engines: the same steps as on a CPU host, on several streams.

A GPU does not multiply out of a peer's memory: copy engines bring chunks into local slots, or carry partial results to
their owner, while products run.  So a rank has several streams, steps of one stream run in order, and order between
streams of a rank comes from events (RECORD, DEPEND), between ranks from signal words, as everywhere.

Copies between ranks take two streams in turn: on one alone, a link would idle while an event and the start of the next
copy follow one another.

``gather``
    a rank copies its shard into its window, and pulls the others' chunks, piece by piece, into ``slots`` local slots.
``scatter``
    a partial result is produced in a local stage and pushed into its owner's receive slot, one for each source; the
    owner adds all of a piece at once.  Two sets of receive slots: one is added up while the next fills.

Values of words count within one *use* of a window: a device keeps for each window how often it was used (its epoch),
and compares with ``epoch * EPOCH + value``.  So nothing of a call is a constant of the host, and a captured graph can
be replayed.  ``FINAL`` is set last in each use; a value of ``FINAL - EPOCH`` therefore waits for the previous use to be
over, which is all that stands between calls.

No order of hardware queues is assumed: collapsed into one stream, in the order of the steps, a schedule is free of
deadlocks too (CUDA_DEVICE_MAX_CONNECTIONS decides about speed, never about progress).
"""

from __future__ import annotations

import dataclasses
import functools

from .schedule import SHARD, ChunkOrder, Kind, Program, Region, Schedule, Step, Task, Word, chunk_order

__all__ = [
    "ADD_STREAM",
    "COMPUTE",
    "EPOCH",
    "FETCH_SIGNALS",
    "FETCH_STREAMS",
    "FETCH_WAITS",
    "FINAL",
    "MAX_PIECES",
    "OUT",
    "PREVIOUS_USE",
    "PUBLISH_STREAM",
    "PUSH_CREDITS",
    "PUSH_SIGNALS",
    "PUSH_STREAMS",
    "RECEIVE",
    "RECEIVE_SETS",
    "SLOT",
    "STAGE",
    "STAGES",
    "STREAMS",
    "device_schedule",
    "drop_schedule",
    "receive_part",
    "tile_schedule",
]

COMPUTE = "compute"  # the caller's stream: products
PUBLISH_STREAM = "publish"  # the copy of the own shard into its window
FETCH_STREAMS = ("fetch 0", "fetch 1")  # copies of the others' shards
FETCH_WAITS = "fetch waits"
FETCH_SIGNALS = "fetch signals"
PUSH_STREAMS = ("push 0", "push 1")  # copies of partial results to their owners
PUSH_SIGNALS = "push signals"
PUSH_CREDITS = "push credits"
ADD_STREAM = "add"  # sums of what arrived
STREAMS = (
    COMPUTE,
    PUBLISH_STREAM,
    *FETCH_STREAMS,
    FETCH_WAITS,
    FETCH_SIGNALS,
    *PUSH_STREAMS,
    PUSH_SIGNALS,
    PUSH_CREDITS,
    ADD_STREAM,
)

SLOT = "slot"  # local: chunks that were pulled
STAGE = "stage"  # local: partial results on their way out
RECEIVE = "receive"  # a window: partial results from all sources
OUT = "out"  # the operator's output

STAGES = 2
RECEIVE_SETS = 2

EPOCH = 256
FINAL = EPOCH - 1
PREVIOUS_USE = FINAL - EPOCH
# A piece's value must stay below FINAL.
MAX_PIECES = 64


def receive_part(world: int, owner: int, source: int, set_: int) -> int:
    """Which part of ``owner``'s receive window takes what ``source`` sends; there are ``world - 1`` in each set."""
    return set_ * (world - 1) + (owner - source) % world - 1


class _Builder:
    """Steps in the order in which a host enqueues them."""

    def __init__(self, world: int, rank: int) -> None:
        self.world, self.rank = world, rank
        self.peers = [(rank + hop) % world for hop in range(1, world)]
        self.steps: list[Step] = []
        self._events = 0
        self._forked: dict[str, int] = {}
        self._begin = self.record(COMPUTE)

    def record(self, stream: str) -> int:
        """An event behind everything that the stream has so far."""
        event, self._events = self._events, self._events + 1
        self.steps.append(Step(Kind.RECORD, event=event, stream=stream))
        return event

    def depend(self, stream: str, *events: int | None) -> None:
        for event in events:
            if event is not None:
                self.steps.append(Step(Kind.DEPEND, event=event, stream=stream))

    def add(self, stream: str, step: Step) -> None:
        if stream != COMPUTE and stream not in self._forked:
            self._forked[stream] = self._begin
            self.depend(stream, self._begin)
        self.steps.append(step)

    def join(self) -> None:
        """Everything happens before what the caller's stream does next: buffers may then be freed and used again."""
        for stream in self._forked:
            self.depend(COMPUTE, self.record(stream))

    # ---- steps with a word -------------------------------------------------------------------------------------------

    def wait(self, stream: str, word: Word, value: int, *, peer: int, piece: int = 0, inside: bool = False) -> None:
        self.add(stream, Step(Kind.WAIT, None, peer, piece, word, value, stream=stream, inside=inside))

    def signal(self, stream: str, word: Word, value: int, *, peer: int, piece: int = 0, inside: bool = False) -> None:
        kind = Kind.SIGNAL if word.is_ready else Kind.RELEASE
        self.add(stream, Step(kind, None, peer, piece, word, value, stream=stream, inside=inside))


class _Gather(_Builder):
    """Pulls; also the part of a combined program that scatters in between."""

    def begin_gather(self, order: ChunkOrder, pieces: int, slots: int, *, published: bool, words: bool = False) -> None:
        """Publishes and starts the first fetches; with ``words`` an arrival is a local word instead of an event."""
        sources = [source for source in chunk_order(self.world, self.rank, order) if source != self.rank]
        self._order = order
        self._fetches = [(source, piece) for source in sources for piece in range(pieces)]
        self._slots = min(slots, len(self._fetches))
        self._pieces = pieces
        self._words = words
        self._fetched: list[int] = []
        self._consumed: list[int | None] = []
        if not published:
            self.publish(pieces)
            if words:
                # A copy within a device may be a kernel, for which one that spins leaves no room: it goes first.
                self.depend(COMPUTE, self.record(PUBLISH_STREAM))
        for _ in range(self._slots):
            self._fetch()

    def publish(self, pieces: int) -> None:
        for peer in self.peers:
            self.wait(FETCH_WAITS, Word(self.rank, SHARD, 0, peer), PREVIOUS_USE, peer=peer)
        free = self.record(FETCH_WAITS)
        ready = Word(self.rank, SHARD, 0, self.rank)
        for piece in range(pieces):
            window = (Region(self.rank, SHARD, piece),)
            step = Step(Kind.COPY, Task.PUBLISH, self.rank, piece, writes=window, stream=PUBLISH_STREAM)
            if piece == 0:
                self.depend(PUBLISH_STREAM, free)
            self.add(PUBLISH_STREAM, step)
            self.depend(FETCH_SIGNALS, self.record(PUBLISH_STREAM))
            self.signal(FETCH_SIGNALS, ready, _value(piece, pieces), peer=self.rank, piece=piece)

    def _fetch(self) -> None:
        """The next piece into the next slot."""
        index = len(self._fetched)
        stream = FETCH_STREAMS[index % len(FETCH_STREAMS)]
        source, piece = self._fetches[index]
        self.wait(FETCH_WAITS, Word(source, SHARD, 0, source), piece + 1, peer=source, piece=piece)
        arrived = self.record(FETCH_WAITS)
        free = self._consumed[index - self._slots] if index >= self._slots else None
        self.depend(stream, arrived, free)
        window, slot = Region(source, SHARD, piece), Region(self.rank, SLOT, index % self._slots)
        self.add(stream, Step(Kind.COPY, Task.FETCH, source, piece, reads=(window,), writes=(slot,), stream=stream))
        self._fetched.append(self.record(stream))
        last = piece == self._pieces - 1
        if not (last or self._words):
            return
        # The last copy of each stream: those before are done then, too.
        self.depend(FETCH_SIGNALS, *self._fetched[-len(FETCH_STREAMS) :])
        if self._words:
            visit = index // self._pieces
            here = Word(self.rank, SLOT, visit, self.rank)
            self.signal(FETCH_SIGNALS, here, piece + 1, peer=source, piece=piece)
        if last:
            # One release for the whole chunk: the owner overwrites it at once or not at all.
            self.signal(FETCH_SIGNALS, Word(source, SHARD, 0, self.rank), FINAL, peer=source, piece=piece)

    def finish_gather(self) -> None:
        """Consumes in order; each consumed piece makes room for a fetch."""
        visits = iter(range(len(self._fetches)))
        for source in chunk_order(self.world, self.rank, self._order):
            if source == self.rank:
                # Read where the caller has it: whole, and without waiting for anything.
                self.add(COMPUTE, Step(Kind.COMPUTE, Task.CONSUME, source, -1, inside=self._words))
                continue
            for _ in range(self._pieces):
                self._consume(next(visits))

    def _consume(self, index: int) -> None:
        source, piece = self._fetches[index]
        region = (Region(self.rank, SLOT, index % self._slots),)
        if self._words:
            here = Word(self.rank, SLOT, index // self._pieces, self.rank)
            self.wait(COMPUTE, here, piece + 1, peer=source, piece=piece, inside=True)
        else:
            self.depend(COMPUTE, self._fetched[index])
        step = Step(Kind.COMPUTE, Task.CONSUME, source, piece, reads=region, inside=self._words)
        self.add(COMPUTE, step)
        more = len(self._fetched) < len(self._fetches)
        self._consumed.append(self.record(COMPUTE) if more else None)
        if more:
            self._fetch()


class _Both(_Gather):
    """Gathers, scatters, or gathers while it scatters."""

    def scatter(self, pieces: int) -> None:
        """Pieces outside, targets inside: a piece is complete at its owner early, and buffers are pieces, not chunks.

        The own part of a piece comes last, so that the others' are on their way meanwhile.
        """
        pushed: list[int] = []
        for piece in range(pieces):
            value = piece - RECEIVE_SETS + 1 if piece >= RECEIVE_SETS else PREVIOUS_USE
            for target in self.peers:
                credit = Word(target, RECEIVE, 0, target)
                self.wait(PUSH_CREDITS, credit, value, peer=target, piece=piece)
            free = self.record(PUSH_CREDITS)
            for target in self.peers:
                index = len(pushed)
                stream = PUSH_STREAMS[index % len(PUSH_STREAMS)]
                stage = (Region(self.rank, STAGE, index % STAGES),)
                self.depend(COMPUTE, pushed[index - STAGES] if index >= STAGES else None)
                self.add(COMPUTE, Step(Kind.COMPUTE, Task.PRODUCE, target, piece, writes=stage))
                produced = self.record(COMPUTE)
                self.depend(stream, produced, free)
                slot = Region(target, RECEIVE, receive_part(self.world, target, self.rank, piece % RECEIVE_SETS))
                step = Step(Kind.COPY, Task.PUSH, target, piece, reads=stage, writes=(slot,), stream=stream)
                self.add(stream, step)
                pushed.append(self.record(stream))
                self.depend(PUSH_SIGNALS, pushed[-1])
                arrived = Word(target, RECEIVE, 0, self.rank)
                self.signal(PUSH_SIGNALS, arrived, _value(piece, pieces), peer=target, piece=piece)
            self.add(COMPUTE, self._own(piece))
            self._sum(piece, pieces, RECEIVE_SETS)

    def scatter_tiles(self) -> None:
        """The same by one kernel: it stores straight into the owners' receive slots and signals by itself."""
        for target in self.peers:
            self.wait(COMPUTE, Word(target, RECEIVE, 0, target), PREVIOUS_USE, peer=target, inside=True)
            slot = (Region(target, RECEIVE, receive_part(self.world, target, self.rank, 0)),)
            self.add(COMPUTE, Step(Kind.COMPUTE, Task.PRODUCE, target, 0, writes=slot, inside=True))
            self.signal(COMPUTE, Word(target, RECEIVE, 0, self.rank), FINAL, peer=target, inside=True)
        self.add(COMPUTE, self._own(0, inside=True))
        self._sum(0, 1, 1)

    def _own(self, piece: int, *, inside: bool = False) -> Step:
        out = (Region(self.rank, OUT, piece),)
        return Step(Kind.COMPUTE, Task.PRODUCE, self.rank, piece, writes=out, inside=inside)

    def _sum(self, piece: int, pieces: int, sets: int) -> None:
        own = self.record(COMPUTE)
        received = []
        for source in reversed(self.peers):  # in the order in which they send: rank - 1 first
            arrived = Word(self.rank, RECEIVE, 0, source)
            self.wait(ADD_STREAM, arrived, piece + 1, peer=source, piece=piece)
            part = receive_part(self.world, self.rank, source, piece % sets)
            received.append(Region(self.rank, RECEIVE, part))
        self.depend(ADD_STREAM, own)
        out = (Region(self.rank, OUT, piece),)
        step = Step(Kind.COMPUTE, Task.ADD, self.rank, piece, reads=(*received, *out), writes=out, stream=ADD_STREAM)
        self.add(ADD_STREAM, step)
        credit = Word(self.rank, RECEIVE, 0, self.rank)
        self.signal(ADD_STREAM, credit, _value(piece, pieces), peer=self.rank, piece=piece)


def _value(piece: int, pieces: int) -> int:
    """What a word holds once ``piece`` is done: its number, or FINAL for the last."""
    return FINAL if piece == pieces - 1 else piece + 1


def _check(world: int, rank: int, *counts: int) -> None:
    if world < 2 or not 0 <= rank < world:
        raise ValueError(f"schedule: expected 0 <= rank < world and world >= 2, got rank {rank} of {world}")
    if min(counts) < 1 or max(counts) > MAX_PIECES:
        raise ValueError(f"schedule: expected from 1 to {MAX_PIECES} pieces and slots, got {counts}")


def _made(builder: _Builder) -> Schedule:
    builder.join()
    return Schedule(tuple(builder.steps), {}, {})


@functools.lru_cache(maxsize=1024)
def device_schedule(
    program: Program,
    world: int,
    rank: int,
    *,
    order: ChunkOrder = "ring",
    gather_pieces: int = 1,
    scatter_pieces: int = 1,
    slots: int = 2,
    published: bool = False,
    ahead: int = 0,
) -> Schedule:
    """Steps of ``rank`` for ``program``, in the order in which a host enqueues them.

    Args:
        program: what is communicated; ``gather+scatter`` publishes and fills its slots first, then scatters, then
            consumes.
        world, rank: the ranks, and which one this is.
        order: order in which chunks are consumed.
        gather_pieces, scatter_pieces: pieces into which a chunk is cut.
        slots: local slots for pieces that were pulled.
        published: the shard lies in the window already: an earlier call sent it ahead.
        ahead: pieces of a shard that is sent ahead, for a later call; its window is named ``"ahead"``.

    Raises:
        ValueError: fewer than two ranks, a rank or a number of pieces out of range, or an unknown program.
    """
    _check(world, rank, gather_pieces, scatter_pieces, slots)
    builder = _Both(world, rank)
    gathers = program in ("gather", "gather+scatter")
    scatters = program in ("scatter", "gather+scatter")
    if not (gathers or scatters):
        raise ValueError(f'program: expected "gather", "scatter" or "gather+scatter", got {program!r}')
    if gathers:
        builder.begin_gather(order, gather_pieces, slots, published=published)
    if ahead:
        start = len(builder.steps)
        builder.publish(ahead)
        builder.steps[start:] = [_renamed(step) for step in builder.steps[start:]]
    if scatters:
        builder.scatter(scatter_pieces)
    if gathers:
        builder.finish_gather()
    return _made(builder)


AHEAD = "ahead"


def _renamed(step: Step) -> Step:
    """The publication of a shard that is sent ahead goes to a window of its own."""
    word = step.word._replace(buffer=AHEAD) if step.word is not None else None
    writes = tuple(region._replace(buffer=AHEAD) for region in step.writes)
    return dataclasses.replace(step, word=word, writes=writes)


@functools.lru_cache(maxsize=1024)
def tile_schedule(
    program: Program, world: int, rank: int, *, order: ChunkOrder = "ring", gather_pieces: int = 1
) -> Schedule:
    """Like :func:`device_schedule` for one kernel whose tiles wait and signal; its steps are marked ``inside``.

    Every chunk has a slot, every source a whole chunk of the receive window: memory that the caller bounds.
    """
    _check(world, rank, gather_pieces)
    builder = _Both(world, rank)
    if program == "gather":
        slots = (world - 1) * gather_pieces
        builder.begin_gather(order, gather_pieces, slots, published=False, words=True)
        builder.finish_gather()
    elif program == "scatter":
        builder.scatter_tiles()
    else:
        raise ValueError(f'program of a tile kernel: expected "gather" or "scatter", got {program!r}')
    return _made(builder)


@functools.lru_cache(maxsize=64)
def drop_schedule(world: int, rank: int) -> Schedule:
    """Ends the use of a shard that was sent ahead and that nobody will read."""
    builder = _Builder(world, rank)
    for source in builder.peers:
        builder.signal(COMPUTE, Word(source, SHARD, 0, rank), FINAL, peer=source)
    return _made(builder)
