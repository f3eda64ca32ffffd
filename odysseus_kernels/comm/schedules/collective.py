"""The steps of every program over asynchronous collectives, as data (``comm/schedules/steps.py``)."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator
from typing import get_args

from odysseus_kernels.comm.schedules.steps import (
    PARTIAL,
    PROGRAMS,
    SHARD,
    ChunkOrder,
    Kind,
    Program,
    Region,
    Schedule,
    Step,
    Task,
    chunk_order,
)

__all__ = ["IN_FLIGHT", "collective_schedule", "sends_ahead_after", "tapered_spans"]

_LATE = "late"
_RECEIVED = "received"
_GIVING = "giving"
_GATHERS = (Task.ALL_GATHER, Task.LATE_GATHER, Task.GIVEN)
# Two sets of collective buffers: one travels while the other is multiplied.
IN_FLIGHT = 2
# Relative sizes of a gather's pieces; a scatter's are the other way round.  What is multiplied after the last piece has
# arrived, or before the first one leaves, is not hidden: that piece is small.  Each is at least half of the one before,
# so that the next is issued before the link has moved the one between them.
_SHARES = {1: (1,), 2: (2, 1), 4: (2, 3, 2, 1), 6: (2, 4, 4, 3, 2, 1)}


def tapered_spans(rows: int, pieces: int, *, scattered: bool) -> tuple[tuple[int, int], ...]:
    """First and last-plus-one row of 1, 2, 4 or 6 pieces, of which the last is small, or the first one if scattered.

    ``rows`` that are too few to give every piece some are cut into fewer.
    """
    while pieces > 1 and rows < sum(_SHARES[pieces]):
        pieces -= 2 if pieces > 2 else 1
    shares = _SHARES[pieces][:: -1 if scattered else 1]
    ends = [rows * sum(shares[: index + 1]) // sum(shares) for index in range(pieces)]
    return tuple(zip([0, *ends], ends, strict=False))


@functools.lru_cache(maxsize=1024)
def collective_schedule(
    program: Program,
    world: int,
    rank: int,
    *,
    order: ChunkOrder = "ring",
    gather_pieces: int = 1,
    scatter_pieces: int = 1,
    early: bool = True,
    late: bool = False,
    cuts_own: bool = False,
    ahead: int = 0,
) -> Schedule:
    """Steps of ``rank`` for ``program`` over asynchronous collectives of a process group.

    Piece k travels while piece k - 1 multiplies; at most two pieces are in flight.  Ranks issue the same collectives
    in the same order, which is what a process group asks for.

    A pipeline gathers what is consumed before a piece is processed (``early``), what it concludes on after its results
    have left (``late``), or both, in transfers of their own: while a large piece is processed the link carries what the
    next but one consumes, and nothing but what is concluded on is held that long.  What has been scattered is added
    when the next piece's results are on their way.

    A gather consumes this rank's own shard first, while the first piece travels.  ``cuts_own`` is for a link that shall
    not idle behind a host that issues nothing while it multiplies:

    * a gather consumes the own shard piece by piece, between the others', as many pieces ahead as take a link that is
      as fast as the products one piece's time; if the call before has sent ``ahead`` pieces, the others' of each piece
      come before: the first is here, and another one travels in its buffers;
    * a scatter's own part of a piece comes after what the others are sent of the next one;
    * where both meet, one piece is gathered before the scatter and the next before its last but one: what is scattered
      does not wait behind what is needed later.
    """
    if world < 2 or not 0 <= rank < world:
        raise ValueError(f"schedule: expected 0 <= rank < world and world >= 2, got rank {rank} of {world}")
    if program not in get_args(Program):
        raise ValueError(f"program: expected one of {PROGRAMS}, got {program!r}")
    if program.startswith("exchange"):
        given, made = program != "exchange:made", program != "exchange:given"
        return Schedule(tuple(_pairwise(world, rank, given=given, made=made)), {}, {})
    others = [peer for peer in chunk_order(world, rank, order) if peer != rank]

    def gather_step(kind: Kind, piece: int, task: Task = Task.ALL_GATHER) -> Step:
        region = (Region(rank, SHARD if task is Task.ALL_GATHER else _LATE, piece % IN_FLIGHT),)
        return Step(kind, task, rank, piece, writes=region if kind is Kind.ISSUE else ())

    def scatter_step(kind: Kind, piece: int) -> Step:
        sent, received = Region(rank, PARTIAL, piece % IN_FLIGHT), Region(rank, _RECEIVED, piece % IN_FLIGHT)
        issued = kind is Kind.ISSUE
        reads, writes = ((sent,), (received,)) if issued else ((), ())
        return Step(kind, Task.ALL_TO_ALL, rank, piece, reads=reads, writes=writes)

    targets = [(rank + hop + 1) % world for hop in range(world - 1)]
    sources = [(rank - hop - 1) % world for hop in range(world - 1)]

    def send(piece: int) -> Iterator[Step]:
        sent = (Region(rank, PARTIAL, piece % IN_FLIGHT),)
        yield from (Step(Kind.COMPUTE, Task.PRODUCE, peer, piece, writes=sent) for peer in targets)
        yield scatter_step(Kind.ISSUE, piece)

    def add(piece: int) -> Iterator[Step]:
        yield scatter_step(Kind.FINISH, piece)
        received = (Region(rank, _RECEIVED, piece % IN_FLIGHT),)
        yield from (Step(Kind.COMPUTE, Task.ADD, peer, piece, reads=received) for peer in sources)

    def scatter() -> Iterator[Step]:
        """All but the last ``add``."""
        for piece in range(scatter_pieces):
            yield from send(piece)
            if not cuts_own:
                yield Step(Kind.COMPUTE, Task.PRODUCE, rank, piece)
            if piece:
                if cuts_own:
                    yield Step(Kind.COMPUTE, Task.PRODUCE, rank, piece - 1)
                yield from add(piece - 1)
        if cuts_own:
            yield Step(Kind.COMPUTE, Task.PRODUCE, rank, scatter_pieces - 1)

    def arrived(piece: int) -> Iterator[Step]:
        yield gather_step(Kind.FINISH, piece)
        region = (Region(rank, SHARD, piece % IN_FLIGHT),)
        yield from (Step(Kind.COMPUTE, Task.CONSUME, peer, piece, reads=region) for peer in others)
        if piece + IN_FLIGHT < gather_pieces:
            yield gather_step(Kind.ISSUE, piece + IN_FLIGHT)

    def gather() -> Iterator[Step]:
        owned = deque(range(gather_pieces) if cuts_own else (-1,))
        # Products of as many rows as without anything ahead, for bits depend on that: each just one place later.
        behind = 1 if ahead and cuts_own else 0
        for piece in range(gather_pieces):
            while owned and piece >= behind and owned[0] < piece - behind + world:
                yield Step(Kind.COMPUTE, Task.CONSUME, rank, owned.popleft())
            yield from arrived(piece)
        yield from (Step(Kind.COMPUTE, Task.CONSUME, rank, piece) for piece in owned)

    def both() -> Iterator[Step]:
        yield gather_step(Kind.ISSUE, 0)
        second = max(scatter_pieces - 2, 0)
        for step in scatter():
            yield step
            if gather_pieces > 1 and (step.kind, step.piece) == (Kind.ISSUE, second):
                yield gather_step(Kind.ISSUE, 1)
        yield from arrived(0)
        yield Step(Kind.COMPUTE, Task.CONSUME, rank, -1)
        yield from add(scatter_pieces - 1)
        for piece in range(1, gather_pieces):
            yield from arrived(piece)

    def pipeline(*, given: bool) -> Iterator[Step]:
        def add(piece: int) -> Iterator[Step]:
            yield scatter_step(Kind.FINISH, piece)
            received = (Region(rank, _RECEIVED, piece % IN_FLIGHT),)
            yield from (Step(Kind.COMPUTE, Task.ADD, peer, piece, reads=received) for peer in reversed(others))

        def next_but_one(piece: int, task: Task) -> Iterator[Step]:
            if piece + IN_FLIGHT < gather_pieces:
                yield gather_step(Kind.ISSUE, piece + IN_FLIGHT, task)

        for piece in range(gather_pieces):
            if early:
                yield Step(Kind.COMPUTE, Task.CONSUME, rank, piece)
                yield gather_step(Kind.FINISH, piece)
                region = (Region(rank, SHARD, piece % IN_FLIGHT),)
                yield from (Step(Kind.COMPUTE, Task.CONSUME, peer, piece, reads=region) for peer in others)
                yield from next_but_one(piece, Task.ALL_GATHER)
            yield Step(Kind.COMPUTE, Task.PROCESS, rank, piece)
            if not given:
                sent = (Region(rank, PARTIAL, piece % IN_FLIGHT),)
                yield from (Step(Kind.COMPUTE, Task.PRODUCE, peer, piece, writes=sent) for peer in others)
                yield scatter_step(Kind.ISSUE, piece)
                yield Step(Kind.COMPUTE, Task.PRODUCE, rank, piece)
            if late:
                yield gather_step(Kind.FINISH, piece, Task.LATE_GATHER)
                held = (Region(rank, _LATE, piece % IN_FLIGHT),)
                # In the order of the ranks on every one of them: sums of weights that several have are equal bits.
                yield from (
                    Step(Kind.COMPUTE, Task.CONCLUDE, peer, piece, reads=held if peer != rank else ())
                    for peer in range(world)
                )
                yield from next_but_one(piece, Task.LATE_GATHER)
            if piece and not given:
                yield from add(piece - 1)
        if not given:
            yield from add(gather_pieces - 1)

    steps: list[Step] = []
    if program.startswith("pipeline"):
        if program == "pipeline" and gather_pieces != scatter_pieces:
            raise ValueError(f"schedule: expected one number of pieces, got {gather_pieces} and {scatter_pieces}")
        if not (early or late):
            raise ValueError("schedule: expected a pipeline that gathers something, got early=False and late=False")
        tasks = (Task.ALL_GATHER,) * early + (Task.LATE_GATHER,) * late
        first = itertools.product(range(min(IN_FLIGHT, gather_pieces)), tasks)
        steps.extend(gather_step(Kind.ISSUE, piece, task) for piece, task in first)
        steps.extend(pipeline(given=program == "pipeline:given"))
        return Schedule(tuple(steps), {}, {})
    if program == "gather+scatter" and cuts_own:
        return Schedule(tuple(both()), {}, {})
    if program in ("gather", "gather+scatter"):
        steps.extend(gather_step(Kind.ISSUE, piece) for piece in range(min(IN_FLIGHT, gather_pieces)))
    if program in ("scatter", "gather+scatter"):
        steps.extend(scatter())
        steps.extend(add(scatter_pieces - 1))
    if program in ("gather", "gather+scatter"):
        steps.extend(gather())
    return Schedule(tuple(steps), {}, {})


def sends_ahead_after(schedule: Schedule) -> tuple[int, int]:
    """Indices of the steps after which a call of ``schedule`` issues the first and the second transfer ahead.

    A process group carries out collectives in the order of their issue.  So the first comes behind all that the call
    gathers or is given itself, which it needs sooner, or else behind all that it sends.  The second comes behind
    everything, where the first has not: it delays nothing, and a rank that is ahead of its peers has something to send
    until their last results arrive.  Else it comes when all of the call's own has arrived, so that no more than two
    pieces are held beside the call's.
    """
    issued: list[int] = []
    given: list[int] = []
    finished: list[int] = []
    for index, step in enumerate(schedule.steps):
        if step.kind is Kind.ISSUE:
            (given if step.task in _GATHERS else issued).append(index)
        elif step.kind is Kind.FINISH:
            finished.append(index)
    if given and issued and given[-1] < issued[-1]:
        return given[-1], issued[-1]
    return (given or issued)[-1], finished[-1]


def _pairwise(world: int, rank: int, *, given: bool, made: bool) -> Iterator[Step]:
    """An exchange in transfers around the ring: in hop h every rank gives to rank - h - 1 what that one visits with.

    What the next rank gave travels while one is visited, and so does what was made for the last one; ``piece`` is the
    hop.  Transfers are issued in the same order on all ranks.
    """

    def transfer(kind: Kind, task: Task, hop: int) -> Step:
        names = (_GIVING, SHARD) if task is Task.GIVEN else (PARTIAL, _RECEIVED)
        sent, received = (Region(rank, name, hop % IN_FLIGHT) for name in names)
        peer = (rank + hop + 1) % world if task is Task.GIVEN else (rank - hop - 1) % world  # whom it comes from
        issued = kind is Kind.ISSUE
        return Step(kind, task, peer, hop, reads=(sent,) if issued else (), writes=(received,) if issued else ())

    def take(hop: int) -> Iterator[Step]:
        yield transfer(Kind.FINISH, Task.MADE, hop)
        received = (Region(rank, _RECEIVED, hop % IN_FLIGHT),)
        yield Step(Kind.COMPUTE, Task.TAKE, (rank - hop - 1) % world, hop, reads=received)

    own = Step(Kind.COMPUTE, Task.VISIT, rank, -1)
    if given:
        yield transfer(Kind.ISSUE, Task.GIVEN, 0)
    if not made:
        yield own
    for hop in range(world - 1):
        if given:
            yield transfer(Kind.FINISH, Task.GIVEN, hop)
            if hop + 1 < world - 1:
                yield transfer(Kind.ISSUE, Task.GIVEN, hop + 1)
        reads = (Region(rank, SHARD, hop % IN_FLIGHT),) if given else ()
        writes = (Region(rank, PARTIAL, hop % IN_FLIGHT),) if made else ()
        yield Step(Kind.COMPUTE, Task.VISIT, (rank + hop + 1) % world, hop, reads=reads, writes=writes)
        if made:
            yield transfer(Kind.ISSUE, Task.MADE, hop)
            if hop:
                yield from take(hop - 1)
    if made:
        yield own
        yield from take(world - 2)
