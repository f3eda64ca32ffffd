"""Norms of gradients that are distributed in all ways equal the norm of the whole ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from odysseus_kernels.nn.clipping import clip_grad_norm_

PLACEMENTS = [
    (Shard(0), Shard(0)), (Replicate(), Shard(1)), (Shard(1), Replicate()), (Replicate(), Replicate()),
    (Shard(0), Shard(1)),
]  # fmt: skip
NORM = 0.7


def _whole() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 12, generator=generator) * 3**i for i in range(len(PLACEMENTS) + 2)]


def _parameter(gradient: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(gradient.detach().clone())
    parameter.grad = gradient
    return parameter


def clip(rank: int, world_size: int, order: float) -> tuple[list[torch.Tensor], torch.Tensor, float | None]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "seq"))
    gradients = []
    for whole, placements in zip(_whole(), PLACEMENTS, strict=False):
        local = whole
        for placement, coordinate in zip(placements, mesh.get_coordinate(), strict=True):
            if isinstance(placement, Shard):
                local = local.chunk(2, placement.dim)[coordinate]
        gradients.append(DTensor.from_local(local.clone(), mesh, placements, run_check=False))
    on_mesh = [_parameter(gradient.clone()) for gradient in gradients]
    torchs = torch.nn.utils.clip_grad_norm_(on_mesh, NORM, order).full_tensor()
    # One of another mesh, and a plain one.
    gradients.append(
        DTensor.from_local(_whole()[-2].chunk(2, 0)[mesh["seq"].get_local_rank()].clone(), mesh["seq"], [Shard(0)])
    )
    gradients.append(_whole()[-1])
    parameters = [_parameter(gradient) for gradient in gradients]
    norm = clip_grad_norm_(parameters, NORM, order)
    assert not isinstance(norm, DTensor)
    clipped = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
    partial = nn.Parameter(DTensor.from_local(torch.ones(2), mesh["seq"], [Partial()]))
    partial.grad = partial.detach()
    with pytest.raises(ValueError, match="complete gradients"):
        clip_grad_norm_(partial, NORM)
    return clipped, norm, torchs.item()


@pytest.mark.parametrize("order", [2.0, 1.0, math.inf])
def test_mixed_placements_and_meshes(ranks, order):
    whole = _whole()
    true = torch.linalg.vector_norm(torch.cat([g.flatten() for g in whole]).double(), order).item()
    on_mesh = torch.linalg.vector_norm(torch.cat([g.flatten() for g in whole[:-2]]), order).item()
    parameters = [_parameter(gradient) for gradient in whole]
    torch.nn.utils.clip_grad_norm_(parameters, NORM, order)
    for clipped, norm, torchs in ranks(4).run(clip, order):
        # Sums of 672 numbers in fp32, relative to a result without cancellation.
        assert norm.item() == pytest.approx(true, rel=1e-5)
        for found, parameter in zip(clipped, parameters, strict=True):
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=0)
        # torch's own serves where all parameters are on one mesh, however they are distributed.
        assert torchs == pytest.approx(on_mesh, rel=1e-5)


def clip_nonfinite(rank: int, world_size: int) -> None:
    """One element that is not finite, on each rank in turn: norms and clipped gradients are torch's of the whole."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))
    for order in (2.0, 1.0, math.inf, "inf"):
        for bad in (math.nan, math.inf, -math.inf):
            for row in range(0, 4 * world_size, 4):
                whole = torch.arange(8.0 * world_size).view(4 * world_size, 2) - 3
                whole[row, 1] = bad
                plain, replicated = _parameter(whole.clone()), torch.full((3,), 2.0)
                expected = torch.nn.utils.clip_grad_norm_([plain, _parameter(replicated.clone())], NORM, order)
                local = whole.chunk(world_size)[rank].clone()
                # Beside them one of which only the first rank has anything.
                uneven = DTensor.from_local(
                    torch.ones(1 - min(rank, 1), 2), mesh, [Shard(0)], run_check=False, shape=(1, 2), stride=(2, 1)
                )
                gradients = [
                    DTensor.from_local(replicated.clone(), mesh, [Replicate()], run_check=False),
                    DTensor.from_local(local, mesh, [Shard(0)], run_check=False),
                    uneven,
                ]
                parameters = [_parameter(gradient) for gradient in gradients]
                before = [gradient.to_local().clone() for gradient in gradients]
                with pytest.raises(RuntimeError, match="finite norm of order"):
                    clip_grad_norm_(parameters, NORM, order, error_if_nonfinite=True)
                for gradient, same in zip(gradients, before, strict=True):
                    assert torch.equal(gradient.to_local().nan_to_num(7.0), same.nan_to_num(7.0))
                norm = clip_grad_norm_(parameters, NORM, order)
                torch.testing.assert_close(norm, expected, equal_nan=True)
                torch.testing.assert_close(gradients[1].full_tensor(), plain.grad, equal_nan=True)


def test_gradients_that_are_not_finite(ranks):
    ranks(2).run(clip_nonfinite)
    ranks(4).run(clip_nonfinite)


def test_plain_parameters_and_bad_input():
    parameter = nn.Parameter(torch.ones(4))
    assert clip_grad_norm_(parameter, 1.0) == 0
    parameter.grad = torch.full((4,), 0.25)
    assert clip_grad_norm_([parameter], 1.0) == 0.5
    assert torch.equal(parameter.grad, torch.full((4,), 0.25)), "small gradients are not scaled up"
    assert clip_grad_norm_(parameter, 1.0, "inf", error_if_nonfinite=True) == 0.25
    with pytest.raises(ValueError, match="norm_type"):
        clip_grad_norm_([parameter], 1.0, 0.5)
