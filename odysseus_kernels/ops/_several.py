"""Several projections in one custom operator: which of them have a bias, and whose gradients are wanted.

Lists of optional tensors have no gradients in custom operators.  So an operator takes those biases that there are, with
a flag for each weight, and its backward returns a gradient for each weight and then for each bias, an empty tensor
where nobody wants it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["biases_of_weights", "empty_gradients", "note_needed", "present_biases", "wanted_gradients"]


def present_biases(biases: Sequence[Tensor | None]) -> tuple[list[Tensor], list[bool]]:
    """Those of ``biases`` that there are, and whether each weight has one."""
    return [one for one in biases if one is not None], [one is not None for one in biases]


def biases_of_weights(biases: Sequence[Tensor], has_bias: Sequence[bool]) -> list[Tensor | None]:
    """A bias or None for each weight: what :func:`present_biases` was given."""
    remaining = iter(biases)
    return [next(remaining) if present else None for present in has_bias]


def empty_gradients(
    weights: Sequence[Tensor], weights_needed: Sequence[bool], biases_needed: Sequence[bool]
) -> list[Tensor]:
    """Gradients as a backward's fake returns them: of each weight, then of each bias."""
    dweights = [w.new_empty(w.shape if n else (0,)) for w, n in zip(weights, weights_needed, strict=True)]
    dbiases = [w.new_empty(w.shape[:1] if n else (0,)) for w, n in zip(weights, biases_needed, strict=True)]
    return [*dweights, *dbiases]


def note_needed(ctx: Any, weights: Sequence[Tensor], biases: Sequence[Tensor], has_bias: Sequence[bool]) -> None:
    """Sets ``ctx.weights_needed`` and ``ctx.biases_needed``, a flag for each weight, from forward's inputs."""
    ctx.weights_needed = [one.requires_grad for one in weights]
    needed = iter([one.requires_grad for one in biases])
    ctx.biases_needed = [present and next(needed) for present in has_bias]
    ctx.has_bias = has_bias


def wanted_gradients(ctx: Any, found: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """What autograd is handed for forward's weights and biases, of all that a backward returned for them."""
    count = len(ctx.weights_needed)
    dweights = [grad if needed else None for grad, needed in zip(found[:count], ctx.weights_needed, strict=True)]
    of_biases = zip(found[count:], ctx.biases_needed, ctx.has_bias, strict=True)
    return dweights, [grad if needed else None for grad, needed, present in of_biases if present]
