"""What a kernel whose tiles wait for chunks, or store where their owners receive them, is given."""

from __future__ import annotations

import dataclasses

from torch import Tensor

__all__ = ["TileGather", "TileScatter", "WaitLimit"]


@dataclasses.dataclass(frozen=True)
class WaitLimit:
    """When the waits of a kernel end though their words are not there, and where they say so.

    Attributes:
        aborted: int32 [1]; not zero ends every wait.  A wait that gives up sets it.
        control: int64 [1], address of the block of words that host and device share (``cuda.Control``): the host ends
            waits by it, and the first that gives up writes there what it waited for.
        timeout_s: seconds that a wait may take.
        tag: number of the kernel's first wait among all that the host has names for; they follow in the order of the
            schedule.
    """

    aborted: Tensor
    control: Tensor
    timeout_s: float
    tag: int


@dataclasses.dataclass(frozen=True)
class TileGather:
    """What a kernel that multiplies chunks tile by tile as they arrive needs; all tensors are on the device.

    Attributes:
        rank, world: which rank this is, of how many; chunks are visited in ring order.
        local: [rows, width], this rank's chunk, there from the start.
        gathered: [world - 1, rows, width], the others' in the order of visits.
        pieces: pieces into which a chunk is cut (``piece_bounds``); piece p has arrived once the chunk's word reaches
            p + 1.
        words: int32 [world - 1], one for each visit.
        epoch: int32 [1]; words hold ``epoch * 256 + value``.
        limit: of its waits.
    """

    rank: int
    world: int
    local: Tensor
    gathered: Tensor
    pieces: int
    words: Tensor
    epoch: Tensor
    limit: WaitLimit


@dataclasses.dataclass(frozen=True)
class TileScatter:
    """What a kernel that stores partial results tile by tile where their owners receive them needs.

    Attributes:
        rank, world: which rank this is, of how many; targets follow in ring order, this rank last.
        own: [rows, width], this rank's part of its own rows.
        slots: int64 [world], address of the contiguous [rows, width] that each target receives from this rank.
        credits: int64 [world], address of the word that must reach ``credit_value`` before a target's slot is written.
        credit_value: a value of an earlier use, below zero.
        arrived: int64 [world], address of the word to set to ``arrived_value`` after a target's last tile.
        arrived_value: value of this use.
        counters: int32 [world], zeros before and after the kernel.
        epoch, limit: as in :class:`TileGather`.
    """

    rank: int
    world: int
    own: Tensor
    slots: Tensor
    credits: Tensor
    credit_value: int
    arrived: Tensor
    arrived_value: int
    counters: Tensor
    epoch: Tensor
    limit: WaitLimit
