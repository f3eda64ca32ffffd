"""Schedules lowered to operations that no device runs: what would be enqueued, and what enqueueing costs the host.

The compiled ``cuda.host_side.Rehearsal`` takes the same calls as a program and lists what a device would be given.
:class:`ListedOperations` lists the same in Python, operation by operation, from what was recorded alone: what the two
must agree on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from odysseus_kernels.comm.device.lowering import (
    BASES,
    KINDS,
    Address,
    Block,
    Layout,
    Operations,
    Plan,
    lower,
    word_index,
)
from odysseus_kernels.comm.schedules.device import AHEAD, RECEIVE, device_schedule, tile_schedule
from odysseus_kernels.comm.schedules.steps import SHARD, Program, Schedule, Task
from odysseus_kernels.comm.schedules.streams import STREAMS
from odysseus_kernels.comm.schedules.switch import PARTS, PUSHED, switch_schedule

__all__ = ["BASE_ADDRESSES", "STREAM_HANDLES", "Launch", "ListedOperations", "RehearsedCall", "rehearsed"]

Launch = tuple[str, int, list[int], list[int]]
"""Kind, stream, addresses and values, as ``Rehearsal.take_launches`` has them."""

STREAM_HANDLES = [0x1000 + 16 * index for index in range(len(STREAMS))]
"""Stand for the streams of a schedule."""

BASE_ADDRESSES = [0, *(index << 44 for index in range(1, len(BASES)))]
"""Stand for the memory of one call."""


_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ListedOperations:
    """The interface of the compiled ``cuda.Program``, which lists what a run would enqueue.

    Attributes:
        made: for each operation that was recorded, what it becomes, given (streams, bases).
        launches: what was enqueued so far.
    """

    def __init__(self) -> None:
        self.made: list[Callable[[Sequence[int], Sequence[int]], Launch | None]] = []
        self.launches: list[Launch] = []

    def __len__(self) -> int:
        return len(self.made)

    def close(self) -> None:
        self.made.clear()

    def play(
        self,
        stops: list[int],
        callbacks: Sequence[Callable[[], object] | None],
        streams: list[int],
        bases: list[int],
        timeout_s: float,
    ) -> None:
        first = 0
        for stop, callback in [*zip(stops, callbacks, strict=True), (len(self), None)]:
            self.launches += filter(None, (make(streams, bases) for make in self.made[first:stop]))
            if callback is not None:
                callback()
            first = stop

    def _add(self, kind: str, stream: int, addresses: Sequence[Address], values: Sequence[int]) -> None:
        def make(streams: Sequence[int], bases: Sequence[int]) -> Launch:
            return kind, streams[stream], [bases[base] + offset for base, offset in addresses], list(values)

        self.made.append(make)

    def copy(
        self,
        stream: int,
        dst: Address,
        src: Address,
        row_bytes: int,
        rows: int = 1,
        dst_pitch: int = 0,
        src_pitch: int = 0,
        over_link: bool = False,
    ) -> None:
        to, source = dst_pitch or row_bytes, src_pitch or row_bytes
        if rows <= 1 or to == source == row_bytes:  # one row, of everything
            row_bytes, rows = row_bytes * rows, min(rows, 1)
            to = source = row_bytes
        self._add("copy", stream, (dst, src), (row_bytes, rows, to, source, over_link))

    def wait(self, stream: int, epoch: Address, words: list[Address], values: list[int], tag: int) -> None:
        self._add("wait", stream, (epoch, *words), (*values, tag))

    def signal(self, stream: int, epoch: Address, words: list[Address], values: list[int]) -> None:
        self._add("signal", stream, (epoch, *words), values)

    def advance(self, stream: int, epoch: Address) -> None:
        self._add("advance", stream, (epoch,), ())

    def reduce(
        self,
        stream: int,
        out: Address,
        out_dtype: str,
        sources: list[Address],
        source_dtype: str,
        count: int,
        rows: int = 1,
        out_pitch: int = 0,
        source_pitches: list[int] | None = None,
        *,
        beside: int = 0,
    ) -> None:
        if count and rows:
            self._add("reduce", stream, (out, *sources), (count, rows, beside))
        else:
            self.made.append(lambda streams, bases: None)

    def reduce_multicast(
        self,
        stream: int,
        out: Address,
        multicast: Address,
        dtype: str,
        count: int,
        rows: int = 1,
        out_pitch: int = 0,
        beside: int = 0,
    ) -> None:
        self._multicast("reduce_multicast", stream, (out, multicast), count * _SIZES[dtype], rows, out_pitch, beside)

    def store_multicast(
        self,
        stream: int,
        multicast: Address,
        src: Address,
        row_bytes: int,
        rows: int = 1,
        src_pitch: int = 0,
        beside: int = 0,
    ) -> None:
        self._multicast("store_multicast", stream, (src, multicast), row_bytes, rows, src_pitch, beside)

    def _multicast(
        self, kind: str, stream: int, addresses: Sequence[Address], row_bytes: int, rows: int, pitch: int, beside: int
    ) -> None:
        if row_bytes and rows:
            self._add(kind, stream, addresses, (row_bytes, rows, pitch or row_bytes, beside))
        else:
            self.made.append(lambda streams, bases: None)

    def record(self, stream: int, event: int) -> None:
        self._add("record", stream, (), (event,))

    def depend(self, stream: int, event: int) -> None:
        self._add("depend", stream, (), (event,))


@dataclasses.dataclass(frozen=True)
class RehearsedCall:
    """One call of a transport of devices: a program, and how chunks are cut.

    Attributes:
        program: what is communicated.
        layout: ``"cells"`` for chunks in pieces, ``"ranks"`` for whole tensors in place, ``"visits"`` for one kernel
            of tiles.
        world, rank: the ranks, and which one this is.
        pieces: of a chunk.
        batch, rows, width: of a chunk of bfloat16.
        published: whether the shard was sent ahead.
        ahead: whether another shard is.
        switched: whether it goes through a switch.
    """

    program: Program
    layout: Layout = "cells"
    world: int = 8
    rank: int = 0
    pieces: int = 4
    batch: int = 1
    rows: int = 4096
    width: int = 4096
    published: bool = False
    ahead: bool = False
    switched: bool = False

    def schedule(self) -> Schedule:
        """Its steps."""
        if self.switched:
            pieces = {"gather_pieces": self.pieces, "scatter_pieces": self.pieces}
            return switch_schedule(self.program, self.world, self.rank, **pieces)
        if self.layout == "visits":
            return tile_schedule(self.program, self.world, self.rank, gather_pieces=self.pieces)
        slots = self.pieces * (self.world - 1 if self.layout == "ranks" else 2)
        return device_schedule(
            self.program,
            self.world,
            self.rank,
            gather_pieces=self.pieces,
            scatter_pieces=self.pieces,
            slots=min(slots, 64),
            published=self.published,
            ahead=self.pieces if self.ahead else 0,
        )


class _Places:
    """Windows and words at addresses that tell ranks, kinds and windows apart."""

    def __init__(self, world: int) -> None:
        self._world = world

    def window(self, rank: int, kind: str, window: int) -> int:
        return (1 << 52) + (rank << 44) + (KINDS.index(kind) << 42) + (window << 38)

    def multicast(self, kind: str, window: int) -> int:
        return (1 << 55) + (KINDS.index(kind) << 42) + (window << 38)

    def words(self, rank: int) -> int:
        return (1 << 53) + (rank << 20)

    def epoch(self, kind: str, window: int) -> int:
        return (1 << 54) + 4 * word_index(self._world, kind, window, 0, 0)


def rehearsed(call: RehearsedCall, operations: Operations, schedule: Schedule | None = None) -> Plan:
    """Lowers ``call``, or another schedule in its place, into ``operations``.

    Args:
        call: what is lowered.
        operations: empty; receives them.
        schedule: of the call by default; a broken variant of it in tests.
    """
    steps = schedule or call.schedule()
    pitch = call.rows * call.width * 2
    block = Block(torch.bfloat16, call.batch, call.rows, call.width, call.pieces, pitch)
    gathers, scatters = "gather" in call.program, "scatter" in call.program
    windows = {PUSHED if call.switched else SHARD: 0} if gathers else {}
    windows |= {PARTS if call.switched else RECEIVE: 1} if scatters else {}
    windows |= {AHEAD: 2} if call.ahead else {}
    tags = iter(range(1 << 20))
    return lower(
        steps,
        operations,
        _Places(call.world),
        world=call.world,
        rank=call.rank,
        windows=windows,
        shard=block if gathers else None,
        out=block if scatters else None,
        ahead=block if call.ahead else None,
        slots=max((step.writes[0].part + 1 for step in steps.steps if step.task is Task.FETCH), default=0),
        layout=call.layout,
        tag=lambda waits: next(tags),
        finished=[(kind, windows[kind]) for kind in KINDS if kind in windows],
        beside=4,
    )
