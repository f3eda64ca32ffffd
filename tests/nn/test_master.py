"""Master weights: training in bf16 follows fp32, sums of gradients are wide, state goes in and out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.master import MasterWeights
from odysseus_kernels.nn.parameters import Cut, distribute_parameter
from odysseus_kernels.testing.compare import relative_error, unit_roundoff

STEPS, MICRO_BATCHES = 40, 8


def _parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 8), (8, 12), (8,))
    return [nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype)) for shape in shapes]


def _loss(parameters: Any, step: int) -> torch.Tensor:
    """Its gradients with respect to bf16 parameters are their fp32 gradients, rounded."""
    generator = torch.Generator().manual_seed(step)
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    up, down, norm = (p.float() for p in whole)
    x = torch.randn(16, 8, generator=generator)
    return ((x * norm) @ up.t()).tanh().matmul(down.t()).sub(x.roll(1, 0)).square().mean()


def _train(optimizer: torch.optim.Optimizer, parameters: Any, steps: range) -> None:
    for step in steps:
        _loss(parameters, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_follows_training_in_fp32():
    wide, narrow, plain = _parameters(torch.float32), _parameters(torch.bfloat16), _parameters(torch.bfloat16)
    lr = 1e-3
    _train(torch.optim.SGD(wide, lr, momentum=0.9), wide, range(STEPS))
    optimizer = MasterWeights(torch.optim.SGD, narrow, lr=lr, momentum=0.9)
    _train(optimizer, narrow, range(STEPS))
    _train(torch.optim.SGD(plain, lr, momentum=0.9), plain, range(STEPS))
    start = _parameters(torch.float32)
    for true, parameter, rounded, first in zip(wide, narrow, plain, start, strict=True):
        way = (true - first).norm()
        error = (optimizer.state[parameter]["master"] - true).norm() / way
        # What moved the masters was computed with parameters and gradients rounded to bf16, each u of its size. The
        # loss's curvature and the tanh's turn that into no more than a few times as much of the way.
        assert error < 8 * unit_roundoff(torch.bfloat16)
        assert error < 0.2 * (rounded.float() - true).norm() / way, "without masters, small steps are lost"
        assert torch.equal(parameter, optimizer.state[parameter]["master"].bfloat16())


def _accumulated(grad_dtype: torch.dtype | None) -> list[torch.Tensor]:
    parameters = _parameters(torch.bfloat16)
    MasterWeights(torch.optim.SGD, parameters, grad_dtype=grad_dtype, lr=1.0)
    for batch in range(MICRO_BATCHES):
        _loss(parameters, batch).backward()
    return [p.grad for p in parameters]


def test_gradients_of_micro_batches_are_added_in_fp32():
    truth = _parameters(torch.float64)
    for batch in range(MICRO_BATCHES):
        _loss(truth, batch).backward()
    for wide, narrow, true in zip(_accumulated(torch.float32), _accumulated(None), truth, strict=True):
        assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
        # Each of the summands was rounded to bf16 once; the norm of the sum of their errors is at most the sum of
        # theirs, each u of a summand, and summands are no larger together than eight times the largest.
        assert relative_error(wide, true.grad) < 2 * unit_roundoff(torch.bfloat16)
        assert relative_error(wide, true.grad) < 0.7 * relative_error(narrow, true.grad)


def test_state_dict_restores_to_the_bit_and_settings_are_shared():
    first, second = _parameters(torch.bfloat16), _parameters(torch.bfloat16)
    optimizer = MasterWeights(torch.optim.AdamW, first, lr=1e-2, foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        _train(optimizer, first, range(step, step + 1))
        schedule.step()
    other = MasterWeights(torch.optim.AdamW, second, lr=1.0, foreach=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's own share the count of steps
    with torch.no_grad():
        for one, loaded in zip(first, second, strict=True):
            loaded.copy_(one)
            assert other.state[loaded]["master"].dtype == torch.float32
            assert other.state[loaded]["exp_avg_sq"].dtype == torch.float32
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 1e-2 / 4
    _train(optimizer, first, range(3, 6))
    _train(other, second, range(3, 6))
    for one, loaded in zip(first, second, strict=True):
        assert torch.equal(one, loaded)
        assert torch.equal(optimizer.state[one]["master"], other.state[loaded]["master"])


def test_wide_and_frozen_parameters_are_left_alone():
    wide, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
    optimizer = MasterWeights(torch.optim.AdamW, [{"params": [wide]}, {"params": [frozen], "lr": 0.5}], lr=1e-3)
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert optimizer.step(lambda: (wide.sum().backward(), 7)[1]) == 7
    assert "master" not in optimizer.state[wide] and optimizer.state[wide]["step"] == 1
    assert torch.equal(frozen, torch.ones_like(frozen))
    with pytest.raises(ValueError, match="grad_dtype: expected torch.float32 or None, got torch.float16"):
        MasterWeights(torch.optim.SGD, [wide], grad_dtype=torch.float16)
    with pytest.raises(ValueError, match="make another one"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def on_ranks(rank: int, world_size: int) -> list[torch.Tensor]:
    group = SequenceGroup.of(init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",)))
    cuts = (Cut(0), Cut(1), Cut())
    parameters = [distribute_parameter(p, group, cut) for p, cut in zip(_parameters(torch.bfloat16), cuts, strict=True)]
    optimizer = MasterWeights(torch.optim.AdamW, parameters, lr=1e-2, foreach=True)
    for step in range(3):
        _loss(parameters, step).backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.placements == p.placements for p in parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return [optimizer.state[p]["master"].full_tensor() for p in parameters]


def test_distributed_parameters(ranks):
    parameters = _parameters(torch.bfloat16)
    optimizer = MasterWeights(torch.optim.AdamW, parameters, lr=1e-2, foreach=True)
    for step in range(3):
        _loss(parameters, step).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for found in ranks(2).run(on_ranks):
        for parameter, master in zip(parameters, found, strict=True):
            # The same computation but for the order in which the norm's squares are added: fp32 roundings of the
            # clipping factor, which AdamW's quotient of moments cancels up to its eps.
            torch.testing.assert_close(master, optimizer.state[parameter]["master"], rtol=1e-5, atol=1e-6)
