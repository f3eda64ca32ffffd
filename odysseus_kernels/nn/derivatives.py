"""Functions between ranks whose gradients may not be differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

__all__ = ["first_derivative", "not_differentiable"]

_Backward = Callable[..., tuple[Any, ...]]


def first_derivative(backward: _Backward) -> _Backward:
    """Decorates ``backward`` of an ``autograd.Function``: what it returns raises when it is differentiated itself.

    Under ``create_graph=True`` torch would differentiate what ``backward`` computes on this rank, without the sums over
    ranks that belong to it.  (``torch.autograd.function.once_differentiable`` looks at the incoming gradient alone and
    drops what depends on saved tensors.)
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        return not_differentiable(type(ctx).__name__.removesuffix("Backward"), results, (*grads, *ctx.saved_tensors))

    return refusing


def not_differentiable(name: str, results: tuple[Any, ...], made_of: Iterable[Any]) -> tuple[Any, ...]:
    """Gradients ``results`` that raise, naming ``name``, when they are differentiated by what they are made of."""
    causes = [t for t in made_of if isinstance(t, torch.Tensor) and t.requires_grad]
    if not causes:
        return results
    return tuple(r if r is None else _NotDifferentiable.apply(name, r, *causes) for r in results)


class _NotDifferentiable(torch.autograd.Function):
    """forward: the first tensor; gradient: an error."""

    @staticmethod
    def forward(ctx: Any, name: str, result: torch.Tensor, *causes: torch.Tensor) -> torch.Tensor:
        """Returns ``result``, marked as depending on ``causes``."""
        ctx.name = name
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> NoReturn:
        """Raises RuntimeError."""
        raise RuntimeError(
            f"{ctx.name} has no second derivative: its gradients were made with create_graph=True and then "
            f"differentiated; penalties on gradients need an unparallelized model"
        )
