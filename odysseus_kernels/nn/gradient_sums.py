"""Gradients of parameters that are used for one tile of tokens after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from odysseus_kernels.ops._products import add_wide

__all__ = ["GradientSums"]


class GradientSums:
    """Gradients of parameters, added over the tiles in a wide type; None where they are not needed."""

    def __init__(self, like: Sequence[Tensor | None], needed: Sequence[bool], dtype: torch.dtype) -> None:
        self._like = like
        self.totals = [
            torch.zeros_like(one, dtype=dtype) if one is not None and wanted else None
            for one, wanted in zip(like, needed, strict=True)
        ]

    def product(self, index: int, grad: Tensor, lines: Tensor) -> None:
        """Adds ``grad.T @ lines``, a weight's gradient."""
        total = self.totals[index]
        if total is None:
            return
        if total.dtype == lines.dtype:
            torch.addmm(total, grad.t(), lines, out=total)
        else:
            add_wide(total, grad.t(), lines)

    def lines(self, index: int, grad: Tensor) -> None:
        """Adds the sum over the rows, a bias's gradient."""
        total = self.totals[index]
        if total is not None:
            total.add_(grad.sum(0, dtype=total.dtype))

    def add(self, index: int, part: Tensor | None) -> None:
        """Adds a gradient as it is."""
        total = self.totals[index]
        if total is not None and part is not None:
            total.add_(part)

    def results(self) -> list[Tensor | None]:
        """In the parameters' own types."""
        return [
            None if total is None or own is None else total.to(own.dtype)
            for total, own in zip(self.totals, self._like, strict=True)
        ]
