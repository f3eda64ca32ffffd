"""What lies between the projections and attention: a norm of each head, and the rotation by position.

Both with their gradients written out, since they run inside an operator, below autograd.  Queries and keys are
[B, n, H, D]; everything is computed as stock models do: norms in fp32 and rounded to the input's type before they are
scaled (Zhang and Sennrich, arXiv 1910.07467), halves of a head rotated against each other (Su et al., arXiv 2104.09864,
in the layout of GPT-NeoX).
"""

from __future__ import annotations

import torch
from torch import Tensor

from odysseus_kernels.comm.reduce import accumulator_dtype

__all__ = ["HeadNorm", "rotate", "rotate_backward"]


def _halves(x: Tensor) -> Tensor:
    """(a, b) becomes (-b, a)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, n, H, D] rotated by cos and sin [1 or B, n, D]."""
    return x * cos[:, :, None] + _halves(x) * sin[:, :, None]


def rotate_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of :func:`rotate`'s input: (a, b) -> (-b, a) has the transpose (a, b) -> (b, -a)."""
    return grad * cos[:, :, None] - _halves(grad * sin[:, :, None])


class HeadNorm:
    """RMS norm over D with ``weight`` [D], and the sum of its weight's gradient over all calls of :meth:`backward`."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight, self._eps = weight, eps
        self._sum = torch.zeros_like(weight, dtype=accumulator_dtype(weight.dtype))

    def restart(self) -> None:
        """Forgets what was added up."""
        self._sum.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n, H, D], normalized."""
        return self._weight * self._normalized(x)[0].to(x.dtype)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of x, wide; that of the weight is added up."""
        normalized, scale = self._normalized(x)
        grad = grad.to(normalized.dtype)
        self._sum += (grad * normalized.to(x.dtype)).sum((0, 1, 2), dtype=self._sum.dtype)
        inner = grad * self._weight.to(grad.dtype)
        return scale * (inner - normalized * (inner * normalized).mean(-1, keepdim=True))

    def weight_gradient(self) -> Tensor:
        """[D], in the weight's type."""
        return self._sum.to(self._weight.dtype)

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.to(accumulator_dtype(x.dtype))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return wide * scale, scale
