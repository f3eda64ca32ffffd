"""What ranks run in the tests of what Ring attention sends, and who sees whom by definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ring_cases
import torch
from ring_tiles import tiles_of

import odysseus_kernels as ody
from odysseus_kernels.attention.layout import positions
from odysseus_kernels.planner import ring
from odysseus_kernels.planner.ring import Part

Matrix = tuple[tuple[bool, ...], ...]


def seen(problem: ring_cases.Problem, world: int, start: int = 0, stop: int | None = None) -> Matrix:
    """Whether any query of rank r sees any key of rank s, from the mask of the whole sequence; itself in any case.

    Or of some of rank s's keys.
    """
    mask = ring_cases.whole_mask(problem, world).any(0)
    held = [positions(rank, world, problem.rows * world, problem.layout) for rank in range(world)]
    return tuple(
        tuple(rank == other or bool(mask[own][:, keys[start:stop]].any()) for other, keys in enumerate(held))
        for rank, own in enumerate(held)
    )


def elements(problem: ring_cases.Problem, world: int, parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Of k and v: those that each rank sends, and those whose gradients it sends; parts that hold a seen key whole."""
    row = problem.batch * problem.kv_heads * 2 * problem.width
    sight = [(part.stop - part.start, seen(problem, world, part.start, part.stop)) for part in parts]
    return [
        (
            row * sum(rows * (sum(line[rank] for line in pairs) - 1) for rows, pairs in sight),
            row * sum(rows * (sum(pairs[rank]) - 1) for rows, pairs in sight),
        )
        for rank in range(world)
    ]


def check(rank: int, world: int, dtype: str, tile: int, transports: Any, modes: Any, problems: list[Any]) -> None:
    """:func:`ring_cases.check` with tiles of so many tokens."""
    with tiles_of(tile):
        ring_cases.check(rank, world, dtype, transports, modes, problems)


def sent(
    rank: int, world: int, transport: str, mode: str, dtype: str, tile: int, problems: list[dict[str, Any]]
) -> list[tuple[int, int]]:
    """Bytes of forward and backward for each problem."""
    config = ody.OverlapConfig(transport=transport, mode=mode, timeout_s=60)
    found = []
    for problem in problems:
        with ody.CommRecorder() as record, tiles_of(tile):
            ring_cases.ring(ring_cases.Problem(**problem), rank, world, getattr(torch, dtype), config)
        assert {row["collective"] for row in record.rows()} == {"send_recv"}
        found.append((record.bytes(phase="forward"), record.bytes(phase="backward")))
    return found


def repeated(rank: int, world: int, transport: str, tile: int, problem: dict[str, Any]) -> None:
    """Bits are the same in every run."""
    case, config = ring_cases.Problem(**problem), ody.OverlapConfig(transport=transport, mode="fused", timeout_s=60)
    with tiles_of(tile):
        first, *others = (ring_cases.ring(case, rank, world, torch.float32, config) for _ in range(3))
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)


def dropped(rank: int, world: int, transport: str) -> None:
    """Dropout is that of positions, however keys are cut."""
    case = ring_cases.Problem(rows=24, window=7, dropout=0.3, documents="packed")
    config = ody.OverlapConfig(transport=transport, mode="fused", timeout_s=60)
    found = []
    for tile in (4, 512):
        with tiles_of(tile):
            found.append(ring_cases.ring(case, rank, world, torch.float64, config))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def unseen_keys(rank: int, world: int, transport: str, mode: str, tile: int) -> list[tuple[int, int]]:
    """Gradients of keys that no query sees are exactly zero; returns how many each rank has, and how many parts."""
    case = ring_cases.Problem(rows=24, window=5, key_mask=True)
    config = ody.OverlapConfig(transport=transport, mode=mode, timeout_s=60)
    with tiles_of(tile):
        _, _, dk, dv = ring_cases.ring(case, rank, world, torch.bfloat16, config)
        parts = ring.parts_in_sight(world, case.rows, case.layout, causal=True, window=case.window)
    where = positions(rank, world, case.rows * world, case.layout)
    unseen = ~ring_cases.whole_mask(case, world)[:, :, where].any(1)  # [B, S]
    for grad in (dk, dv):
        assert not grad.isnan().any()
        assert not grad.transpose(1, 2)[unseen].count_nonzero()
    return [(int(unseen.sum()), len(parts))]


def other_window(rank: int, world: int, transport: str) -> tuple[str, str]:
    """One rank's window is another one, under which other parts travel."""
    window = 30 if rank == 1 else 5
    case, config = ring_cases.Problem(rows=24, window=window), ody.OverlapConfig(transport=transport, mode="fused")
    try:
        with tiles_of(4):
            ring_cases.ring(case, rank, world, torch.float32, config)
    except ody.CommunicationError as error:
        return type(error).__name__, str(error)
    return "", ""
