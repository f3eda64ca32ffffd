"""From a schedule for devices to operations that a device enqueues: addresses, sizes, words.

A :class:`Plan` is made once for a call's shapes and windows and run many times: what changes from call to call (the
shard, the output, scratch memory) is a *base* that is passed when it runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch

from odysseus_kernels.comm.device.operations import Address, Operations
from odysseus_kernels.comm.schedules.device import AHEAD, OUT, RECEIVE, RECEIVE_SETS, SLOT, STAGE, STAGES
from odysseus_kernels.comm.schedules.steps import SHARD, Kind, Region, Schedule, Step, Task, Word, piece_bounds
from odysseus_kernels.comm.schedules.streams import COMPUTE, STREAMS, sums_beside_products
from odysseus_kernels.comm.schedules.switch import PART_SETS, PARTS, PUSHED

__all__ = [
    "BASES",
    "KINDS",
    "WINDOWS",
    "WORDS",
    "Action",
    "Address",
    "Block",
    "Layout",
    "Operations",
    "Places",
    "Plan",
    "dtype_name",
    "lower",
    "parts_bytes",
    "pushed_bytes",
    "receive_bytes",
    "word_index",
]

Layout = Literal["cells", "visits", "ranks"]

# Addresses that are known when a plan is made have the base 0.
BASES = ("absolute", SHARD, SLOT, STAGE, OUT, AHEAD)
_BASE = {name: index for index, name in enumerate(BASES)}
_STREAM = {name: index for index, name in enumerate(STREAMS)}

WINDOWS = 8  # of each kind
KINDS = (SHARD, RECEIVE, PARTS, PUSHED)
_OWNERS, _PEERS, _LOCAL = range(3)
_MOST_WORDS = 32
_ALIGNMENT = 256


@dataclasses.dataclass(frozen=True)
class Block:
    """A chunk [batch, rows, width] that is cut into pieces; ``pitch`` is the bytes from one batch to the next."""

    dtype: torch.dtype
    batch: int
    rows: int
    width: int
    pieces: int
    pitch: int

    @staticmethod
    def of(tensor: torch.Tensor, pieces: int) -> Block:
        batch, rows, width = tensor.shape
        stride = tensor.stride(0) if batch > 1 else rows * width  # that of a single batch means nothing
        return Block(tensor.dtype, batch, rows, width, pieces, stride * tensor.element_size())

    def bounds(self, piece: int) -> tuple[int, int]:
        return piece_bounds(self.rows, self.pieces, piece)

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def piece_bytes(self, piece: int) -> int:
        """Bytes of a piece in one batch."""
        start, stop = self.bounds(piece)
        return (stop - start) * self.row_bytes

    @property
    def cell_bytes(self) -> int:
        """Room for any piece of all batches."""
        size = self.batch * -(-self.rows // self.pieces) * self.row_bytes
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    @property
    def nbytes(self) -> int:
        """The whole chunk."""
        return self.batch * self.rows * self.row_bytes


class Places(Protocol):
    """Where the memory that ranks share lies, as this rank's device sees it."""

    def window(self, rank: int, kind: str, window: int) -> int: ...
    def multicast(self, kind: str, window: int) -> int: ...
    def words(self, rank: int) -> int: ...
    def epoch(self, kind: str, window: int) -> int: ...


WORDS = 3  # of each window and rank: the owner's, the peers', local ones


def word_index(world: int, kind: str, window: int, which: int, rank: int) -> int:
    """Place of a word among a rank's words, of which there are ``len(KINDS) * WINDOWS * WORDS * world``."""
    return ((KINDS.index(kind) * WINDOWS + window) * WORDS + which) * world + rank


@dataclasses.dataclass(frozen=True)
class Action:
    """Operations [first, last) of a plan, then a callback of the operator, if any."""

    first: int
    last: int
    step: Step | None = None  # a CONSUME or PRODUCE; one that is ``inside`` stands for the whole kernel


