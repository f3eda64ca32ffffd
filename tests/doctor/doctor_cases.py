"""What ranks run in the tests of ``doctor``."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

import odysseus_kernels as ody
from odysseus_kernels.doctor import pairs
from odysseus_kernels.doctor.operators import OPERATORS
from odysseus_kernels.doctor.self_test import check_operator


def check_wrong(rank: int, world: int, wrong: str) -> dict[str, Any]:
    """The check of an operator that is wrong in one place on rank 1."""
    right = OPERATORS["all_gather_linear"]

    def call(part: dict[str, torch.Tensor], **settings: Any) -> Any:
        y, second = right.call(part, **settings)
        if rank == 1 and wrong == "output":
            second = second + torch.zeros_like(second).index_fill_(1, torch.tensor([3]), 1e-3)
        if rank == 1 and wrong == "gradient":  # what a forgotten reduction would do
            y.register_hook(lambda gradient: gradient * 0.5)
        if rank == 1 and wrong == "nan":
            second = second * float("nan")
        return y, second

    config = ody.OverlapConfig(mode="fused", transport="symmetric", timeout_s=30)
    group = dist.group.WORLD
    assert group is not None
    operator = dataclasses.replace(right, call=call)
    check = check_operator("all_gather_linear", operator, group, config, torch.device("cpu"))
    return {**dataclasses.asdict(check), "passed": check.passed}


def measure_pairs(rank: int, world: int, path: str, limit_s: float) -> list[dict[str, Any]]:
    """The rates that this rank tells, as dictionaries, where no pair begins after ``limit_s``."""
    store = dist.FileStore(path, world)
    found = pairs.measure_pairs(store, rank, world, ("symmetric", "collective"), torch.device("cpu"), 30.0, limit_s)
    return [dataclasses.asdict(pair) for pair in found]
