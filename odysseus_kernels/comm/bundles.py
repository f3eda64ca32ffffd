"""What ranks give and make in an exchange as one run of bytes, and what a rank does with what was made for it.

A bundle is only a layout: tensors over memory that a transport owns.  Nothing here decides when that memory may be read
or written.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.reduce import PieceSum, accumulator_dtype

__all__ = ["Bundle", "Intake", "as_bytes", "held_bundle", "made_bundle"]

# A cache line: products on a peer's memory read whole vectors, and no two tensors share a line.
_ALIGNMENT = 64
Spec = tuple[tuple[int, ...], torch.dtype]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Tensors of any shapes and dtypes, one after another.

    Attributes:
        specs: shape and dtype of each.
        offsets: where each begins, in bytes.
        nbytes: of all together.
    """

    specs: tuple[Spec, ...]
    offsets: tuple[int, ...]
    nbytes: int

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(specs: tuple[Spec, ...]) -> Bundle:
        offsets, end = [], 0
        for shape, dtype in specs:
            offsets.append(-(-end // _ALIGNMENT) * _ALIGNMENT)
            end = offsets[-1] + math.prod(shape) * dtype.itemsize
        return Bundle(specs, tuple(offsets), end)

    def only(self, taken: Sequence[bool]) -> Bundle:
        """The tensors that are ``taken``, one after another."""
        return self if all(taken) else Bundle.of(tuple(itertools.compress(self.specs, taken)))

    def tensors(self, raw: Tensor) -> tuple[Tensor, ...]:
        """The tensors in ``raw``, at least ``nbytes`` bytes that begin at a multiple of 64."""
        found = []
        for (shape, dtype), offset in zip(self.specs, self.offsets, strict=True):
            nbytes = math.prod(shape) * dtype.itemsize
            found.append(raw[offset : offset + nbytes].view(dtype).view(shape))
        return tuple(found)


def made_bundle(exchange: Exchange) -> Bundle:
    """What a rank makes for one other: the blocks that ``visit`` fills."""
    sums = [(tuple(tensor.shape), tensor.dtype) for tensor in exchange.sums]
    return Bundle.of((*sums, *((tuple(tensor.shape[1:]), tensor.dtype) for tensor in exchange.received)))


def held_bundle(exchange: Exchange, world: int, reduce_dtype: torch.dtype) -> Bundle:
    """The sums in progress: with more than two ranks one in the accumulator's type for each of ``sums``."""
    if world <= 2:
        return Bundle.of(())
    return Bundle.of(tuple((tuple(t.shape), accumulator_dtype(t.dtype, reduce_dtype)) for t in exchange.sums))


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor."""
    # The view, which refuses what is not contiguous, keeps a single element's stride, which may be any: bytes have one.
    flat = tensor.detach().view(-1).as_strided((tensor.numel(),), (1,))
    return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)


class Intake:
    """Adds and copies what the other ranks made for this one, in the order in which it is given.

    ``held`` is memory for :func:`held_bundle`.
    """

    def __init__(self, exchange: Exchange, world: int, reduce_dtype: torch.dtype, held: Tensor) -> None:
        self._received = exchange.received
        wide = held_bundle(exchange, world, reduce_dtype).tensors(held)
        # A slice is added up as it lies: rows that belong together, one batch after another.
        self._outs = [
            out.view(1, 1, -1) if out.is_contiguous() else out.view(-1, *out.shape[-2:]) for out in exchange.sums
        ]
        self._sums = [
            PieceSum(out, world, reduce_dtype, as_bytes(wide[index]) if wide else None)
            for index, out in enumerate(self._outs)
        ]

    def skip(self) -> None:
        """In place of :meth:`take` for a rank that made nothing for this one."""
        self._add([None] * len(self._sums))

    def take(self, source: int, blocks: Sequence[Tensor], taken: Sequence[bool] | None = None) -> None:
        """``blocks`` are what rank ``source`` made; before the last rank's, the own part lies in the sums.

        Only those for sums that are ``taken``, or all of them, are read.
        """
        made = blocks[: len(self._sums)]
        self._add(made if taken is None else [block if one else None for block, one in zip(made, taken, strict=True)])
        for out, block in zip(self._received, blocks[len(self._sums) :], strict=True):
            out[source].copy_(block)

    def _add(self, blocks: Sequence[Tensor | None]) -> None:
        for total, out, block in zip(self._sums, self._outs, blocks, strict=True):
            total.add(0, out.shape[1], None if block is None else block.view(out.shape))