@dataclasses.dataclass(frozen=True)
class Plan:
    """Operations and callbacks of one call, in the order of enqueueing."""

    operations: Operations
    actions: tuple[Action, ...]
    slot_bytes: int
    stage_bytes: int
    inside_tag: int = 0  # number of the first wait that a kernel makes by itself

    @functools.cached_property
    def stops(self) -> list[int]:
        """How many operations come before each action's callback."""
        return [action.last for action in self.actions]


def dtype_name(dtype: torch.dtype) -> str:
    """As the compiled module calls it."""
    return str(dtype).removeprefix("torch.")


def lower(
    schedule: Schedule,
    operations: Operations,
    places: Places,
    *,
    world: int,
    rank: int,
    windows: dict[str, int],
    shard: Block | None = None,
    out: Block | None = None,
    ahead: Block | None = None,
    slots: int = 0,
    layout: Layout = "cells",
    tag: Callable[[Sequence[Step]], int],
    finished: Sequence[tuple[str, int]] = (),
    beside: int = 0,
) -> Plan:
    """Records ``schedule`` into ``operations``.

    Args:
        schedule: of ``comm/schedules/device.py``.
        operations: empty; receives them.
        places: addresses of windows and words.
        world, rank: the ranks, and which one this is.
        windows: index of the window of each buffer that is used.
        shard, out, ahead: what is gathered, scattered, sent ahead.
        slots: local slots for pieces of the others' shards.
        layout: what slots and stages are: ``"cells"``, a piece each; ``"visits"``, whole chunks in the order in which
            they are consumed; ``"ranks"``, a tensor [world, batch, rows, width] of all ranks' chunks.
        tag: gives a number to waits that are made in one go, by which an error can say what was waited for.
        finished: (kind, window) whose use is over at the end.
        beside: multiprocessors that a sum, or a store to all ranks, may hold while products run beside it; 0 for all.
    """
    # Where whole tensors are moved, nothing is multiplied meanwhile.
    sums = frozenset() if layout == "ranks" else sums_beside_products(schedule.steps)
    held = dict.fromkeys(sums, beside)
    lowering = _Lowering(operations, places, world, rank, windows, shard, out, ahead, slots, layout, tag, held, beside)
    return lowering.run(schedule, finished)


