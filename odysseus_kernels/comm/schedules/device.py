"""Schedules for devices with copy engines: the same steps as on a CPU host, on several streams.

A GPU does not multiply out of a peer's memory: copy engines bring chunks into local slots, or carry partial results to
their owner, while products run.  So a rank has several streams (``comm/schedules/streams.py``), steps of one stream run
in order, and order between streams of a rank comes from events (RECORD, DEPEND), between ranks from signal words, as
everywhere.

``gather``
    a rank copies its shard into its window, and pulls the others' chunks, piece by piece, into ``slots`` local slots.
``scatter``
    a partial result is produced in a local stage and pushed into its owner's receive slot, one for each source; the
    owner adds all of a piece at once.  Two sets of receive slots: one is added up while the next fills.

Values of words count within one *use* of a window: a device keeps for each window how often it was used (its epoch),
and compares with ``epoch * EPOCH + value``.  So nothing of a call is a constant of the host, and a captured graph can
be replayed.  ``FINAL`` is set last in each use; a value of ``FINAL - EPOCH`` therefore waits for the previous use to be
over, which is all that stands between calls.

Where a wait stands decides which own signals it comes after, also in a graph.  None of these edges delays anything that
could run, as long as ranks are in step:

* the first fetch of a piece comes after the publication of that piece: peers publish it at that time, too;
* the window's readers release it after the last fetch: before, another reader still reads anyway;
* arrivals of a piece are waited for after the rank's own pushes of that piece: what arrives last was pushed last;
* credit for a piece is waited for after the rank's own sum of the piece before the last one, since it waits for the
  peers' sums of that piece.
"""

from __future__ import annotations

import functools

from odysseus_kernels.comm.schedules.steps import (
    SHARD,
    ChunkOrder,
    Kind,
    Program,
    Region,
    Schedule,
    Step,
    Task,
    Word,
    chunk_order,
)
from odysseus_kernels.comm.schedules.streams import COMPUTE, LOCAL, SIGNALS, WAITS, Builder

__all__ = [
    "AHEAD",
    "EPOCH",
    "FINAL",
    "MAX_PIECES",
    "OUT",
    "PREVIOUS_USE",
    "RECEIVE",
    "RECEIVE_SETS",
    "SLOT",
    "STAGE",
    "STAGES",
    "device_schedule",
    "drop_schedule",
    "receive_part",
    "tile_schedule",
]

AHEAD = "ahead"  # a window: the shard of a later call
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


