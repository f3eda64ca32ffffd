"""What ranks run in the tests of what Ring attention sends, and who sees whom by definition."""

from __future__ import annotations

from typing import Any

import ring_cases
import torch

import odysseus_kernels as ody
from odysseus_kernels.attention.layout import positions

Matrix = tuple[tuple[bool, ...], ...]


def seen(problem: ring_cases.Problem, world: int) -> Matrix:
    """Whether any query of rank r sees any key of rank s, from the mask of the whole sequence; itself in any case."""
    mask = ring_cases.whole_mask(problem, world).any(0)
    held = [positions(rank, world, problem.rows * world, problem.layout) for rank in range(world)]
    return tuple(
        tuple(rank == other or bool(mask[own][:, keys].any()) for other, keys in enumerate(held))
        for rank, own in enumerate(held)
    )


def sent(
    rank: int, world: int, transport: str, mode: str, dtype: str, problems: list[dict[str, Any]]
) -> list[tuple[int, int]]:
    """Bytes of forward and backward for each problem."""
    config = ody.OverlapConfig(transport=transport, mode=mode, timeout_s=60)
    found = []
    for problem in problems:
        with ody.CommRecorder() as record:
            ring_cases.ring(ring_cases.Problem(**problem), rank, world, getattr(torch, dtype), config)
        assert {row["collective"] for row in record.rows()} == {"send_recv"}
        found.append((record.bytes(phase="forward"), record.bytes(phase="backward")))
    return found
