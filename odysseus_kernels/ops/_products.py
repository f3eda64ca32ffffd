"""Local matrix products that write where they are told: slices of outputs, peers' memory, windows in flight.

Canonical form.  The dimension that is cut over the ranks splits a tensor into [batch, rows, inner, features]; blocks
are [batch, rows, inner * features], so a row is contiguous and any number of dimensions before or after the cut one
works.  Everything here is for use below autograd.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from odysseus_kernels.comm.reduce import accumulator_dtype

__all__ = ["Layout", "ProductSum", "WeightGradient", "add_wide", "multiply", "multiply_lines", "project"]

# Rows below which one product over all batches and a copy beats a product for each batch.
_SMALL_ROWS = 128
# Inner dimension of a widened product: large enough for a fast product, small beside a chunk.
_WIDE_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor [..., rows, ..., features] is cut: sizes before, at, and between the cut and the last dimension."""

    before: tuple[int, ...]
    rows: int
    inner: tuple[int, ...]

    @staticmethod
    def of(shape: torch.Size, dim: int) -> Layout:
        return Layout(tuple(shape[:dim]), shape[dim], tuple(shape[dim + 1 : -1]))

    @property
    def batch(self) -> int:
        return _product(self.before)

    @property
    def inner_size(self) -> int:
        return _product(self.inner)

    def shape(self, rows: int, features: int) -> tuple[int, ...]:
        """The user's shape with ``rows`` along the cut dimension and ``features`` along the last."""
        return (*self.before, rows, *self.inner, features)

    def blocks(self, tensor: Tensor) -> Tensor:
        """``tensor`` (in the user's shape, contiguous) as [batch, rows, inner * features]."""
        rows = tensor.shape[len(self.before)]
        return tensor.view(self.batch, rows, self.inner_size * tensor.shape[-1])


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _multiply_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, accumulate: bool) -> None:
    if accumulate:
        torch.addmm(out, a, b, out=out)
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def multiply(out: Tensor, block: Tensor, matrix: Tensor, bias: Tensor | None = None, *, add: bool = False) -> None:
    """``out = block @ matrix (+ bias)``, or ``out += block @ matrix`` with ``add``.

    ``block`` [batch, rows, inner * K] and ``out`` [batch, rows, inner * n] have contiguous rows and may be slices of
    larger tensors along rows; ``matrix`` is [K, n].
    """
    features, results = matrix.shape
    batch, rows, _ = block.shape
    lines = block.shape[2] // features * rows if features else 0
    if batch == 1:
        _multiply_into(out[0].view(lines, results), block[0].view(lines, features), matrix, bias, add)
    elif lines >= _SMALL_ROWS:
        for index in range(batch):
            _multiply_into(out[index].view(lines, results), block[index].view(lines, features), matrix, bias, add)
    else:
        a = block.reshape(batch * lines, features)
        result = torch.addmm(bias, a, matrix) if bias is not None else torch.mm(a, matrix)
        result = result.view(out.shape)
        if add:
            out.add_(result)
        else:
            out.copy_(result)