class _Gather(Builder):
    """Pulls; also the part of a combined program that scatters in between."""

    def begin_gather(self, order: ChunkOrder, pieces: int, slots: int, *, published: bool, words: bool = False) -> None:
        """Publishes; with ``words`` an arrival is a local word instead of an event."""
        sources = [source for source in chunk_order(self.world, self.rank, order) if source != self.rank]
        self._order = order
        self._fetches = [(source, piece) for source in sources for piece in range(pieces)]
        self._slots = min(slots, len(self._fetches))
        self._pieces = pieces
        self._words = words
        self._arrived: list[int] = []
        self._fetched: list[int] = []
        self._newest_fetch: dict[str, int] = {}
        self._consumed: list[int | None] = []
        self._to_publish = [] if published else self._publication(SHARD, pieces)

    def _publication(self, buffer: str, pieces: int) -> list[tuple[Step, int]]:
        """Copies of a shard into its window, each with the value of the signal that follows it."""
        for peer in self.peers:
            self.wait(LOCAL, Word(self.rank, buffer, 0, peer), PREVIOUS_USE, peer=peer)
        windows = [(Region(self.rank, buffer, piece),) for piece in range(pieces)]
        return [
            (Step(Kind.COPY, Task.PUBLISH, self.rank, piece, writes=window, stream=LOCAL), _value(piece, pieces))
            for piece, window in enumerate(windows)
        ]

    def _publish(self, step: Step, value: int) -> None:
        self.add(LOCAL, step)
        ready = Word(self.rank, step.writes[0].buffer, 0, self.rank)
        self.signal(LOCAL, ready, value, peer=self.rank, piece=step.piece)

    def publish_and_fetch(self) -> None:
        """The rank's own pieces, and the others' into all slots, piece by piece in step with the peers."""
        for index in range(max(len(self._to_publish), self._slots)):
            if index < len(self._to_publish):
                self._publish(*self._to_publish[index])
            if index < self._slots:
                self._await()
                self._fetch()
        if self._words and self._to_publish:
            # A copy within a device may be a kernel, for which a spinning one leaves no room: it goes first.
            self.depend(COMPUTE, self.record(LOCAL))

    def publish(self) -> None:
        """The rank's own pieces alone."""
        for step, value in self._to_publish:
            self._publish(step, value)

    def _await(self) -> None:
        """The next piece is there."""
        source, piece = self._fetches[len(self._arrived)]
        self.wait(WAITS, Word(source, SHARD, 0, source), piece + 1, peer=source, piece=piece)
        self._arrived.append(self.record(WAITS))

    def _fetch(self) -> None:
        """The next piece into the next slot."""
        index, stream = len(self._fetched), self.copy_stream()
        source, piece = self._fetches[index]
        free = self._consumed[index - self._slots] if index >= self._slots else None
        self.depend(stream, self._arrived[index], free)
        window, slot = Region(source, SHARD, piece), Region(self.rank, SLOT, index % self._slots)
        self.add(stream, Step(Kind.COPY, Task.FETCH, source, piece, reads=(window,), writes=(slot,), stream=stream))
        self._fetched.append(self.record(stream))
        self._newest_fetch[stream] = self._fetched[-1]
        if self._words:
            self.depend(SIGNALS, self._fetched[-1])
            here = Word(self.rank, SLOT, index // self._pieces, self.rank)
            self.signal(SIGNALS, here, piece + 1, peer=source, piece=piece, to_peers=False)

    def finish_gather(self, ahead: int = 0, *, after_fetches: bool = False) -> None:
        """Consumes in order; each consumed piece makes room for a fetch.

        Args:
            ahead: pieces of another shard, published as soon as no fetch is left whose wait would come after it.
            after_fetches: nothing is consumed before everything was fetched.
        """
        if after_fetches:
            self.depend(COMPUTE, self.record(SIGNALS))
        visits = iter(range(len(self._fetches)))
        fetching = True
        for source in chunk_order(self.world, self.rank, self._order):
            for _ in range(1 if source == self.rank else self._pieces):
                if fetching and len(self._fetched) == len(self._fetches) and not self._words:
                    self._end_fetches(ahead)
                    fetching = False
                if source == self.rank:
                    # Read where the caller has it: whole, and without waiting for anything.
                    self.add(COMPUTE, Step(Kind.COMPUTE, Task.CONSUME, source, -1, inside=self._words))
                else:
                    self._consume(next(visits))
        if fetching:
            self._end_fetches(ahead)

    def send_ahead(self, pieces: int) -> None:
        """A shard for a later call, into a window of its own."""
        for step, value in self._publication(AHEAD, pieces) if pieces else ():
            self._publish(step, value)

    def _end_fetches(self, ahead: int) -> None:
        self.send_ahead(ahead)
        # The last copy of each stream: those before are done then, too.
        self.depend(SIGNALS, *self._newest_fetch.values())
        for source in dict.fromkeys(source for source, _ in self._fetches):
            word = Word(source, SHARD, 0, self.rank)
            self.signal(SIGNALS, word, FINAL, peer=source, piece=self._pieces - 1)

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
            self._await()
            self._fetch()


class _Both(_Gather):
    """Gathers, scatters, or gathers while it scatters."""

    def begin_scatter(self) -> None:
        """Waits for the previous use of the receive windows, ahead of everything that this call signals."""
        self._free = self._credits(0)

    def _credits(self, piece: int) -> int:
        """Room for a piece in all owners' windows."""
        value = piece - RECEIVE_SETS + 1 if piece >= RECEIVE_SETS else PREVIOUS_USE
        for target in self.peers:
            self.wait(WAITS, Word(target, RECEIVE, 0, target), value, peer=target, piece=piece)
        return self.record(WAITS)

    def scatter(self, pieces: int, *, fetches: bool = False) -> None:
        """Pieces outside, targets inside: a piece is complete at its owner early, and buffers are pieces, not chunks.

        The own part of a piece comes last, so that the others' are on their way meanwhile.

        With ``fetches`` slots are filled during the last piece: in one stream what is fetched, in the other what is
        pushed, for a link carries both ways at once, and no push is behind a peer that has not published.
        """
        pushed: list[int] = []
        free = self._free
        for piece in range(pieces):
            # Ahead of this piece's signals, which it would come after.
            later = piece + 1
            free_later = self._credits(later) if RECEIVE_SETS <= later < pieces else free
            filling = self._slots if fetches and later == pieces else 0
            for _ in range(filling):
                self._await()
            for target in self.peers:
                self._push(target, piece, pieces, pushed, free)
                if filling:
                    self._fetch()
                    filling -= 1
            for _ in range(filling):
                self._fetch()
            self.add(COMPUTE, self._own(piece))
            self._sum(piece, pieces, RECEIVE_SETS)
            free = free_later

    def _push(self, target: int, piece: int, pieces: int, pushed: list[int], free: int) -> None:
        """Produces a partial result and sends it to its owner."""
        index, stream = len(pushed), self.copy_stream()
        stage = (Region(self.rank, STAGE, index % STAGES),)
        self.depend(COMPUTE, pushed[index - STAGES] if index >= STAGES else None)
        self.add(COMPUTE, Step(Kind.COMPUTE, Task.PRODUCE, target, piece, writes=stage))
        self.depend(stream, self.record(COMPUTE), free)
        slot = Region(target, RECEIVE, receive_part(self.world, target, self.rank, piece % RECEIVE_SETS))
        self.add(stream, Step(Kind.COPY, Task.PUSH, target, piece, reads=stage, writes=(slot,), stream=stream))
        pushed.append(self.record(stream))
        self.depend(SIGNALS, pushed[-1])
        arrived = Word(target, RECEIVE, 0, self.rank)
        self.signal(SIGNALS, arrived, _value(piece, pieces), peer=target, piece=piece)

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
            self.wait(LOCAL, arrived, piece + 1, peer=source, piece=piece)
            part = receive_part(self.world, self.rank, source, piece % sets)
            received.append(Region(self.rank, RECEIVE, part))
        self.depend(LOCAL, own)
        out = (Region(self.rank, OUT, piece),)
        step = Step(Kind.COMPUTE, Task.ADD, self.rank, piece, reads=(*received, *out), writes=out, stream=LOCAL)
        self.add(LOCAL, step)
        credit = Word(self.rank, RECEIVE, 0, self.rank)
        self.signal(LOCAL, credit, _value(piece, pieces), peer=self.rank, piece=piece)


def _value(piece: int, pieces: int) -> int:
    """What a word holds once ``piece`` is done: its number, or FINAL for the last."""
    return FINAL if piece == pieces - 1 else piece + 1


def _check(world: int, rank: int, *counts: int) -> None:
    if world < 2 or not 0 <= rank < world:
        raise ValueError(f"schedule: expected 0 <= rank < world and world >= 2, got rank {rank} of {world}")
    if min(counts) < 1 or max(counts) > MAX_PIECES:
        raise ValueError(f"schedule: expected from 1 to {MAX_PIECES} pieces and slots, got {counts}")


def _made(builder: Builder) -> Schedule:
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
        program: what is communicated; ``gather+scatter`` publishes first, then scatters and fills its slots, then
            consumes.
        world, rank: the ranks, and which one this is.
        order: order in which chunks are consumed.
        gather_pieces, scatter_pieces: pieces into which a chunk is cut.
        slots: local slots for pieces that were pulled.
        published: the shard lies in the window already: an earlier call sent it ahead.
        ahead: pieces of a shard sent ahead for a later call, in the window ``"ahead"``; by a scatter before its sums.

    Raises:
        ValueError: fewer than two ranks, a rank or a number of pieces out of range, or an unknown program.
    """
    _check(world, rank, gather_pieces, scatter_pieces, slots)
    builder = _Both(world, rank)
    gathers = program in ("gather", "gather+scatter")
    scatters = program in ("scatter", "gather+scatter")
    if not (gathers or scatters):
        raise ValueError(f'program: expected "gather", "scatter" or "gather+scatter", got {program!r}')
    if scatters:
        builder.begin_scatter()
    if gathers:
        builder.begin_gather(order, gather_pieces, slots, published=published)
    if gathers and scatters:
        builder.publish()
        builder.scatter(scatter_pieces, fetches=True)
    elif gathers:
        builder.publish_and_fetch()
    else:
        builder.send_ahead(ahead)
        builder.scatter(scatter_pieces)
    if gathers:
        builder.finish_gather(ahead)
    return _made(builder)


@functools.lru_cache(maxsize=1024)
def tile_schedule(
    program: Program,
    world: int,
    rank: int,
    *,
    order: ChunkOrder = "ring",
    gather_pieces: int = 1,
    captured: bool = False,
) -> Schedule:
    """Like :func:`device_schedule` for one kernel whose tiles wait and signal; its steps are marked ``inside``.

    Every chunk has a slot, every source a whole chunk of the receive window: memory that the caller bounds.

    ``captured``: the steps become a graph.  A replay may run a kernel to its end before copies that no edge orders, so
    a kernel that gathers then begins when everything is there.
    """
    _check(world, rank, gather_pieces)
    builder = _Both(world, rank)
    if program == "gather":
        slots = (world - 1) * gather_pieces
        builder.begin_gather(order, gather_pieces, slots, published=False, words=True)
        builder.publish_and_fetch()
        builder.finish_gather(after_fetches=captured)
    elif program == "scatter":
        builder.scatter_tiles()
    else:
        raise ValueError(f'program of a tile kernel: expected "gather" or "scatter", got {program!r}')
    return _made(builder)


@functools.lru_cache(maxsize=64)
def drop_schedule(world: int, rank: int) -> Schedule:
    """Ends the use of a shard that was sent ahead and that nobody will read."""
    builder = Builder(world, rank)
    for source in builder.peers:
        builder.signal(COMPUTE, Word(source, SHARD, 0, rank), FINAL, peer=source)
    return _made(builder)
