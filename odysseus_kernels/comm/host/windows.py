"""Buffers of a call in the windows of shared memory: how they are laid out, and tensors over them.

Nothing here copies.  A tensor over a peer's window is that peer's memory; what may be read when is the schedule's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from odysseus_kernels.comm.bundles import Bundle
from odysseus_kernels.comm.reduce import PieceSum
from odysseus_kernels.comm.schedules.leases import Lease
from odysseus_kernels.comm.schedules.steps import PARTIAL_CELLS, piece_bounds

__all__ = ["BundleBuffer", "PartialBuffer", "ShardBuffer", "Windows"]

_ALIGNMENT = 4096


@dataclasses.dataclass
class ShardBuffer:
    """A published shard: [batch, rows, width], as the owner's tensor is laid out."""

    lease: Lease
    dtype: torch.dtype
    batch: int
    rows: int
    width: int
    pieces: int
    clean: bool = False  # the credits of those who read the window's previous content are collected

    @staticmethod
    def of(lease: Lease, shard: Tensor, pieces: int) -> ShardBuffer:
        batch, rows, width = shard.shape
        return ShardBuffer(lease, shard.dtype, batch, rows, width, pieces)

    @property
    def nbytes(self) -> int:
        return self.batch * self.rows * self.width * self.dtype.itemsize

    def bounds(self, piece: int) -> tuple[int, int]:
        return piece_bounds(self.rows, self.pieces, piece)


@dataclasses.dataclass
class PartialBuffer:
    """Outgoing partial results, one piece in each cell, followed by the sum in progress, which only we touch.

    ``cells`` is 2, or 1 where a call sends a single piece.  ``spans`` are the rows of each piece where they are not cut
    as evenly as they can.
    """

    lease: Lease
    dtype: torch.dtype
    batch: int
    rows: int
    width: int
    pieces: int
    cells: int
    held_bytes: int
    clean: bool = False
    spans: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(lease: Lease, out: Tensor, pieces: int, world: int, reduce_dtype: torch.dtype) -> PartialBuffer:
        held = PieceSum.held_bytes(out, world, reduce_dtype, -(-out.shape[1] // pieces))
        batch, rows, width = out.shape
        cells = min(PARTIAL_CELLS, pieces * (world - 1))
        return PartialBuffer(lease, out.dtype, batch, rows, width, pieces, cells, held)

    @property
    def cell_bytes(self) -> int:
        largest = max((stop - start for start, stop in self.spans), default=-(-self.rows // self.pieces))
        size = self.batch * largest * self.width * self.dtype.itemsize
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    @property
    def nbytes(self) -> int:
        return self.cells * self.cell_bytes + self.held_bytes

    def bounds(self, piece: int) -> tuple[int, int]:
        return self.spans[piece] if self.spans else piece_bounds(self.rows, self.pieces, piece)


@dataclasses.dataclass
class BundleBuffer:
    """What one rank gives, or makes, in an exchange: the same bundle in each cell, followed by ``held_bytes``."""

    lease: Lease
    bundle: Bundle
    cells: int = 1
    held_bytes: int = 0
    clean: bool = False

    pieces = 1  # it is published at once

    @staticmethod
    def of_tensors(lease: Lease, tensors: Sequence[Tensor]) -> BundleBuffer:
        return BundleBuffer(lease, Bundle.of(tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)))

    @property
    def cell_bytes(self) -> int:
        return -(-self.bundle.nbytes // _ALIGNMENT) * _ALIGNMENT

    @property
    def nbytes(self) -> int:
        return self.cells * self.cell_bytes + self.held_bytes


class Windows:
    """Tensors over the windows of all ranks, and how much of each is backed by memory on all of them."""

    def __init__(self, host: Any, count: int) -> None:
        self._host = host
        self._raw: dict[tuple[int, int], Tensor] = {}
        self._backed = [0] * count

    @property
    def backed(self) -> tuple[int, ...]:
        """Bytes of each window that every rank has backed."""
        return tuple(self._backed)

    def lacking(self, needed: dict[int, int]) -> dict[int, int]:
        """The windows of ``needed`` (bytes) that are not backed that far; the same on all ranks."""
        return {window: nbytes for window, nbytes in needed.items() if nbytes > self._backed[window]}

    def reserve(self, window: int, nbytes: int) -> None:
        """Backs this rank's window; it counts once all ranks have (:meth:`agreed`).  OSError if memory is short."""
        self._host.reserve(window, nbytes)

    def agreed(self, grown: dict[int, int]) -> None:
        for window, nbytes in grown.items():
            self._backed[window] = nbytes

    def raw(self, rank: int, window: int) -> Tensor:
        """The window as bytes."""
        found = self._raw.get((rank, window))
        if found is None:
            found = torch.frombuffer(self._host.window(rank, window), dtype=torch.uint8)
            self._raw[rank, window] = found
        return found

    def shard(self, rank: int, buffer: ShardBuffer, piece: int) -> Tensor:
        """A piece of ``rank``'s shard: [batch, rows of the piece, width]."""
        start, stop = buffer.bounds(piece)
        raw = self.raw(rank, buffer.lease.window)[: buffer.nbytes]
        return raw.view(buffer.dtype).view(buffer.batch, buffer.rows, buffer.width)[:, start:stop]

    def partial(self, rank: int, buffer: PartialBuffer, cell: int, piece: int) -> Tensor:
        """The partial result in a cell of ``rank``: [batch, rows of the piece, width], contiguous."""
        start, stop = buffer.bounds(piece)
        offset = cell * buffer.cell_bytes
        size = buffer.batch * (stop - start) * buffer.width * buffer.dtype.itemsize
        raw = self.raw(rank, buffer.lease.window)[offset : offset + size]
        return raw.view(buffer.dtype).view(buffer.batch, stop - start, buffer.width)

    def cell(self, rank: int, buffer: BundleBuffer, cell: int) -> tuple[Tensor, ...]:
        """The tensors in a cell of ``rank``."""
        offset = cell * buffer.cell_bytes
        return buffer.bundle.tensors(self.raw(rank, buffer.lease.window)[offset : offset + buffer.bundle.nbytes])

    def held(self, rank: int, buffer: PartialBuffer | BundleBuffer) -> Tensor:
        """Bytes for the sum in progress."""
        start = buffer.cells * buffer.cell_bytes
        return self.raw(rank, buffer.lease.window)[start : start + buffer.held_bytes]

    @torch.no_grad()  # windows are memory, not part of anybody's graph
    def publish(self, rank: int, buffer: ShardBuffer | BundleBuffer, piece: int, tensors: Sequence[Tensor]) -> None:
        """Copies a piece of what is sent into ``rank``'s window, which is this rank's own."""
        if isinstance(buffer, ShardBuffer):
            start, stop = buffer.bounds(piece)
            self.shard(rank, buffer, piece).copy_(tensors[0][:, start:stop])
            return
        for target, tensor in zip(self.cell(rank, buffer, 0), tensors, strict=True):
            target.copy_(tensor)

    def clear(self) -> None:
        self._raw.clear()
