"""What ranks behind an NVLink switch run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from cuda_cases import device_of
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.testing.compare import assert_close_to_truth, nan_empty

SETTINGS: dict[str, dict[str, Any]] = {
    "linear_reduce_scatter": {"reduce": "nvls", "gather": "nvls"},
    "linear_all_reduce": {"reduce": "nvls"},
    "all_gather_linear": {"gather": "nvls"},
}
_ROWS, _INNER, _OUTER = 24, 32, 48


def why_not(rank: int, world: int) -> str:
    """Why no switch adds for these ranks; empty if one does."""
    x, weight = torch.ones(8 * world, 8, device=device_of(rank)), torch.ones(8, 8, device=device_of(rank))
    try:
        ody.linear_reduce_scatter(x, weight, group=None, config=ody.OverlapConfig(mode="fused", reduce="nvls"))
        ody.synchronize()
    except ValueError as error:
        return str(error)
    return ""


def against_fp64(rank: int, world: int, operator: str, dtype: str, mode: Any) -> None:
    """Whole numbers, whose sums are exact in any order, then random ones; forward and backward, several pieces."""
    device, kind = device_of(rank), getattr(torch, dtype)
    gathers = operator == "all_gather_linear"
    for pieces in (1, 3):
        config = ody.OverlapConfig(mode=mode, chunks_per_rank=pieces, timeout_s=30, **SETTINGS[operator])
        for exact in (True, False):
            generator = torch.Generator().manual_seed(pieces)

            def draw(*shape: int, exact: bool = exact, generator: torch.Generator = generator) -> Tensor:
                if exact:  # sums of products stay below 256, which every type holds
                    return torch.randint(-1, 2, shape, generator=generator).double()
                return torch.randn(*shape, generator=generator).to(kind).double()

            xs = [draw(_ROWS if gathers else _ROWS * world, _INNER) for _ in range(world)]
            weights = [draw(_OUTER, _INNER) for _ in range(world)]
            if gathers:
                truth = torch.cat(xs) @ weights[rank].t()
            else:
                whole = sum(x @ weight.t() for x, weight in zip(xs, weights, strict=True))
                assert isinstance(whole, Tensor)
                rows = slice(rank * _ROWS, (rank + 1) * _ROWS) if operator == "linear_reduce_scatter" else slice(None)
                truth = whole[rows]
            x, weight = (one[rank].to(device, kind).requires_grad_() for one in (xs, weights))
            with nan_empty():
                y = getattr(ody, operator)(x, weight, group=None, config=config)
                (dx,) = torch.autograd.grad(y.sum(), x)
            ody.synchronize()
            if exact:
                assert torch.equal(y.double().cpu(), truth), "sums that are exact in any order"
            assert_close_to_truth(y.detach().cpu(), truth, dtype=kind, terms=_INNER * world, roundings=2)
            # The gradient without the switch is what tests of the operators compare with fp64.
            y = getattr(ody, operator)(x, weight, group=None, config=ody.OverlapConfig(mode=mode))
            (plain,) = torch.autograd.grad(y.sum(), x)
            ody.synchronize()
            assert_close_to_truth(dx.cpu(), plain.double().cpu(), dtype=kind, terms=_OUTER * world, roundings=4)
    dist.barrier()


def same_bits(rank: int, world: int) -> None:
    """Each sum of an all-reduce is made once, and copied."""
    device = device_of(rank)
    generator = torch.Generator(device).manual_seed(rank)
    x, weight = (torch.randn(size, 64, generator=generator, device=device) for size in (40, 24))
    y = ody.linear_all_reduce(x, weight, group=None, config=ody.OverlapConfig(mode="fused", reduce="nvls"))
    ody.synchronize()
    everyone = [torch.empty(40, 24) for _ in range(world)]
    dist.all_gather(everyone, y.cpu())
    assert all(torch.equal(one, everyone[0]) for one in everyone)
