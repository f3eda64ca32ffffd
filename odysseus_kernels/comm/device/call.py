"""What one call on a device works with: memory, the operator's callbacks, and the kernel that replaces them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from odysseus_kernels.comm.device.lowering import Block, Operations, Places, Plan
from odysseus_kernels.comm.schedules.device import FINAL, PREVIOUS_USE, RECEIVE, SLOT, STAGE, receive_part
from odysseus_kernels.comm.schedules.steps import SHARD, Region, Step, Task, Word
from odysseus_kernels.comm.schedules.switch import PARTS, PUSHED
from odysseus_kernels.comm.tiles import TileGather, TileScatter, WaitLimit
from odysseus_kernels.comm.transport import Call, Gather, Scatter
from odysseus_kernels.errors import CommunicationError

__all__ = [
    "Device",
    "Scratch",
    "WarmUpNeededError",
    "check_sums",
    "describe_wait",
    "tile_callback",
]


class WarmUpNeededError(RuntimeError):
    """A call is captured into a graph before what it needs exists; nothing was sent."""


class Device(Places, Protocol):
    """One rank's device, and the memory of all ranks that it reaches.

    ``comm/device/cuda.py`` has GPUs, ``testing/simulated_device.py`` a simulation of them on a CPU.

    Attributes:
        waits: what each tag of a wait stands for, for errors; it grows.
        multiprocessors: the fewest of any rank's device, so that ranks decide alike; 0 where that means nothing.
        link_bytes_per_s: that the device's link brings in one direction; 0 where that is not known.
        no_switch: why no switch adds for the ranks, the same on all of them; empty if one can.
    """

    waits: list[str]
    multiprocessors: int
    link_bytes_per_s: float
    no_switch: str

    def operations(self) -> Operations:
        """New, empty operations."""

    def streams(self) -> list[int]:
        """Handles, in the order of ``STREAMS``; the first is the caller's current one."""

    def call(self, callback: Callable[[], None]) -> None:
        """Enqueues what ``callback`` does on the caller's stream."""

    def scratch(self, nbytes: int) -> Tensor:
        """Uninitialised bytes for one call."""

    def backed(self, kind: str, window: int) -> int:
        """Bytes of a window that all ranks have."""

    def grow(self, call: Call, sizes: dict[tuple[str, int], int]) -> None:
        """Makes windows (kind, index) larger, together with all ranks, or raises CapacityExceededError on all."""

    def hold(self) -> object:
        """All windows as they are, for :meth:`restore`."""

    def restore(self, held: object) -> set[tuple[str, int]]:
        """Makes windows again what they were, together with all ranks, and gives back the rest; returns which moved."""

    def own_window(self, kind: str, window: int) -> Tensor:
        """This rank's window: uint8."""

    def word_tensor(self, kind: str, window: int) -> Tensor:
        """Local words of a window, int32 [world]."""

    def epoch_tensor(self, kind: str, window: int) -> Tensor:
        """How often a window was used, int32 [1]."""

    def aborted_tensor(self) -> Tensor:
        """Not zero once a wait gave up, int32 [1]."""

    def control_tensor(self) -> Tensor:
        """Address of the block by which waits are ended and say that they gave up, int64 [1]."""

    def counter_tensor(self) -> Tensor:
        """Scratch words of kernels that signal, int32 [world], zeros between them."""

    def word_addresses(self, kind: str, window: int, which: Literal["waited", "set"]) -> Tensor:
        """For each peer, the address of the word that we wait for or set in it, int64 [world]."""

    def addresses(self, values: Sequence[int]) -> Tensor:
        """``values`` as an int64 tensor of the device; the same tensor for the same values."""

    def capturing(self) -> bool:
        """Whether the caller's stream is being captured into a graph."""

    def begin(self, call: Call, extra: str) -> None:
        """Says what this rank calls next.  CommunicationError if a peer is known to call something else or is gone."""

    def give_up(self, error: BaseException) -> None:
        """Ends this rank's waits, and tells its peers why it will not do what they wait for."""

    def failure(self) -> CommunicationError | None:
        """What made a wait on the device give up, if one did."""

    def synchronize(self) -> None:
        """Waits until all that was enqueued has happened."""

    def drain(self) -> None:
        """Waits until nothing that was enqueued can happen any more; ends waits that would take long."""

    def close(self) -> None:
        """Gives back what is held; nothing is enqueued any more."""


