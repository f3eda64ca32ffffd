"""What ranks run in the test of operators that prepare kernels."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import odysseus_kernels as ody
from odysseus_kernels.comm.choice.preparation import Preparation
from odysseus_kernels.comm.groups import use_transport
from odysseus_kernels.ops import _tiles


def prepared(rank: int, world: int) -> dict[str, list[str]]:
    """The kernels that each operator prepares in its forward and in its backward, with nothing sent."""
    group = dist.new_group(list(range(world)))
    config = ody.OverlapConfig(mode="tiles", timeout_s=20)
    found: dict[str, list[str]] = {}

    def leaf(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bfloat16, requires_grad=True)

    def run(name: str, operator: Any, *tensors: torch.Tensor) -> None:
        seen: list[str] = []
        with mock.patch.object(_tiles, "_prepare", lambda kernel, *rest: seen.append(kernel)):
            outputs = operator(*tensors)
            found[name] = seen.copy()
            seen.clear()
            output = outputs if isinstance(outputs, torch.Tensor) else sum(one.sum() for one in outputs)
            output.sum().backward()
            found[f"{name} backward"] = seen.copy()

    with use_transport(group, Preparation(rank, world)):
        run(
            "all_gather_linear",
            lambda x, *w: ody.all_gather_linear(x, w, group=group, config=config),
            *(leaf(6, 8), leaf(4, 8), leaf(5, 8)),
        )
        run(
            "linear_reduce_scatter",
            lambda x, w: ody.linear_reduce_scatter(x, w, group=group, config=config),
            *(leaf(6 * world, 8), leaf(4, 8)),
        )
        # A batch is more than the kernels serve.
        run(
            "all_gather_linear of a batch",
            lambda x, w: ody.all_gather_linear(x, w, group=group, config=config),
            *(leaf(2, 6, 8), leaf(4, 8)),
        )
    return found
