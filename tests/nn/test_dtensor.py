"""Tools of torch on distributed tensors: all ranks do the same, or are told that this cannot be.

torch.amp.GradScaler: one rank's overflow makes all ranks skip, and scales stay equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.master import MasterWeights
from odysseus_kernels.nn.parameters import Cut, distribute_parameter

# Replicated first, as a model's embedding is.
CUTS = (Cut(), Cut(0, "everyone"), Cut(1), Cut(0))
OPTIMIZERS: dict[str, tuple[Callable[[list[nn.Parameter]], torch.optim.Optimizer], torch.dtype]] = {
    "AdamW": (lambda parameters: torch.optim.AdamW(parameters, lr=0.1), torch.float32),
    "fused AdamW": (lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True), torch.float32),
    "MasterWeights": (lambda parameters: MasterWeights(torch.optim.AdamW, parameters, lr=0.1), torch.float16),
}


def steps(rank: int, world: int, sizes: tuple[int, ...], name: str) -> None:
    """Each parameter overflows on each rank, one at a time, and after each such step there is a good one."""
    names = ("ring", "seq")[-len(sizes) :]
    group = SequenceGroup.of(init_device_mesh("cpu", sizes, mesh_dim_names=names))
    make, dtype = OPTIMIZERS[name]
    whole = [nn.Parameter(torch.ones(8, 8, dtype=dtype)) for _ in CUTS]
    parameters = [distribute_parameter(p, group, cut) for p, cut in zip(whole, CUTS, strict=True)]
    optimizer, scaler = make(parameters), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    reference = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    stock = [nn.Parameter(torch.ones(8, 8)) for _ in CUTS]
    stock_optimizer = torch.optim.AdamW(stock, lr=0.1)
    plan = [(odd, index, bad) for odd in range(world) for index in range(len(CUTS)) for bad in (math.inf, math.nan)]
    for odd, index, bad in plan:
        for broken in (True, False):
            for place, (parameter, plain) in enumerate(zip(parameters, stock, strict=True)):
                local = torch.ones_like(parameter.to_local(), dtype=torch.float32) * scaler.get_scale()
                if broken and rank == odd and place == index:
                    local.view(-1)[3] = bad
                parameter.grad = DTensor.from_local(local, group.mesh, parameter.placements, run_check=False)
                plain.grad = torch.full((8, 8), bad if broken else reference.get_scale())
            reference.scale(torch.ones(()))  # scalers are made at their first use
            scaler.scale(torch.ones(()))
            before = [parameter.to_local().clone() for parameter in parameters]
            scaler.step(optimizer)
            scaler.update()
            reference.step(stock_optimizer)
            reference.update()
            assert scaler.get_scale() == reference.get_scale()
            for parameter, old in zip(parameters, before, strict=True):
                assert torch.equal(parameter.to_local(), old) == broken
    for parameter, plain in zip(parameters, stock, strict=True):
        # The same steps on all ranks; fp16 rounds what the masters hold once.
        torch.testing.assert_close(parameter.full_tensor().float(), plain.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_overflow_is_everybodys(ranks, optimizer):
    ranks(2).run(steps, (2,), optimizer)
    ranks(4).run(steps, (2, 2), optimizer)


def numbers(rank: int, world: int, sizes: tuple[int, ...]) -> None:
    """What would be this rank's part of a number is an error; what every rank has is taken."""
    names = ("ring", "seq")[-len(sizes) :]
    group = SequenceGroup.of(init_device_mesh("cpu", sizes, mesh_dim_names=names))
    whole = torch.arange(64.0).view(8, 8)
    for cut in CUTS:
        parameter = distribute_parameter(nn.Parameter(whole.clone()), group, cut).detach()
        for made in (torch.sum, torch.linalg.vector_norm, torch.amax, lambda t: torch.isfinite(t).all()):
            number = made(parameter)
            if cut.dim is None:
                assert number.item() == made(whole).item()
            else:
                for taken in (float, bool, torch.Tensor.item):
                    with pytest.raises(RuntimeError, match=r"still to be added over the ranks.*full_tensor\(\)"):
                        taken(number)
            assert number.full_tensor().item() == pytest.approx(made(whole).item())
        assert parameter[5, 3].item() == 43.0


def assigned_data(rank: int, world: int) -> None:
    """Assigning ``.data`` would change nothing; tensors of other meshes are as torch has them."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("seq",))
    parameter = distribute_parameter(nn.Parameter(torch.ones(8, 8)), SequenceGroup.of(mesh), Cut(0))
    for value in (parameter.data * 2, torch.zeros(8, 8)):
        with pytest.raises(RuntimeError, match=r"keeps its values.*copy_"):
            parameter.data = value
    with torch.no_grad():
        parameter.copy_(parameter.data * 2)
    assert parameter.to_local().eq(2).all()
    others = init_device_mesh("cpu", (world,), mesh_dim_names=("tensor",))
    other = DTensor.from_local(torch.ones(2), others, [Shard(0)])
    assert other.sum().item() == 2.0
    other.data = other.data * 2
    plain = nn.Parameter(torch.ones(2))
    plain.data = plain.data * 2
    assert plain.eq(2).all()


def test_a_rank_s_part_is_no_number(ranks):
    ranks(2).run(numbers, (2,))
    ranks(4).run(numbers, (2, 2))


def test_assigned_data_is_refused(ranks):
    ranks(2).run(assigned_data)
