"""What one rank computes with the keys and values of another: the visits of Ring attention, forward and backward.

All accumulators belong to the caller.  Nothing here communicates, so that ranks can be emulated one after another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from odysseus_kernels.attention.dropout import Dropout
from odysseus_kernels.attention.layout import Piece, pieces, positions, seen_parts, sides, visible
from odysseus_kernels.attention.local import attend, attend_backward
from odysseus_kernels.planner.ring import Part

__all__ = ["Visits", "Where", "merge_parts"]

# Positions of queries and of keys in the whole sequence, made where a mask or dropout needs them.
Where = Callable[[], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Visits:
    """The settings of one call; see :func:`~odysseus_kernels.ring_attention`.

    Attributes:
        documents: [B, L], or [2, B, L] where keys are masked (see :func:`~.layout.sides`), on the queries' device, or
            None.
        seed: of dropout.
    """

    documents: Tensor | None
    causal: bool
    layout: str
    window: int | None
    scale: float
    dropout: float
    seed: int
    first_head: int
    kernel: str

    @cached_property
    def host_documents(self) -> Tensor | None:
        """The documents' ids where pieces are planned."""
        return None if self.documents is None else self.documents.cpu()

    def parts(self, world: int, rows: int) -> tuple[Part, ...]:
        """The tokens of every rank in parts, and who looks at each, equal on all ranks; a single one if all is seen.

        With documents the same that plans the pieces of each visit, and on a GPU it has the host wait likewise.
        """
        return seen_parts(
            world, rows, self.layout, causal=self.causal, window=self.window, documents=self.host_documents
        )

    def forward(
        self,
        rank: int,
        visited: int,
        world: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        part: slice | None = None,
    ) -> None:
        """Merges attention to ``visited``'s keys into ``out`` [B, Hq, S, Dv] and ``lse`` [B, Hq, S], both wide.

        At first ``out`` is 0 and ``lse`` is -inf.  ``part``: which of its S keys k and v are; None is all.
        """
        planned, where = self._pieces(rank, visited, world, q, part), self._where(rank, visited, world, q, part)
        self.merge(planned, where, q, k, v, out, lse)

    def backward(
        self,
        rank: int,
        visited: int,
        world: int,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        part: slice | None = None,
    ) -> None:
        """Adds to ``dq`` (wide) and writes all of ``dk`` and ``dv``: what this rank's queries make for ``visited``.

        Of all its keys, or of ``part`` of them.
        """
        planned = self._pieces(rank, visited, world, q, part)
        where = self._where(rank, visited, world, q, part)
        # Pieces that share keys are added in the accumulator's type and rounded once.
        alone = len(planned) == 1
        totals = [x if alone or x.dtype == dq.dtype else torch.empty_like(x, dtype=dq.dtype) for x in (dk, dv)]
        if not (alone and planned[0].keys == slice(0, k.shape[2])):
            for total in totals:
                total.zero_()
        self.differentiate(planned, where, grad, q, k, v, out, lse, dq, *totals, fresh=alone)
        for total, result in zip(totals, (dk, dv), strict=True):
            if total is not result:
                result.copy_(total)

    def merge(
        self, planned: Sequence[Piece], where: Where, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        """Merges attention of ``planned`` pieces of q [B, Hq, S, D] to keys and values [B, Hkv, T, D] into out and lse.

        ``where`` gives the positions of queries [S] and of keys [T].
        """
        for piece in planned:
            rows, keys = piece.queries, piece.keys
            mask, dropout = self._mask_and_dropout(piece, where)
            part, part_lse = attend(
                q[:, :, rows],
                k[:, :, keys],
                v[:, :, keys],
                scale=self.scale,
                causal=piece.kind == "causal",
                mask=mask,
                dropout=dropout,
                kernel=self.kernel,
            )
            merge_parts(out[:, :, rows], lse[:, :, rows], part, part_lse)

    def differentiate(
        self,
        planned: Sequence[Piece],
        where: Where,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        *,
        fresh: bool = False,
    ) -> None:
        """Adds the shares of ``planned`` pieces to ``dq``, ``dk`` and ``dv``; with ``fresh`` dk and dv are written."""
        if self.documents is not None:
            # A query that sees nothing at all: exp(-inf - 0) is 0, exp(-inf + inf) would not be a number.
            lse = lse.masked_fill(lse == -math.inf, 0)
        for piece in planned:
            rows, keys = piece.queries, piece.keys
            mask, dropout = self._mask_and_dropout(piece, where)
            shares = attend_backward(
                grad[:, :, rows],
                q[:, :, rows],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, rows],
                lse[:, :, rows],
                scale=self.scale,
                causal=piece.kind == "causal",
                mask=mask,
                dropout=dropout,
                kernel=self.kernel,
            )
            dq[:, :, rows] += shares[0]
            for total, share in zip((dk, dv), shares[1:], strict=True):
                if fresh:
                    total[:, :, keys].copy_(share)
                else:
                    total[:, :, keys] += share

    def _pieces(self, rank: int, visited: int, world: int, q: Tensor, part: slice | None) -> list[Piece]:
        return pieces(
            rank,
            visited,
            world,
            q.shape[2],
            self.layout,
            causal=self.causal,
            window=self.window,
            documents=self.host_documents,
            keys=part,
        )

    def _where(self, rank: int, visited: int, world: int, q: Tensor, part: slice | None) -> Where:
        length = q.shape[2] * world
        keys = slice(None) if part is None else part

        def where() -> tuple[Tensor, Tensor]:
            return (
                positions(rank, world, length, self.layout, q.device),
                positions(visited, world, length, self.layout, q.device)[keys],
            )

        return where

    def _mask_and_dropout(self, piece: Piece, where: Where) -> tuple[Tensor | None, Dropout | None]:
        if piece.kind != "masked" and not self.dropout:
            return None, None
        queries, keys = where()
        queries, keys = queries[piece.queries], keys[piece.keys]
        mask = dropout = None
        if piece.kind == "masked":
            ids = [
                None if side is None else side[:, at]
                for side, at in zip(sides(self.documents), (queries, keys), strict=True)
            ]
            mask = visible(queries, keys, *ids, causal=self.causal, window=self.window)
        if self.dropout:
            dropout = Dropout(self.dropout, self.seed, self.first_head, queries, keys)
        return mask, dropout


def merge_parts(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """``out`` and ``lse`` over some keys become those over these and other keys.

    Rows that see nothing yet have log-sum-exp -inf and output 0, and weigh nothing.
    """
    total = torch.logaddexp(lse, part_lse)
    # exp(-inf - 0) is 0; exp(-inf + inf) would not be a number.
    base = total.masked_fill(total == -math.inf, 0)
    out.mul_((lse - base).exp_()[..., None])
    out.addcmul_(part.to(out.dtype), (part_lse - base).exp_()[..., None])
    lse.copy_(total)
