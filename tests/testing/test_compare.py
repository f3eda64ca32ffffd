"""Comparison with the truth, and the memory that shows when nobody wrote it."""

from __future__ import annotations

import math

import pytest
import torch

from odysseus_kernels.testing.compare import (
    assert_close_to_truth,
    max_error,
    nan_empty,
    relative_error,
    rounding_tolerance,
    unit_roundoff,
)


def test_errors() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert max_error(torch.tensor([3.0, 4.5]), truth) == 0.5
    assert relative_error(torch.tensor([0.5]), torch.zeros(1)) == 0.5
    assert relative_error(torch.empty(0), torch.empty(0)) == 0.0 == max_error(torch.empty(0), torch.empty(0))
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.ones(1)))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        relative_error(torch.ones(2), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_within_tolerance_and_not_far_below(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(64, 512).to(dtype), torch.randn(512, 64).to(dtype)
    truth = a.double() @ b.double()
    assert_close_to_truth(a @ b, truth, dtype=dtype, terms=512)
    if dtype != torch.float64:  # fp64 is compared with itself
        assert relative_error(a @ b, truth) > rounding_tolerance(dtype, terms=512) / 1000


def test_what_is_not_rounding_fails() -> None:
    torch.manual_seed(0)
    truth = torch.randn(32, 32, dtype=torch.float64)
    exact = truth.float()
    off = exact.clone()
    off[0, 0] += 0.1
    with pytest.raises(AssertionError, match=r"dy: relative Frobenius error .* explains"):
        assert_close_to_truth(off, truth, dtype=torch.float32, name="dy")
    off[0, 0] = math.nan
    with pytest.raises(AssertionError, match="1 of 1024 elements are not finite"):
        assert_close_to_truth(off, truth, dtype=torch.float32)
    with pytest.raises(AssertionError, match="expected torch.float32"):
        assert_close_to_truth(truth, truth, dtype=torch.float32)
    with pytest.raises(AssertionError, match="expected shape"):
        assert_close_to_truth(exact[:1], truth, dtype=torch.float32)


def test_baseline_limits_the_error_as_well() -> None:
    truth = torch.ones(100, dtype=torch.float64)
    u = unit_roundoff(torch.bfloat16)
    baseline, within, beyond = (torch.full((100,), 1 + k * u * 2, dtype=torch.bfloat16) for k in (1, 1, 2))
    # Looser than default on rounding, so that the second limit is the one that speaks.
    assert_close_to_truth(within, truth, dtype=torch.bfloat16, roundings=8, baseline=baseline)
    with pytest.raises(AssertionError, match="the unfused result has"):
        assert_close_to_truth(beyond, truth, dtype=torch.bfloat16, roundings=8, baseline=baseline)


def test_nan_empty_fills_and_restores() -> None:
    x = torch.ones(3)
    before = (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
    with nan_empty():
        assert torch.empty(4).isnan().all()
        assert torch.empty_like(x).isnan().all()
        assert x.new_empty(2, dtype=torch.bfloat16).isnan().all()
        assert torch.empty_strided((2, 2), (1, 2)).isnan().all()
        with pytest.raises(KeyError), nan_empty():
            raise KeyError
        assert torch.empty(4).isnan().all()
    assert before == (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
