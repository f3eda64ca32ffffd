"""How far a result is from the truth, where the truth is the same computation in fp64 on unsharded data.

Tolerances follow from rounding instead of being chosen until tests pass.  With u the unit roundoff of a type (half the
distance from 1 to the next number):

- A sum of t products in fp32 (or fp64) has an error that grows like a random walk: about u·sqrt(t) of its size, less
  in blocked kernels.  Allowed: four times that.
- A result in bf16 or fp16 that was accumulated in fp32 is off by one rounding to its own type, at most u of each
  element.  Allowed: u for each time that the value passes through that type.

Errors are relative in the Frobenius norm, because single elements can cancel to nothing and have no relative error
worth naming.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["assert_close_to_truth", "max_error", "nan_empty", "relative_error", "rounding_tolerance", "unit_roundoff"]

_RANDOM_WALK_MARGIN = 4.0
_BASELINE_MARGIN = 1.5


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of ``actual - truth`` over that of ``truth`` (over 1 where the truth is all zero), in fp64.

    NaN if either holds a NaN, so that ``error <= limit`` is false.
    """
    truth, difference = _truth_and_difference(actual, truth)
    norm = torch.linalg.vector_norm(truth).item()
    return torch.linalg.vector_norm(difference).item() / (norm or 1.0)


def max_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference of an element, in fp64; 0 for empty tensors, NaN if either holds a NaN."""
    _, difference = _truth_and_difference(actual, truth)
    return difference.abs().max().item() if difference.numel() else 0.0


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding a number to ``dtype``: 2⁻²⁴ for fp32, 2⁻⁸ for bf16."""
    return torch.finfo(dtype).eps / 2


def rounding_tolerance(dtype: torch.dtype, *, terms: int = 1024, roundings: int = 2) -> float:
    """Relative Frobenius error that rounding alone explains.

    Args:
        dtype: type of the result; fp64 accumulates in fp64, all others in fp32.
        terms: products that are added for one element of the result, over all ranks.
        roundings: times that a value passes through ``dtype`` if that is narrower than the accumulator: once at the
            end, and once for each partial result that is sent in it.
    """
    accumulator = torch.promote_types(dtype, torch.float32)
    tolerance = _RANDOM_WALK_MARGIN * unit_roundoff(accumulator) * math.sqrt(max(terms, 1))
    if accumulator != dtype:
        tolerance += roundings * unit_roundoff(dtype)
    return tolerance


def assert_close_to_truth(
    actual: torch.Tensor,
    truth: torch.Tensor,
    *,
    dtype: torch.dtype,
    terms: int = 1024,
    roundings: int = 2,
    baseline: torch.Tensor | None = None,
    name: str = "result",
) -> None:
    """Asserts that ``actual`` is the truth up to rounding.

    Args:
        actual: what was computed; any shape.
        truth: the same in fp64 on unsharded data, computed from the inputs as ``dtype`` holds them.
        dtype: type that ``actual`` must have.
        terms: see :func:`rounding_tolerance`.
        roundings: see :func:`rounding_tolerance`.
        baseline: the unfused result; then ``actual`` must also be at most 1.5 times as far from the truth.
        name: what the message calls it.

    Raises:
        AssertionError: if type, shape or values differ; it has both errors and the limit.
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    assert actual.dtype == dtype, f"{name}: expected {dtype}, got {actual.dtype}"
    assert actual.shape == truth.shape, f"{name}: expected shape {tuple(truth.shape)}, got {tuple(actual.shape)}"
    error = relative_error(actual, truth)
    limit = rounding_tolerance(dtype, terms=terms, roundings=roundings)
    why = f"rounding in {dtype} of {terms} terms explains {limit:.2e}"
    assert error <= limit, f"{name}: {_describe(actual, truth, error)}; {why}"
    if baseline is not None:
        baseline_error = relative_error(baseline, truth)
        # A baseline that happens to be exact cannot ask for more than a fraction of one rounding.
        limit = max(_BASELINE_MARGIN * baseline_error, unit_roundoff(dtype) / 4)
        why = f"the unfused result has {baseline_error:.2e}, so at most {limit:.2e} is allowed"
        assert error <= limit, f"{name}: {_describe(actual, truth, error)}; {why}"


@contextlib.contextmanager
def nan_empty() -> Iterator[None]:
    """Makes uninitialised memory visible: ``torch.empty`` and its kin return NaN (integers: the largest value).

    Rests on :mod:`torch.utils.deterministic`, for which torch's deterministic mode must be on meanwhile; operators
    without a deterministic form warn instead of failing.  The previous state comes back at the end of the block.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # a module whose class has the property; checkers see a plain module
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _truth_and_difference(actual: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if actual.shape != truth.shape:
        raise ValueError(f"expected tensors of one shape, got {tuple(actual.shape)} and {tuple(truth.shape)}")
    truth = truth.detach().to("cpu", torch.float64)
    return truth, actual.detach().to("cpu", torch.float64) - truth


def _describe(actual: torch.Tensor, truth: torch.Tensor, error: float) -> str:
    bad = (~actual.isfinite()).sum().item()
    text = f"relative Frobenius error {error:.2e}, largest absolute error {max_error(actual, truth):.2e}"
    return f"{text}, {bad} of {actual.numel()} elements are not finite" if bad else text
