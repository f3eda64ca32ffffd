"""How far sums of a switch may be from exact ones: any order of additions stays within the bound."""

from __future__ import annotations

import itertools

import pytest
import torch

from odysseus_kernels.comm.switch import switch_error_bound

pytestmark = pytest.mark.without_ranks


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_every_order_of_additions(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(5, 400, generator=generator).to(dtype)
    parts[:, 100:200] *= torch.tensor([1e3, 1.0, -1e3, 1e-3, 1.0]).to(dtype)[:, None]  # what cancels
    parts[:, 200:] *= 1e-6  # below the smallest normal number of fp16
    bound = switch_error_bound(parts)
    assert bound.dtype == torch.float64 and bound.shape == (400,)
    worst = torch.zeros(400, dtype=torch.float64)
    for order in itertools.permutations(range(5)):
        total = torch.zeros(400)
        for rank in order:
            total = total + parts[rank].float()
        error = (total.to(dtype).double() - parts.double().sum(0)).abs()
        assert (error <= bound).all()
        worst = torch.maximum(worst, error)
    assert (worst > 0.2 * bound).any(), "no bound that is met by far"


def test_by_hand() -> None:
    parts = torch.tensor([[1.0], [-3.0], [2.0], [4.0]], dtype=torch.bfloat16)
    additions = 3 * 2.0**-23
    added = additions / (1 - additions) * 10
    expected = added + 2.0**-7 * (4 + added) + 2.0**-133
    torch.testing.assert_close(switch_error_bound(parts), torch.tensor([expected], dtype=torch.float64))
    torch.testing.assert_close(switch_error_bound(parts.float()), torch.tensor([added], dtype=torch.float64))


def test_sums_that_are_wrong_are_not_within_it() -> None:
    """A rank's part that is missing, or added twice, or sums that are kept in the parts' own type."""
    generator = torch.Generator().manual_seed(1)
    parts = torch.randn(8, 1000, generator=generator).to(torch.bfloat16)
    exact, bound = parts.double().sum(0), switch_error_bound(parts)
    narrow = parts[0]
    for part in parts[1:]:
        narrow = narrow + part
    for wrong in (parts[:-1].float().sum(0), parts.float().sum(0) + parts[0].float(), narrow):
        assert ((wrong.double() - exact).abs() > bound).any()


def test_types_that_no_switch_adds() -> None:
    with pytest.raises(ValueError, match=r"got torch.float64"):
        switch_error_bound(torch.ones(2, 2, dtype=torch.float64))
