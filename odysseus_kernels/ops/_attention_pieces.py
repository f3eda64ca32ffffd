"""What an attention block computes for each piece of its tokens, forward and backward.

Nothing here communicates or decides an order: ``ops/_attention_block.py`` does.  Tensors as long as the sequence are
those of this rank's heads only; of what is as wide as the hidden state there is a piece at most.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from odysseus_kernels.attention.layout import positions
from odysseus_kernels.attention.prefix import PrefixAttention
from odysseus_kernels.attention.visits import Visits
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.ops._products import CommonBiasGradient, WeightGradient, multiply, project
from odysseus_kernels.ops._rotation import HeadNorm, rotate, rotate_backward

__all__ = ["BackwardPieces", "ForwardPieces", "Pieces", "Settings"]

_LAYOUT = "zigzag"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a block is told beside tensors; see :func:`~odysseus_kernels.pipelined_attention`.

    Attributes:
        edges: rows of a rank's shard at which pieces begin, and last their number.
        seed: of dropout.
    """

    head_dim: int
    edges: tuple[int, ...]
    eps: float
    window: int | None
    scale: float
    dropout: float
    seed: int
    first_head: int
    kernel: str

    def key(self) -> str:
        """As a string: what a custom operator takes."""
        edges = ",".join(str(edge) for edge in self.edges)
        fields = (self.window, self.scale, self.dropout, self.seed, self.first_head, self.kernel)
        return "|".join(str(field) for field in (self.head_dim, edges, self.eps, *fields))

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(key: str) -> Settings:
        """The settings that :meth:`key` turned into ``key``."""
        head_dim, edges, eps, window, scale, dropout, seed, first_head, kernel = key.split("|")
        return Settings(
            head_dim=int(head_dim),
            edges=tuple(int(edge) for edge in edges.split(",")),
            eps=float(eps),
            window=None if window == "None" else int(window),
            scale=float(scale),
            dropout=float(dropout),
            seed=int(seed),
            first_head=int(first_head),
            kernel=kernel,
        )

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Rows of a shard of each piece, in the order of the sequence."""
        return tuple(zip(self.edges, self.edges[1:], strict=False))

    def described(self, *, normed: bool, rotated: bool) -> str:
        """What must be equal on all ranks, each of which makes some heads of every rank's tokens; not the pieces."""
        parts = [f"window={self.window}, scale={self.scale:.6g}, heads {self.head_dim} wide"]
        parts += [f"norms with eps={self.eps:.6g}"] if normed else []
        parts += ["rotated"] if rotated else []
        parts += [f"dropout {self.dropout}, seed {self.seed}"] if self.dropout else []
        return ", ".join(parts)

    def visits(self, documents: Tensor | None) -> Visits:
        """The same for attention itself."""
        return Visits(
            documents, True, _LAYOUT, self.window, self.scale, self.dropout, self.seed, self.first_head, self.kernel
        )


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Which of a ring rank's T tokens a piece and a stripe are; N ranks hold a stripe of each piece.

    Attributes:
        settings: of the block.
        world: ranks N.
        ring, ring_rank: ring ranks, and which this is; T tokens are its part of the sequence.
    """

    settings: Settings
    world: int
    ring: int = 1
    ring_rank: int = 0

    def tokens(self, piece: int) -> slice:
        """A piece's tokens."""
        start, stop = self.settings.spans[piece]
        return slice(start * self.world, stop * self.world)

    def stripe(self, piece: int, rank: int) -> slice:
        """Those of them that ``rank`` holds."""
        start, stop = self.settings.spans[piece]
        first = start * self.world + rank * (stop - start)
        return slice(first, first + stop - start)

    def ranges(self, rank: int, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """(tokens, rows from ``start``) of rows ``start`` to ``stop`` of ``rank``'s shard, whole pieces or not."""
        for piece, (first, last) in enumerate(self.settings.spans):
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                token = self.stripe(piece, rank).start + begin - first
                yield slice(token, token + end - begin), slice(begin - start, end - start)

    def part(self, piece: int, rank: int) -> slice:
        """The same within the piece."""
        start, stop = self.settings.spans[piece]
        return slice(rank * (stop - start), (rank + 1) * (stop - start))

    def where(self, tokens: int) -> Tensor:
        """int64 [T]: where in the sequence the tokens lie."""
        return positions(self.ring_rank, self.ring, tokens * self.ring, _LAYOUT)

    def split(self, tensor: Tensor) -> Tensor:
        """[B, n, H * D] as [B, n, H, D]."""
        return tensor.unflatten(2, (-1, self.settings.head_dim))

    def heads(self, tensor: Tensor) -> Tensor:
        """[B, n, H * D] as [B, H, n, D]."""
        return self.split(tensor).transpose(1, 2)


class ForwardPieces:
    """Forward of one block on one rank.

    Attributes:
        q, k, v, out: [B, T, H * D] of this rank's heads, queries and keys normalized and rotated.
        lse: [B, H, T], log-sum-exp of the scores, wide.
        raw: queries and keys before their norms, or two empty tensors.
        gathered: all ranks' x [B, T, d] if that is kept, else empty.
        y: [B, s, d].
    """

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        output_weight: Tensor,
        normed: bool,
        pieces: Pieces,
        *,
        keep: bool,
    ) -> None:
        batch, rows, width = x.shape
        length, wide = rows * pieces.world, accumulator_dtype(x.dtype)
        queries, keys, values = (weight.shape[0] for weight in weights)
        self.y = x.new_empty((batch, rows, output_weight.shape[0]))
        self.q, self.k, self.v = (x.new_empty((batch, length, n)) for n in (queries, keys, values))
        self.out = x.new_empty((batch, length, queries))
        self.lse = x.new_empty((batch, queries // pieces.settings.head_dim, length), dtype=wide)
        self.raw = [x.new_empty((batch, length, n) if normed else (0,)) for n in (queries, keys)]
        self.gathered = x.new_empty((batch, length, width) if keep else (0,))

    @property
    def results(self) -> list[Tensor]:
        """y, and what backward needs."""
        return [self.y, self.q, self.k, self.v, self.out, self.lse, *self.raw, self.gathered]

    def prepare(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        output_weight: Tensor,
        output_bias: Tensor | None,
        rotation: Sequence[Tensor],
        norms: Sequence[HeadNorm],
        documents: Tensor | None,
        pieces: Pieces,
        rank: int,
    ) -> None:
        """What the methods below compute with."""
        self._weights, self._biases = weights, biases
        self._output_weight, self._output_bias = output_weight, output_bias
        self._rotation, self._norms, self._pieces, self._rank = rotation, norms, pieces, rank
        self._attention = PrefixAttention(pieces.settings.visits(documents), pieces.where(self.q.shape[1]))
        # What is merged with other ring ranks' keys is rounded once, at the end.
        self.attended = self.out if pieces.ring == 1 else self.out.new_empty(self.out.shape, dtype=self.lse.dtype)

    def consume(self, piece: int, source: int, blocks: tuple[Tensor, ...]) -> None:
        """Projects ``source``'s rows of x of a piece."""
        rows = self._pieces.stripe(piece, source)
        projected = (*self.raw, self.v) if self._norms else (self.q, self.k, self.v)
        for target, weight, bias in zip(projected, self._weights, self._biases, strict=True):
            project(target[:, rows], blocks[0], weight, bias)
        if self.gathered.numel():
            self.gathered[:, rows].copy_(blocks[0])

    def compute(self, piece: int) -> None:
        """Attention of a piece's queries to this ring rank's keys up to them."""
        rows, pieces = self._pieces.tokens(piece), self._pieces
        for index, done in enumerate((self.q, self.k)):
            if not (self._norms or self._rotation):
                break
            heads = pieces.split((self.raw[index] if self._norms else done)[:, rows])
            if self._norms:
                heads = self._norms[index].forward(heads)
            if self._rotation:
                heads = rotate(heads, *(table[:, rows] for table in self._rotation))
            done[:, rows] = heads.flatten(2)
        q, k, v, out = map(pieces.heads, (self.q, self.k, self.v, self.attended))
        self._attention.forward(rows.start, rows.stop, q, k, v, out, self.lse)

    def produce(self, target: int, start: int, stop: int, block: Tensor) -> None:
        """This rank's heads' share of rows ``start`` to ``stop`` of ``target``'s y."""
        bias = self._output_bias if target == self._rank else None
        for tokens, rows in self._pieces.ranges(target, start, stop):
            project(block[:, rows], self.out[:, tokens], self._output_weight, bias)


class BackwardPieces:
    """Backward of one block on one rank; pieces are taken from last to first.

    Attributes:
        incoming: gradient of attention's output, of all T tokens with a ring, else of the piece at hand.
        dq: gradient of queries by other ring ranks' keys [B, H, T, D], wide; None without a ring.
        dk, dv: of keys and values [B, Hkv, T, D], wide, added up.
    """

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        output_weight: Tensor,
        rotation: Sequence[Tensor],
        norms: Sequence[HeadNorm],
        documents: Tensor | None,
        saved: Sequence[Tensor],
        pieces: Pieces,
        rank: int,
        *,
        regather: bool,
    ) -> None:
        self.q, self.k, self.v, self.out, self.lse, *self._raw, gathered = saved
        self._weights, self._output_weight = weights, output_weight
        self._rotation, self._norms, self._pieces, self._rank = rotation, norms, pieces, rank
        self._kept = gathered if gathered.numel() else None
        self._regather = regather
        batch, length, queries = self.q.shape
        wide = accumulator_dtype(x.dtype)
        most = max(stop - start for start, stop in pieces.settings.spans) * pieces.world
        self.incoming = x.new_empty((batch, length if pieces.ring > 1 else most, queries))
        self._projected = [x.new_empty((batch, most, weight.shape[0])) for weight in weights]
        self.dq: Tensor | None = None
        if pieces.ring > 1:
            self.dq = pieces.heads(torch.empty_like(self.q, dtype=wide))
        # In [B, H, T, D]: others of the ring add to them as they are.
        self.dk, self.dv = (
            t.new_empty((batch, t.shape[2] // pieces.settings.head_dim, length, pieces.settings.head_dim), dtype=wide)
            for t in (self.k, self.v)
        )
        self._attention = PrefixAttention(pieces.settings.visits(documents), pieces.where(length))

    def restart(
        self, weights_needed: Sequence[bool], biases_needed: Sequence[bool], output_needed: Sequence[bool]
    ) -> None:
        """Begins all sums."""
        self._sums = [
            WeightGradient(weight, weight_needed=needed, bias_needed=bias_needed)
            for weight, needed, bias_needed in zip(self._weights, weights_needed, biases_needed, strict=True)
        ]
        self._output_sum = WeightGradient(self._output_weight, weight_needed=output_needed[0])
        self._output_bias = (
            CommonBiasGradient(self._output_weight, self._rank, self._pieces.world) if output_needed[1] else None
        )
        self._output_needed = output_needed[0]
        for norm in self._norms:
            norm.restart()
        for total in (self.dq, self.dk, self.dv):
            if total is not None:
                total.zero_()

    def consume_gradient(self, source: int, start: int, stop: int, block: Tensor) -> None:
        """Rows ``start`` to ``stop`` of y's gradient on ``source``; without a ring they are those of one piece."""
        first = 0 if self._pieces.ring > 1 else start * self._pieces.world
        for tokens, rows in self._pieces.ranges(source, start, stop):
            into = slice(tokens.start - first, tokens.stop - first)
            multiply(self.incoming[:, into], block[:, rows], self._output_weight)
            if self._output_needed:
                self._output_sum.add(block[:, rows], self.out[:, tokens])
        if self._output_bias is not None:
            self._output_bias.add(source, start, stop, block)

    def compute(self, piece: int) -> None:
        """Attention's, norms' and projections' gradients of a piece: all that see its keys have added theirs."""
        pieces = self._pieces
        rows = pieces.tokens(piece)
        count = rows.stop - rows.start
        q, k, v, out = map(pieces.heads, (self.q, self.k, self.v, self.out))
        incoming = self.incoming[:, rows] if pieces.ring > 1 else self.incoming[:, :count]
        dq = self._attention.backward(
            rows.start, rows.stop, pieces.heads(incoming), q, k, v, out, self.lse, self.dk, self.dv
        )
        if self.dq is not None:
            dq += self.dq[:, :, rows]
        found = (dq, self.dk[:, :, rows], self.dv[:, :, rows])
        for number, (grad, into) in enumerate(zip(found, self._projected, strict=True)):
            heads = grad.transpose(1, 2)
            if number < 2 and self._rotation:
                heads = rotate_backward(heads, *(table[:, rows] for table in self._rotation))
            if number < 2 and self._norms:
                heads = self._norms[number].backward(heads, pieces.split(self._raw[number][:, rows]))
            into[:, :count] = heads.flatten(2)
        if not self._regather:
            for total, made in zip(self._sums, self._projected, strict=True):
                total.add(made[:, :count], None if self._kept is None else self._kept[:, rows])

    def conclude(self, piece: int, source: int, block: Tensor) -> None:
        """What ``source``'s rows of x, of the piece that was computed last, contribute to the weights' gradients."""
        part = self._pieces.part(piece, source)
        for total, made in zip(self._sums, self._projected, strict=True):
            total.add(made[:, part], block)

    def produce(self, piece: int, target: int, block: Tensor) -> None:
        """This rank's heads' share of ``target``'s rows of dx of a piece."""
        part = self._pieces.part(piece, target)
        for number, (made, weight) in enumerate(zip(self._projected, self._weights, strict=True)):
            multiply(block, made[:, part], weight, add=number > 0)

    def gradients(self, grad: Tensor, *, norms_needed: bool) -> list[Tensor | None]:
        """Of weights, biases, the output weight and bias, and norms; ``grad`` [B, s, d] is this rank's, of y."""
        return [
            *(total.weight() for total in self._sums),
            *(total.bias() for total in self._sums),
            self._output_sum.weight(),
            None if self._output_bias is None else self._output_bias.total(grad),
            *(norm.weight_gradient() if norms_needed else None for norm in self._norms),
        ]
