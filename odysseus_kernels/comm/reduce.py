"""Sums over partial results of several ranks, in a fixed order and a wide accumulator.

A sum is ``(received 0 + received 1 + ...) + own + last received``: this rank's own part is computed last but one, so
that peers get theirs first, and lies in the output by then.  The order is the schedule's, the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from odysseus_kernels import _ext

__all__ = ["PieceSum", "accumulator_dtype", "add_into"]


def accumulator_dtype(dtype: torch.dtype, reduce_dtype: torch.dtype = torch.float32) -> torch.dtype:
    """Type in which values of ``dtype`` are added: fp64 for fp64, else ``reduce_dtype``."""
    return torch.float64 if dtype == torch.float64 else reduce_dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def add_into(out: Tensor, sources: Sequence[Tensor]) -> None:
    """``out = sources[0] + sources[1] + ...`` accumulated in fp32 (fp64 if any is fp64), rounded once.

    All are contiguous and of the same shape; ``out`` may be one of the sources.
    """
    if out.device.type == "cpu" and _ext.available():
        _ext.load().reduce(
            out.data_ptr(),
            _name(out.dtype),
            [source.data_ptr() for source in sources],
            [_name(source.dtype) for source in sources],
            out.numel(),
        )
        return
    if out.is_cuda and _ext.has_cuda() and len({source.dtype for source in sources}) == 1:
        _ext.load().cuda.reduce(
            torch.cuda.current_stream(out.device).cuda_stream,
            out.data_ptr(),
            _name(out.dtype),
            [source.data_ptr() for source in sources],
            _name(sources[0].dtype),
            out.numel(),
        )
        return
    wide = torch.float64 if torch.float64 in {out.dtype, *(s.dtype for s in sources)} else torch.float32
    total = sources[0].to(wide, copy=True)
    for source in sources[1:]:
        total += source
    out.copy_(total)


class PieceSum:
    """The sum in progress of one reduce-scatter: a piece of ``out`` at a time.

    With two ranks nothing is held beside ``out`` [batch, rows, width].  With more, one piece in the accumulator's type
    is, because a received block must be given back before the own part exists: ``held``, of at least
    :meth:`held_bytes`.
    """

    def __init__(self, out: Tensor, world: int, reduce_dtype: torch.dtype, held: Tensor | None = None) -> None:
        self._out = out
        self._expected = world - 1
        self._dtype = accumulator_dtype(out.dtype, reduce_dtype)
        self._held = held
        self._received = 0
        self._begun = False

    @staticmethod
    def held_bytes(out: Tensor, world: int, reduce_dtype: torch.dtype, rows: int) -> int:
        """Bytes of ``held`` for pieces of at most ``rows`` rows."""
        if world <= 2:
            return 0
        return out.shape[0] * rows * out.shape[2] * accumulator_dtype(out.dtype, reduce_dtype).itemsize

    def add(self, start: int, stop: int, block: Tensor | None) -> None:
        """Adds what one peer sent for rows ``start`` to ``stop``; the last one completes those rows of ``out``.

        ``block`` is [batch, stop - start, width], contiguous; None from a peer that has nothing to add.  Before the
        last call the own part lies in ``out``.
        """
        self._received += 1
        held = None
        if self._expected > 1 and (self._begun or block is not None):
            assert self._held is not None
            piece = self._out[:, start:stop]
            held = self._held.view(self._dtype)[: piece.numel()].view(piece.shape)
        if self._received < self._expected:
            if block is not None:
                assert held is not None
                add_into(held, [held, block] if self._begun else [block])
                self._begun = True
            return
        held = held if self._begun else None
        for index in range(self._out.shape[0]):
            own = self._out[index, start:stop]
            last = [] if block is None else [block[index]]
            if held is not None:
                add_into(own, [held[index], own, *last])
            elif last:
                # One other part: only a wider reduce_dtype than the sources' own makes a copy.
                wide = own.to(self._dtype) if self._dtype == torch.float64 else own
                add_into(own, [wide, *last])
        self._received, self._begun = 0, False
