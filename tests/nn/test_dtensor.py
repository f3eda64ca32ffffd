"""torch.amp.GradScaler on distributed gradients: one rank's overflow makes all ranks skip, and scales stay equal."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

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
