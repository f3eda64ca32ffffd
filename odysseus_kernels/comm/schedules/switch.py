"""Schedules for devices behind a switch that adds and copies: sums by loads, shards by stores of a multicast address.

Same streams, words and rules as in ``comm/schedules/device.py``; nothing is pushed into or pulled from a single peer.

``scatter``
    a rank produces its partial results for all ranks, itself included, into *its own* window of parts.  Once all ranks
    have signalled that their parts of a piece are complete, its owner adds them with one load of the switch, and says
    so to all: a rank may then produce into the cells of that piece again.  Two sets of cells, as there are two sets of
    receive slots.
``gather``
    a rank stores its shard into *all* ranks' windows at once, piece by piece into ``sets`` sets of cells; chunks are
    consumed where they arrive, all ranks' first pieces first.

Windows of the two kinds are others than those of ``comm/schedules/device.py``.  There a window's next use waits for its
owner alone; here everybody reads, or writes, everybody's window, and waits for everybody.

As there, a wait comes after all own signals that were enqueued before it, and every step depends only on steps that
were enqueued before it on all ranks:

* arrivals of a piece are waited for after the rank's own signals of that piece;
* room for a piece to be produced is waited for after the rank's own sum of the piece before the last one, and for one
  to be stored after the rank has consumed what lay in its cells.
"""

from __future__ import annotations

import functools

from odysseus_kernels.comm.schedules.device import FINAL, MAX_PIECES, OUT, PREVIOUS_USE
from odysseus_kernels.comm.schedules.steps import Kind, Program, Region, Schedule, Step, Task, Word
from odysseus_kernels.comm.schedules.streams import COMPUTE, LOCAL, SIGNALS, WAITS, Builder

__all__ = ["PARTS", "PART_SETS", "PUSHED", "switch_part", "switch_schedule"]

PARTS = "parts"  # a window: partial results that this rank has made for all ranks
PUSHED = "pushed"  # a window: chunks that all ranks have stored

PART_SETS = 2


def switch_part(world: int, rank: int, set_: int) -> int:
    """Which cell of every rank's window belongs to ``rank``: what it adds up, or what it stores."""
    return set_ * world + rank


