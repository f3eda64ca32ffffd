"""What ranks with copy engines execute: the steps of ``comm/schedules/device.py`` in windows that are used again.

:func:`bind_device` is the executor without data, for the proof in ``testing/happens_before.py``.  Every sequence of
calls, and of replays of captured calls, is a sequence of uses of windows; the proof takes any.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from odysseus_kernels.comm.schedules.device import (
    AHEAD,
    EPOCH,
    OUT,
    RECEIVE,
    SLOT,
    STAGE,
    device_schedule,
    drop_schedule,
    tile_schedule,
)
from odysseus_kernels.comm.schedules.steps import SHARD, ChunkOrder, Program, Region, Schedule, Step
from odysseus_kernels.comm.schedules.streams import COMPUTE, STREAMS
from odysseus_kernels.comm.schedules.switch import PARTS, PUSHED, switch_schedule
from odysseus_kernels.testing.happens_before import Access, Event, SharedWord

__all__ = ["DeviceCall", "bind_device", "by_stream", "collapsed", "shared"]

_LOCAL = {SLOT: -1, STAGE: -2, OUT: -3}
# Windows for shards and windows for partial results are different ones, and so are their words.
_RECEIVE_WINDOWS = 1000
_PART_WINDOWS, _PUSHED_WINDOWS = 2000, 3000
_SLOT_CELLS = 1000


@dataclasses.dataclass(frozen=True)
class DeviceCall:
    """One call as far as its schedule depends on it.

    Attributes:
        program: what is communicated.
        kind: chunk by chunk, by one kernel whose tiles wait, through a switch, or the end of a shard that was sent
            ahead for nothing.
        windows: index of the window of each buffer that the call uses.
        slots: local slots for pieces of others; through a switch, sets of cells for pieces of all.
        published: the shard was sent ahead by an earlier call, into this window.
        ahead: pieces of a shard that this call sends ahead.
        captured: the call is captured into a graph.
    """

    program: Program
    kind: Literal["chunks", "tiles", "switch", "drop"] = "chunks"
    windows: tuple[int, int, int] = (0, 0, 1)  # of SHARD, RECEIVE, AHEAD
    gather_pieces: int = 1
    scatter_pieces: int = 1
    slots: int = 2
    order: ChunkOrder = "ring"
    published: bool = False
    ahead: int = 0
    captured: bool = False

    def schedule(self, world: int, rank: int) -> Schedule:
        """The steps of one rank."""
        if self.kind == "drop":
            return drop_schedule(world, rank)
        if self.kind == "switch":
            return switch_schedule(
                self.program,
                world,
                rank,
                gather_pieces=self.gather_pieces,
                scatter_pieces=self.scatter_pieces,
                sets=self.slots,
            )
        if self.kind == "tiles":
            return tile_schedule(
                self.program,
                world,
                rank,
                order=self.order,
                gather_pieces=self.gather_pieces,
                captured=self.captured,
            )
        return device_schedule(
            self.program,
            world,
            rank,
            order=self.order,
            gather_pieces=self.gather_pieces,
            scatter_pieces=self.scatter_pieces,
            slots=self.slots,
            published=self.published,
            ahead=self.ahead,
        )

    @property
    def used(self) -> dict[str, int]:
        """Window of each buffer whose use ends with this call."""
        used = {}
        switched = self.kind == "switch"
        if self.program in ("gather", "gather+scatter"):
            used[PUSHED if switched else SHARD] = self.windows[0] + (_PUSHED_WINDOWS if switched else 0)
        if self.program in ("scatter", "gather+scatter"):
            used[PARTS if switched else RECEIVE] = self.windows[1] + (_PART_WINDOWS if switched else _RECEIVE_WINDOWS)
        return used


Edit = Callable[[list[Step], int], list[Step]]


def bind_device(world: int, calls: Sequence[DeviceCall], edit: Edit = lambda steps, rank: steps) -> list[list[Event]]:
    """For each rank, the events of ``calls`` back to back, in the order in which its host enqueues them.

    ``edit`` changes the steps of one call on one rank, to see whether the proof notices.
    """
    return [_bind(world, rank, calls, edit) for rank in range(world)]


def _bind(world: int, rank: int, calls: Sequence[DeviceCall], edit: Edit) -> list[Event]:
    epochs: dict[int, int] = defaultdict(int)
    sent_ahead: dict[int, int] = {}  # by window: the call that sent the shard that lies there
    events: list[Event] = []
    for number, call in enumerate(calls):
        publisher = sent_ahead.pop(call.windows[0], number) if call.published else number
        if call.ahead:
            sent_ahead[call.windows[2]] = number
        bound = _BoundCall(world, rank, number, call, publisher, epochs)
        events += [bound.event(step) for step in edit(list(call.schedule(world, rank).steps), rank)]
        for window in call.used.values():
            epochs[window] += 1
    return events


@dataclasses.dataclass(frozen=True)
class _BoundCall:
    """One call of one rank; ``publisher`` is the number of the call that published its shard."""

    world: int
    rank: int
    number: int
    call: DeviceCall
    publisher: int
    epochs: dict[int, int]

    def window(self, buffer: str) -> int:
        shard, receive, ahead = self.call.windows
        others = {PARTS: receive + _PART_WINDOWS, PUSHED: shard + _PUSHED_WINDOWS}
        return {RECEIVE: receive + _RECEIVE_WINDOWS, AHEAD: ahead, **others}.get(buffer, shard)

    def event(self, step: Step) -> Event:
        word, value = None, 0
        if step.word is not None:
            window = self.window(step.word.buffer)
            cell = step.word.cell + (_SLOT_CELLS if step.word.buffer == SLOT else 0)
            word = SharedWord(step.word.owner, window, cell, step.word.writer)
            value = self.epochs[window] * EPOCH + step.value
        what = step.task.value if step.task else step.kind.value
        return Event(
            self.rank,
            step.stream,
            step.kind,
            f"call {self.number}: {what} (rank {step.rank}, piece {step.piece}) in stream {step.stream}",
            word,
            value,
            tuple(self.access(step, region) for region in step.reads),
            tuple(self.access(step, region) for region in step.writes),
            (self.number, step.event) if step.event >= 0 else None,
        )

    def access(self, step: Step, region: Region) -> Access:
        buffer, meant = region.buffer, self.meant(step, region)
        if buffer in _LOCAL:
            # Memory that every call takes anew, which may be the same again.
            return Access(self.rank, _LOCAL[buffer], self.number, buffer, region.part, meant)
        made = self.publisher if buffer == SHARD else self.number
        return Access(region.owner, self.window(buffer), made, SHARD if buffer == AHEAD else buffer, region.part, meant)

    def meant(self, step: Step, region: Region) -> tuple[int, int]:
        if region.buffer == RECEIVE:
            # Written by its source for its owner; read by its owner.
            own = region.owner == self.rank
            return (step.piece, (self.rank - 1 - region.part % (self.world - 1)) % self.world if own else self.rank)
        if region.buffer == OUT:
            return (step.piece, self.rank)
        return (step.piece, step.rank) if region.buffer in (SLOT, STAGE, PARTS, PUSHED) else (region.part, region.owner)


def by_stream(events: Sequence[Sequence[Event]]) -> list[list[Event]]:
    """One sequence for each stream of each rank."""
    streams: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for rank in events:
        for event in rank:
            streams[event.rank, event.stream].append(event)
    return list(streams.values())


def collapsed(events: Sequence[Sequence[Event]]) -> list[list[Event]]:
    """All streams of a rank as one, in the order of enqueueing: what a device with a single hardware queue does."""
    return shared(events, dict.fromkeys(STREAMS, COMPUTE))


def shared(events: Sequence[Sequence[Event]], queues: Mapping[str, str]) -> list[list[Event]]:
    """Steps in hardware queues: ``queues`` names that of each stream; what is in one runs in the order of enqueueing.

    Whatever the queues, their order is a part of that of a single one.  So where :func:`collapsed` is free of
    deadlocks, every sharing is.
    """
    return [[dataclasses.replace(event, stream=queues[event.stream]) for event in rank] for rank in events]