class Scratch:
    """Memory and callbacks of one call.

    ``whole`` [world, batch, rows, width] replaces slots and stages where a collective moves all chunks at once.
    """

    def __init__(self, gather: Gather | None, scatter: Scatter | None, whole: Tensor | None = None) -> None:
        self.prefetch: Tensor | None = None  # what this call sends ahead
        self.gather, self.scatter, self.whole = gather, scatter, whole
        self.shard: Block | None = None
        self.out: Block | None = None
        self.ahead: Block | None = None
        self.windows: dict[str, int] = {}
        self.tiles: Callable[[], None] | None = None
        self._memory: dict[str, Tensor] = {}
        self._cells: dict[tuple[str, int, int], Tensor] = {}

    @property
    def blocks(self) -> tuple[Block | None, Block | None, Block | None]:
        """What is gathered, scattered, sent ahead."""
        return self.shard, self.out, self.ahead

    def take(self, device: Device, plan: Plan) -> None:
        """Takes the plan's scratch memory."""
        for name, nbytes in ((SLOT, plan.slot_bytes), (STAGE, plan.stage_bytes)):
            if nbytes:
                self._memory[name] = device.scratch(nbytes)

    def take_windows(self, device: Device) -> None:
        """Windows in which products read and write: a switch adds and copies between them."""
        for name, block in ((PARTS, self.out), (PUSHED, self.shard)):
            if name in self.windows and block is not None and block.nbytes:
                self._memory[name] = device.own_window(name, self.windows[name])

    def bases(self) -> list[int]:
        """Addresses in the order of ``BASES``."""
        whole = 0 if self.whole is None else self.whole.data_ptr()
        local = {name: memory.data_ptr() for name, memory in self._memory.items()}
        return [
            0,
            self.gather.shard.data_ptr() if self.gather is not None else 0,
            local.get(SLOT, whole),
            local.get(STAGE, whole),
            self.scatter.out.data_ptr() if self.scatter is not None else 0,
            self.prefetch.data_ptr() if self.prefetch is not None else 0,
        ]

    def slots(self, dtype: torch.dtype) -> Tensor:
        """All slots, as elements."""
        return self._memory[SLOT].view(dtype)

    def skips(self, step: Step, rank: int) -> bool:
        """Whether there is nothing to do in ``step``: the chunk is in its place already."""
        return self.whole is not None and step.rank != rank and not step.inside

    def callback(self, step: Step, rank: int) -> Callable[[], None]:
        """What the operator does in ``step``, which it does not skip."""
        if step.inside:
            assert self.tiles is not None
            return self.tiles
        own = step.rank == rank
        if step.task is Task.CONSUME:
            gather, shard = self.gather, self.shard
            assert gather is not None and shard is not None
            if own:
                return lambda: gather.consume(rank, 0, shard.rows, gather.shard)
            start, stop = shard.bounds(step.piece)
            block = self._cell(gather.shard, shard, step.reads[0], stop - start)
            return lambda: gather.consume(step.rank, start, stop, block)
        scatter, out = self.scatter, self.out
        assert step.task is Task.PRODUCE and scatter is not None and out is not None
        start, stop = out.bounds(step.piece)
        if own and step.writes[0].buffer != PARTS:
            return lambda: scatter.produce(rank, start, stop, scatter.out[:, start:stop])
        stage = self._cell(scatter.out, out, step.writes[0], stop - start)
        return lambda: scatter.produce(step.rank, start, stop, stage)

    def _cell(self, like: Tensor, block: Block, region: Region, rows: int) -> Tensor:
        if not block.nbytes:  # there is no memory for it
            return like.new_empty((block.batch, rows, block.width))
        key = (region.buffer, region.part, rows)
        found = self._cells.get(key)
        if found is None:  # there are few, which the pieces of a call use in turn
            begin = region.part * block.cell_bytes
            nbytes = block.batch * rows * block.row_bytes
            cell = self._memory[region.buffer][begin : begin + nbytes]
            found = self._cells[key] = cell.view(block.dtype).view(block.batch, rows, block.width)
        return found