class _Switch(Builder):
    def begin_scatter(self) -> None:
        """Waits until nobody reads the window's previous use any more, ahead of everything that this call signals."""
        self._room = self._produce_after(0)

    def _produce_after(self, piece: int) -> int:
        """All owners have added up what lay in the cells of ``piece``."""
        value = piece - PART_SETS + 1 if piece >= PART_SETS else PREVIOUS_USE
        for owner in self.peers:
            self.wait(WAITS, Word(owner, PARTS, 0, owner), value, peer=owner, piece=piece)
        return self.record(WAITS)

    def scatter(self, pieces: int) -> None:
        """Pieces outside, targets inside, the own part last: an owner adds once a piece is complete everywhere."""
        room, added = self._room, list[int]()
        for piece in range(pieces):
            later = piece + 1
            room_later = self._produce_after(later) if PART_SETS <= later < pieces else room
            self.depend(COMPUTE, room, added[piece - PART_SETS] if piece >= PART_SETS else None)
            for target in (*self.peers, self.rank):
                cell = (Region(self.rank, PARTS, switch_part(self.world, target, piece % PART_SETS)),)
                self.add(COMPUTE, Step(Kind.COMPUTE, Task.PRODUCE, target, piece, writes=cell))
                if target != self.rank:
                    self.depend(SIGNALS, self.record(COMPUTE))
                    made = Word(target, PARTS, 0, self.rank)
                    self.signal(SIGNALS, made, _value(piece, pieces), peer=target, piece=piece)
            added.append(self._sum(piece, pieces))
            room = room_later

    def _sum(self, piece: int, pieces: int) -> int:
        own = self.record(COMPUTE)
        for source in reversed(self.peers):
            self.wait(LOCAL, Word(self.rank, PARTS, 0, source), piece + 1, peer=source, piece=piece)
        self.depend(LOCAL, own)
        cell = switch_part(self.world, self.rank, piece % PART_SETS)
        everywhere = tuple(Region(rank, PARTS, cell) for rank in range(self.world))
        out = (Region(self.rank, OUT, piece),)
        step = Step(Kind.COMPUTE, Task.ADD, self.rank, piece, reads=everywhere, writes=out, stream=LOCAL)
        self.add(LOCAL, step)
        self.signal(LOCAL, Word(self.rank, PARTS, 0, self.rank), _value(piece, pieces), peer=self.rank, piece=piece)
        return self.record(LOCAL)

    # ---- stores to all -----------------------------------------------------------------------------------------------

    def begin_gather(self, pieces: int, sets: int) -> None:
        """Waits until nobody reads what this rank stored in the windows' previous use."""
        self._pieces, self._sets = pieces, min(sets, pieces)
        for peer in self.peers:
            self.wait(LOCAL, Word(self.rank, PUSHED, 0, peer), PREVIOUS_USE, peer=peer)

    def store(self, piece: int) -> None:
        """The rank's own piece, to all ranks."""
        if piece >= self._sets:
            for peer in self.peers:
                consumed = Word(self.rank, PUSHED, 0, peer)
                self.wait(LOCAL, consumed, piece - self._sets + 1, peer=peer, piece=piece)
        cell = switch_part(self.world, self.rank, piece % self._sets)
        everywhere = tuple(Region(rank, PUSHED, cell) for rank in range(self.world))
        self.add(LOCAL, Step(Kind.COPY, Task.PUBLISH, self.rank, piece, writes=everywhere, stream=LOCAL))
        stored = Word(self.rank, PUSHED, 0, self.rank)
        self.signal(LOCAL, stored, _value(piece, self._pieces), peer=self.rank, piece=piece)

    def consume(self, stored: int) -> None:
        """All pieces, of which ``stored`` are under way; with several sets the next one goes before one is consumed."""
        self.add(COMPUTE, Step(Kind.COMPUTE, Task.CONSUME, self.rank, -1))  # read where the caller has it
        for piece in range(self._pieces):
            for source in self.peers:
                self.wait(WAITS, Word(source, PUSHED, 0, source), piece + 1, peer=source, piece=piece)
            self.depend(COMPUTE, self.record(WAITS))
            if stored < min(self._pieces, piece + self._sets):
                self.store(stored)
                stored += 1
            for source in self.peers:
                cell = (Region(self.rank, PUSHED, switch_part(self.world, source, piece % self._sets)),)
                self.add(COMPUTE, Step(Kind.COMPUTE, Task.CONSUME, source, piece, reads=cell))
            if piece + self._sets < self._pieces or piece == self._pieces - 1:
                self.depend(SIGNALS, self.record(COMPUTE))
                for source in self.peers:
                    consumed = Word(source, PUSHED, 0, self.rank)
                    self.signal(SIGNALS, consumed, _value(piece, self._pieces), peer=source, piece=piece)
            if stored == piece + 1 < self._pieces:  # into the one set of cells
                self.store(stored)
                stored += 1


def _value(piece: int, pieces: int) -> int:
    """What a word holds once ``piece`` is done: its number, or FINAL for the last."""
    return FINAL if piece == pieces - 1 else piece + 1


@functools.lru_cache(maxsize=1024)
def switch_schedule(
    program: Program, world: int, rank: int, *, gather_pieces: int = 1, scatter_pieces: int = 1, sets: int = 2
) -> Schedule:
    """Steps of ``rank`` for ``program``, in the order in which a host enqueues them.

    Args:
        program: what is communicated; ``gather+scatter`` stores its whole shard first, then scatters, then consumes.
        world, rank: the ranks, and which one this is.
        gather_pieces, scatter_pieces: pieces into which a chunk is cut.
        sets: sets of cells for pieces that are stored; ``gather+scatter`` has one for each piece.

    Raises:
        ValueError: fewer than two ranks, a rank or a number of pieces out of range, or an unknown program.
    """
    if world < 2 or not 0 <= rank < world:
        raise ValueError(f"schedule: expected 0 <= rank < world and world >= 2, got rank {rank} of {world}")
    counts = (gather_pieces, scatter_pieces, sets)
    if min(counts) < 1 or max(counts) > MAX_PIECES:
        raise ValueError(f"schedule: expected from 1 to {MAX_PIECES} pieces and sets, got {counts}")
    builder = _Switch(world, rank)
    if program == "scatter":
        builder.begin_scatter()
        builder.scatter(scatter_pieces)
    elif program == "gather":
        builder.begin_gather(gather_pieces, sets)
        builder.store(0)
        builder.consume(1)
    elif program == "gather+scatter":
        builder.begin_scatter()
        builder.begin_gather(gather_pieces, gather_pieces)
        for piece in range(gather_pieces):
            builder.store(piece)
        builder.scatter(scatter_pieces)
        builder.consume(gather_pieces)
    else:
        raise ValueError(f'program: expected "gather", "scatter" or "gather+scatter", got {program!r}')
    builder.join()
    return Schedule(tuple(builder.steps), {}, {})