@dataclasses.dataclass
class _Lowering:
    operations: Operations
    places: Places
    world: int
    rank: int
    windows: dict[str, int]
    shard: Block | None
    out: Block | None
    ahead: Block | None
    slots: int
    layout: Layout
    tag: Callable[[Sequence[Step]], int]
    held: dict[int, int]  # multiprocessors, by the piece of a sum beside products
    beside: int

    def run(self, schedule: Schedule, finished: Sequence[tuple[str, int]]) -> Plan:
        actions: list[Action] = []
        first = 0
        waits: list[Step] = []
        inside = False
        for step in schedule.steps:
            if waits and (step.kind is not Kind.WAIT or step.inside or not self._merges(waits, step)):
                self._wait(waits)
                waits = []
            if step.kind is Kind.WAIT and not step.inside:
                waits.append(step)
            elif step.task in (Task.CONSUME, Task.PRODUCE) or step.inside:
                if not (step.inside and inside):  # one kernel does all steps that are inside
                    actions.append(Action(first, len(self.operations), step))
                    first = len(self.operations)
            else:
                self._record(step)
            inside = step.inside
        if waits:
            self._wait(waits)
        for kind, window in finished:
            self.operations.advance(_STREAM[COMPUTE], (0, self.places.epoch(kind, window)))
        actions.append(Action(first, len(self.operations)))
        slot_bytes = stage_bytes = 0
        if self.shard and self.layout != "ranks":
            cells = self.slots * self.shard.cell_bytes
            slot_bytes = cells if self.layout == "cells" else (self.world - 1) * self.shard.nbytes
        if self.out and self.layout == "cells" and RECEIVE in self.windows:
            stage_bytes = STAGES * self.out.cell_bytes
        inside_waits = [step for step in schedule.steps if step.inside and step.kind is Kind.WAIT]
        inside_tag = self.tag(inside_waits) if inside_waits else 0
        return Plan(self.operations, tuple(actions), slot_bytes, stage_bytes, inside_tag)

    def _merges(self, waits: list[Step], step: Step) -> bool:
        one, other = waits[-1].word, step.word
        assert one is not None and other is not None
        same = waits[-1].stream == step.stream and one.buffer == other.buffer
        return same and len(waits) < _MOST_WORDS

    # ---- words -------------------------------------------------------------------------------------------------------

    def _place(self, word: Word) -> tuple[str, int]:
        """Kind and index of the window that a word belongs to."""
        kind = word.buffer if word.buffer in KINDS else SHARD
        return kind, self.windows[AHEAD if word.buffer == AHEAD else kind]

    def _epoch(self, word: Word) -> Address:
        return 0, self.places.epoch(*self._place(word))

    def _word(self, at: int, word: Word, which: int, rank: int) -> Address:
        """Words lie with the rank that waits for them: nobody polls another's memory."""
        index = word_index(self.world, *self._place(word), which, rank)
        return 0, self.places.words(at) + 4 * index

    def _waited(self, word: Word) -> Address:
        if word.buffer == SLOT:
            return self._word(self.rank, word, _LOCAL, word.cell)
        if word.is_ready:
            return self._word(self.rank, word, _OWNERS, word.owner)
        return self._word(self.rank, word, _PEERS, word.writer)

    def _set(self, word: Word) -> list[Address]:
        if word.buffer == SLOT:
            return [self._word(self.rank, word, _LOCAL, word.cell)]
        if word.is_ready:
            peers = [peer for peer in range(self.world) if peer != self.rank]
            return [self._word(peer, word, _OWNERS, self.rank) for peer in peers]
        return [self._word(word.owner, word, _PEERS, self.rank)]

    def _wait(self, steps: list[Step]) -> None:
        words = [step.word for step in steps if step.word is not None]
        self.operations.wait(
            _STREAM[steps[0].stream],
            self._epoch(words[0]),
            [self._waited(word) for word in words],
            [step.value for step in steps],
            self.tag(steps),
        )

    # ---- everything else ---------------------------------------------------------------------------------------------

    def _record(self, step: Step) -> None:
        stream = _STREAM[step.stream]
        moved = self.out if step.task in (Task.PUSH, Task.ADD) else self.shard
        if step.task is not None and moved is not None and not moved.nbytes:
            return  # an empty shard: only signals travel
        if step.kind is Kind.RECORD:
            self.operations.record(stream, step.event)
        elif step.kind is Kind.DEPEND:
            self.operations.depend(stream, step.event)
        elif step.kind in (Kind.SIGNAL, Kind.RELEASE):
            assert step.word is not None
            words = self._set(step.word)
            self.operations.signal(stream, self._epoch(step.word), words, [step.value] * len(words))
        elif step.task is Task.PUBLISH:
            self._publish(step)
        elif step.task is Task.FETCH:
            assert self.shard is not None
            slot = (_BASE[SLOT], step.writes[0].part * self.shard.cell_bytes)
            self._move(step, self.shard, SLOT, slot, self._published(self.shard, step.reads[0]))
        elif step.task is Task.PUSH:
            assert self.out is not None
            stage = (_BASE[STAGE], step.reads[0].part * self.out.cell_bytes)
            self._move(step, self.out, STAGE, self._received(step.writes[0]), stage)
        else:
            assert step.task is Task.ADD, step
            self._add(step)

    def _move(self, step: Step, block: Block, local: str, dst: Address, src: Address) -> None:
        """A piece between ranks; both ends are contiguous, unless the local one is a part of a larger tensor."""
        stream, piece = _STREAM[step.stream], block.piece_bytes(step.piece)
        if self.layout == "cells":
            self.operations.copy(stream, dst, src, block.batch * piece, over_link=True)
            return
        chunk = step.rank if self.layout == "ranks" else step.writes[0].part // block.pieces
        pitch = block.rows * block.row_bytes
        here = (_BASE[local], chunk * block.nbytes + block.bounds(step.piece)[0] * block.row_bytes)
        if local == SLOT:
            self.operations.copy(stream, here, src, piece, block.batch, pitch, piece, over_link=True)
        else:
            self.operations.copy(stream, dst, here, piece, block.batch, piece, pitch, over_link=True)

    def _published(self, block: Block, region: Region) -> Address:
        """A piece in its owner's window: pieces lie one after the other, each contiguous over its batches."""
        start, _ = block.bounds(region.part)
        window = self.places.window(region.owner, SHARD, self.windows[region.buffer])
        return 0, window + block.batch * start * block.row_bytes

    def _publish(self, step: Step) -> None:
        region = step.writes[0]
        block = self.ahead if region.buffer == AHEAD else self.shard
        assert block is not None
        start, _ = block.bounds(step.piece)
        stream, piece = _STREAM[step.stream], block.piece_bytes(step.piece)
        if region.buffer == PUSHED:
            here, cell = (_BASE[SHARD], start * block.row_bytes), self._multicast(block, region)
            self.operations.store_multicast(stream, cell, here, piece, block.batch, block.pitch, self.beside)
            return
        here = (_BASE[region.buffer], start * block.row_bytes)
        self.operations.copy(stream, self._published(block, region), here, piece, block.batch, 0, block.pitch)

    def _multicast(self, block: Block, region: Region) -> Address:
        """The same cell of all ranks' windows."""
        window = self.places.multicast(region.buffer, self.windows[region.buffer])
        return 0, window + region.part * block.cell_bytes

    def _received(self, region: Region) -> Address:
        assert self.out is not None
        window = self.places.window(region.owner, RECEIVE, self.windows[RECEIVE])
        return 0, window + region.part * self.out.cell_bytes

    def _add(self, step: Step) -> None:
        """``received 0 + received 1 + ... + own + last received``: the order of the sums on a CPU host.

        Or the switch's own.
        """
        assert self.out is not None
        start, _ = self.out.bounds(step.piece)
        own: Address = (_BASE[OUT], start * self.out.row_bytes)
        piece = self.out.piece_bytes(step.piece)
        if step.reads[0].buffer == PARTS:
            stream, held = _STREAM[step.stream], self.held.get(step.piece, 0)
            cell, name, count = self._multicast(self.out, step.reads[0]), dtype_name(self.out.dtype), piece
            count //= self.out.dtype.itemsize
            self.operations.reduce_multicast(stream, own, cell, name, count, self.out.batch, self.out.pitch, held)
            return
        received = [self._received(region) for region in step.reads if region.buffer == RECEIVE]
        name = dtype_name(self.out.dtype)
        self.operations.reduce(
            _STREAM[step.stream],
            own,
            name,
            [*received[:-1], own, received[-1]],
            name,
            piece // self.out.dtype.itemsize,
            self.out.batch,
            self.out.pitch,
            [*[piece] * (len(received) - 1), self.out.pitch, piece],
            beside=self.held.get(step.piece, 0),
        )


def receive_bytes(block: Block, world: int, sets: int = RECEIVE_SETS) -> int:
    """Bytes of a window that receives partial results of ``block`` from all others."""
    return sets * (world - 1) * block.cell_bytes


def parts_bytes(block: Block, world: int) -> int:
    """Bytes of a window in which a rank makes partial results of ``block`` for all ranks, through the switch."""
    return PART_SETS * world * block.cell_bytes


def pushed_bytes(block: Block, world: int, sets: int) -> int:
    """Bytes of a window into which all ranks store chunks as large as ``block``, through the switch."""
    return min(sets, block.pieces) * world * block.cell_bytes
