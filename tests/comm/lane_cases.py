"""What ranks run to see which collectives of the collective transport are alone, without a product beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

import odysseus_kernels as ody
from odysseus_kernels.comm.collective.lanes import HostLane


def told(rank: int, world: int) -> dict[str, list[bool]]:
    """For each operator and mode, whether each of its transfers was started alone."""
    depth, seen, right = [0], list[bool](), {name: getattr(HostLane, name) for name in ("all_gather", "all_to_all")}

    @contextlib.contextmanager
    def alone(lane: HostLane) -> Iterator[None]:
        depth[0] += 1
        try:
            yield
        finally:
            depth[0] -= 1

    def noted(name: str) -> Any:
        def start(lane: HostLane, *arguments: Any, **others: Any) -> Any:
            seen.append(depth[0] > 0)
            return right[name](lane, *arguments, **others)

        return start

    calls: dict[str, Any] = {
        "all_gather_linear": lambda config: ody.all_gather_linear(
            torch.ones(4, 8), torch.ones(6, 8), group=None, config=config
        ),
        "linear_reduce_scatter": lambda config: ody.linear_reduce_scatter(
            torch.ones(4 * world, 8).bfloat16(), torch.ones(6, 8).bfloat16(), group=None, config=config
        ),
    }
    found = {}
    with mock.patch.multiple(HostLane, alone=alone, **{name: noted(name) for name in right}):
        for name, call in calls.items():
            for mode in ("unfused", "fused"):
                seen.clear()
                call(ody.OverlapConfig(mode=mode, transport="collective", timeout_s=20))  # type: ignore[arg-type]
                found[f"{name} {mode}"] = list(seen)
    return found
