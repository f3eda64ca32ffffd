"""What ranks run in the tests of ``mode="auto"``: operators whose mode is measured, kept, asked for or refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm.groups import group_transports


def _operators(config: ody.OverlapConfig, world: int, group: Any = None) -> list[Tensor]:
    """Outputs and all gradients of every operator."""
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    results = []
    for run, shapes in (
        (lambda x, w, b: ody.all_gather_linear(x, w, b, group=group, config=config), ((6, 8), (4, 8), (4,))),
        (
            lambda x, w, b: ody.linear_reduce_scatter(x, w, b, group=group, config=config),
            ((6 * world, 8), (4, 8), (4,)),
        ),
        (lambda x, w, b: ody.zero3_linear(x, w, b, group=group, config=config), ((6, 8), (4, 8), (4,))),
    ):
        leaves = [leaf(*shape) for shape in shapes]
        y = run(*leaves)
        results += [y, *torch.autograd.grad(y.square().sum(), leaves)]
    return [result.detach() for result in results]


def measured(rank: int, world: int, transport: str) -> tuple[list[str], list[int], str]:
    """Modes that were chosen by timing; results and traffic as if nothing had been timed."""
    group = dist.new_group(list(range(world)))
    config = ody.OverlapConfig(mode="unfused", transport=transport, timeout_s=30)
    with ody.CommRecorder() as plain:
        expected = _operators(config, world, group)
    timed = dataclasses.replace(config, mode="auto", tune="measure")
    counted = []
    for _ in range(2):
        with ody.CommRecorder() as record:
            found = _operators(timed, world, group)
        counted.append(record.bytes() - plain.bytes())
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    selection = group_transports(group)._selection
    assert selection is not None
    made = [one for one in selection.decisions if one.how in ("measured", "cached")]
    for one in made:
        # Never slower than unfused, by what was measured.
        assert one.seconds[one.mode] <= one.seconds["unfused"]
    return [f"{one.key.operator} {one.key.phase} {one.how}" for one in made], counted, ody.explain(group)


def modelled(rank: int, world: int) -> list[str]:
    """Predictions, on which ranks agree although their own sizes differ."""
    group = dist.new_group(list(range(world)))
    config = ody.OverlapConfig(tune="model", timeout_s=30)
    _operators(config, world, group)
    ody.all_gather_linear(torch.ones(2, 4), torch.ones(3 + 500 * rank, 4), group=group, config=config)
    selection = group_transports(group)._selection
    assert selection is not None
    assert {one.how for one in selection.decisions} == {"model"}
    return [one.mode for one in selection.decisions]


def refused(rank: int, world: int) -> list[str]:
    """What cannot be had, in words, before anything is sent."""
    x, w = torch.ones(2, 4), torch.ones(3, 4)
    messages = []
    for transport in ("symmetric", "collective"):
        config = ody.OverlapConfig(mode="tiles", transport=transport, timeout_s=20)
        for run in (
            lambda config: ody.all_gather_linear(x, w, group=None, config=config),
            lambda config: ody.linear_reduce_scatter(x, w, group=None, config=config),
            lambda config: ody.zero3_linear(x, w, group=None, config=config),
        ):
            try:
                run(config)
            except ValueError as error:
                messages.append(str(error))
    # Nothing is out of step afterwards.
    assert ody.all_gather_linear(x, w, group=None).shape == (2 * world, 3)
    return messages


def no_cuda(rank: int, world: int) -> list[str]:
    """CUDA tensors cannot exist here; their device can be asked for."""
    group = dist.new_group(list(range(world)))
    transports = group_transports(group)
    messages = []
    for config in (ody.OverlapConfig(), ody.OverlapConfig(transport="symmetric")):
        try:
            transports.choose(config, torch.device("cuda", 0))
        except (ody.ExtensionNotBuiltError, ValueError, RuntimeError, AssertionError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    other = group_transports(dist.new_group(list(range(world))))
    other.choose(ody.OverlapConfig(), torch.device("cpu"))
    try:
        other.choose(ody.OverlapConfig(), torch.device("cuda", 0))
    except ValueError as error:
        messages.append(str(error))
    try:
        other.choose(ody.OverlapConfig(), torch.device("meta"))
    except ValueError as error:
        messages.append(str(error))
    return messages