def describe_wait(operator: str, step: Step, rank: int) -> str:
    """What is waited for, as an error says it."""
    word = step.word
    assert word is not None
    if word.buffer in (PARTS, PUSHED):
        what = _describe_switched(word, step, rank)
    elif word.buffer == SLOT:
        what = f"chunk {step.rank}, piece {step.piece}, to be copied here from rank {step.rank}"
    elif word.is_ready and word.buffer != RECEIVE:
        what = f"rank {word.owner} to publish chunk {word.owner}, piece {step.piece} of its shard"
    elif word.is_ready:
        what = f"rank {word.owner} to add up what it was sent before (chunk {word.owner}, piece {step.piece})"
    elif word.buffer == RECEIVE:
        what = f"rank {word.writer} to send its part of chunk {rank}, piece {step.piece}"
    else:
        what = f"rank {word.writer} to finish reading an earlier call's shard (chunk {rank})"
    return f"{operator}: rank {rank} waited for {what}"


def _describe_switched(word: Word, step: Step, rank: int) -> str:
    if word.buffer == PARTS and word.is_ready:
        return f"rank {word.owner} to add up what all ranks made for it before (chunk {word.owner}, piece {step.piece})"
    if word.buffer == PARTS:
        return f"rank {word.writer} to make its part of chunk {rank}, piece {step.piece}"
    if word.is_ready:
        return f"rank {word.owner} to store chunk {word.owner}, piece {step.piece}, to all ranks"
    return f"rank {word.writer} to finish reading what was stored before (chunk {rank})"


def check_sums(call: Call) -> None:
    """ValueError if a device cannot add in the type that was asked for; the same on all ranks."""
    if call.scatter is None or call.config.reduce_dtype == torch.float32:
        return
    if call.scatter.out.dtype != torch.float64:
        raise ValueError(
            f"{call.name}: expected reduce_dtype=torch.float32 for {call.scatter.out.dtype} on the symmetric transport "
            f'of GPUs, got {call.config.reduce_dtype}; transport="collective" can add in it'
        )


# ---- one kernel that waits and signals by itself ---------------------------------------------------------------------


def tile_callback(device: Device, call: Call, scratch: Scratch, rank: int, world: int, tag: int) -> Callable[[], None]:
    """The kernel of the operator, with all that it waits for and signals; ``tag`` is the number of its first wait."""
    gather, scatter = call.gather, call.scatter
    limit = WaitLimit(device.aborted_tensor(), device.control_tensor(), call.config.timeout_s, tag)
    if gather is not None and gather.tiles is not None and scratch.shard is not None:
        window, pieces, serve = scratch.windows[SHARD], scratch.shard.pieces, gather.tiles
        shard = gather.shard[0]

        def consume() -> None:
            gathered = scratch.slots(shard.dtype).view(world - 1, *shard.shape)
            words = device.word_tensor(SHARD, window)[: world - 1]
            serve(TileGather(rank, world, shard, gathered, pieces, words, device.epoch_tensor(SHARD, window), limit))

        return consume
    assert scatter is not None and scatter.tiles is not None and scratch.out is not None
    window, cell, produce = scratch.windows[RECEIVE], scratch.out.cell_bytes, scatter.tiles
    starts = [
        0 if target == rank else device.window(target, RECEIVE, window) + receive_part(world, target, rank, 0) * cell
        for target in range(world)
    ]
    tile_scatter = TileScatter(
        rank,
        world,
        scatter.out[0],
        device.addresses(starts),
        device.word_addresses(RECEIVE, window, "waited"),
        PREVIOUS_USE,
        device.word_addresses(RECEIVE, window, "set"),
        FINAL,
        device.counter_tensor(),
        device.epoch_tensor(RECEIVE, window),
        limit,
    )
    return lambda: produce(tile_scatter)