def project(out: Tensor, block: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """``out = block @ weight.T + bias``; shapes as in :func:`multiply`, weight [n, K]."""
    multiply(out, block, weight.t(), bias)


def add_wide(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` for fp32 ``total`` [m, n] and 16-bit ``a`` [m, k], ``b`` [k, n].

    A product of 16-bit matrices comes back rounded to 16 bits.  One such rounding for each chunk of a sum would make
    the fused result worse than the unfused one, which rounds once.  A GPU's library accumulates and returns fp32; on a
    CPU the operands are widened, a block of the inner dimension at a time.
    """
    if total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
        return
    for start in range(0, a.shape[1], _WIDE_BLOCK):
        block = slice(start, start + _WIDE_BLOCK)
        torch.addmm(total, a[:, block].to(total.dtype), b[block].to(total.dtype), out=total)


def multiply_lines(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """``out = a @ b (+ bias)`` for ``a`` [m, k] and ``b`` [k, n]; ``out`` [m, n] may be columns of a larger tensor."""
    _multiply_into(out, a, b, bias, False)


class ProductSum:
    """Sum of ``a @ b`` over blocks of the inner dimension, [lines, width], in the accumulator's type.

    With ``wide=False`` the sum is in the operands' own type: what one product after another would give.
    """

    def __init__(self, like: Tensor, lines: int, width: int, *, wide: bool = True) -> None:
        self._dtype = like.dtype
        kind = accumulator_dtype(like.dtype) if wide else like.dtype
        self._narrow = kind != like.dtype
        make = like.new_zeros if self._narrow else like.new_empty
        self._sum = make((lines, width), dtype=kind)
        self._started = self._narrow

    def add(self, a: Tensor, b: Tensor) -> None:
        """Adds ``a @ b``: ``a`` [lines, k], ``b`` [k, width]."""
        if self._narrow:
            add_wide(self._sum, a, b)
        else:
            _multiply_into(self._sum, a, b, None, self._started)
        self._started = True

    def total(self, bias: Tensor | None = None) -> Tensor:
        """The sum, with ``bias`` [width] added before it is rounded to the operands' type."""
        if not self._started:
            self._sum.zero_()
        if bias is not None:
            self._sum += bias
        return self._sum.to(self._dtype)


class WeightGradient:
    """Sum of ``grad.T @ input`` over blocks of rows, in the accumulator's type, and of the bias gradient beside it."""

    def __init__(self, weight: Tensor, *, weight_needed: bool = True, bias_needed: bool = False) -> None:
        self._dtype = weight.dtype
        self._features, self._inputs = weight.shape
        wide = accumulator_dtype(weight.dtype)
        self._narrow = wide != weight.dtype
        self._sum = None
        if weight_needed:
            self._sum = weight.new_zeros(weight.shape, dtype=wide) if self._narrow else weight.new_empty(weight.shape)
        self._bias = weight.new_zeros(weight.shape[0], dtype=wide) if bias_needed else None
        self._started = self._narrow

    def add(self, grad: Tensor, block: Tensor | None) -> None:
        """Adds rows: ``grad`` [batch, rows, inner * n] and ``block`` [batch, rows, inner * K], rows contiguous.

        ``block`` may be None where only the bias gradient is wanted.
        """
        batch, rows, width = grad.shape
        lines = width // self._features * rows
        if batch > 1 and lines < _SMALL_ROWS:
            grad = grad.reshape(1, batch * rows, width)
            block = None if block is None else block.reshape(1, batch * rows, block.shape[2])
            batch, lines = 1, batch * lines
        for index in range(batch):
            left = grad[index].reshape(lines, self._features)
            if self._bias is not None:
                self._bias += left.sum(0, dtype=self._bias.dtype)
            if self._sum is None or block is None:
                continue
            right = block[index].reshape(lines, self._inputs)
            if self._narrow:
                add_wide(self._sum, left.t(), right)
            else:
                _multiply_into(self._sum, left.t(), right, None, self._started)
            self._started = True

    def accumulator(self) -> Tensor | None:
        """The sum [n, K] for a kernel that writes all of it; None where it is not needed."""
        self._started = True
        return self._sum

    def weight(self) -> Tensor | None:
        """The weight's gradient [n, K] in the weight's type."""
        if self._sum is None:
            return None
        return (self._sum if self._started else self._sum.zero_()).to(self._dtype)

    def wide_bias(self) -> Tensor:
        """The bias's gradient [n], which is needed, in the accumulator's type."""
        assert self._bias is not None
        return self._bias

    def bias(self) -> Tensor | None:
        """The bias's gradient [n] in the weight's type."""
        return None if self._bias is None else self._bias.to(self._dtype)


class CommonBiasGradient:
    """Sum of all ranks' rows of a gathered gradient, the same bits on every rank.

    Each rank visits rows in an order of its own, and takes its own rows whole where those of others come in pieces.
    Such differences in rounding must not let a replicated parameter drift apart: the sums of all pieces are kept, the
    rank's own rows are added in the same pieces as the others', and all of them in rank order.
    """

    def __init__(self, weight: Tensor, rank: int, world: int) -> None:
        self._weight, self._rank, self._world = weight, rank, world
        self._parts: dict[tuple[int, int, int], Tensor] = {}

    def add(self, source: int, start: int, stop: int, block: Tensor) -> None:
        """Rows ``start`` to ``stop`` of ``source``: block [batch, rows, inner * n]."""
        if source != self._rank:
            self._parts[source, start, stop] = self._of(block)

    def total(self, own: Tensor) -> Tensor:
        """The gradient [n] in the weight's type; ``own`` [batch, rows, inner * n] are all rows of this rank."""
        pieces = sorted({(start, stop) for _, start, stop in self._parts}) or [(0, own.shape[1])]
        for start, stop in pieces:
            self._parts[self._rank, start, stop] = self._of(own[:, start:stop])
        total = torch.stack([self._parts[source, *piece] for source in range(self._world) for piece in pieces]).sum(0)
        return total.to(self._weight.dtype)

    def _of(self, block: Tensor) -> Tensor:
        found = WeightGradient(self._weight, weight_needed=False, bias_needed=True)
        found.add(block, None)
        return found.wide_bias()
