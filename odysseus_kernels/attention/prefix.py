"""Causal attention of one piece of a sequence after another, each over all keys up to its own end.

Forward goes through the pieces from first to last, backward from last to first: when a piece's turn comes, all queries
that see its keys have added to their gradients.  Nothing here communicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from odysseus_kernels.attention.layout import Piece, prefix_pieces
from odysseus_kernels.attention.local import attend
from odysseus_kernels.attention.visits import Visits, merge_parts
from odysseus_kernels.comm.reduce import accumulator_dtype

__all__ = ["PrefixAttention"]


class PrefixAttention:
    """Attention of B times T tokens among themselves with the given settings, piece by piece.

    All tensors are those of all tokens: q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], out [B, Hq, T, Dv],
    lse [B, Hq, T] wide, and their gradients; a piece is rows ``start`` to ``stop`` of them.  ``where`` [T] says where
    in the sequence the tokens lie, in ascending order; on the host.
    """

    def __init__(self, settings: Visits, where: Tensor) -> None:
        self._settings, self._positions = settings, where

    def forward(self, start: int, stop: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Writes rows ``start`` to ``stop`` of ``out`` and ``lse``; keys and values are there up to ``stop``."""
        rows = slice(start, stop)
        if self._plain:
            self._plain_forward(rows, q, k, v, out, lse)
            return
        wide = torch.zeros_like(out[:, :, rows], dtype=lse.dtype)
        part_lse = torch.full_like(lse[:, :, rows], -math.inf)
        self._settings.merge(self._planned(rows), lambda: self._where(rows, q), q[:, :, rows], k, v, wide, part_lse)
        out[:, :, rows] = wide
        lse[:, :, rows] = part_lse

    def backward(
        self,
        start: int,
        stop: int,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> Tensor:
        """The gradient [B, Hq, stop - start, D], wide, of the piece's queries; adds to ``dk`` and ``dv`` (wide).

        ``grad`` [B, Hq, stop - start, Dv] is that of the piece's output.
        """
        rows = slice(start, stop)
        queries, outs, sums = q[:, :, rows], out[:, :, rows], lse[:, :, rows]
        dq = torch.zeros_like(queries, dtype=accumulator_dtype(q.dtype))
        self._settings.differentiate(
            self._planned(rows), lambda: self._where(rows, q), grad, queries, k, v, outs, sums, dq, dk, dv
        )
        return dq

    @property
    def _plain(self) -> bool:
        settings = self._settings
        return settings.documents is None and settings.window is None and not settings.dropout

    def _plain_forward(self, rows: slice, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """The piece's own keys and those before it, merged; a first piece has no others."""
        queries, before = q[:, :, rows], slice(0, rows.start)
        part, part_lse = self._attend(queries, k[:, :, rows], v[:, :, rows], True)
        if rows.start:
            part, part_lse = part.to(lse.dtype), part_lse.contiguous()
            merge_parts(part, part_lse, *self._attend(queries, k[:, :, before], v[:, :, before], False))
        out[:, :, rows] = part
        lse[:, :, rows] = part_lse

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, scale=self._settings.scale, causal=causal, kernel=self._settings.kernel)

    def _planned(self, rows: slice) -> Sequence[Piece]:
        settings = self._settings
        window, documents = settings.window, settings.host_documents
        return prefix_pieces(rows.start, rows.stop, self._positions, window=window, documents=documents)

    def _where(self, rows: slice, q: Tensor) -> tuple[Tensor, Tensor]:
        where = self._positions.to(q.device)
        return where[rows], where
