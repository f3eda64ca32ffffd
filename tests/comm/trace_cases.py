"""What ranks run in the tests of traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import odysseus_kernels as ody


def _step(rank: int, world: int, config: ody.OverlapConfig) -> list[torch.Tensor]:
    """Forward and backward of an all-gather, a scatter and a ring; output and gradients."""
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(7)
    whole = torch.randn(world, 16, 8, generator=generator)
    first, second = (torch.randn(12, 8, generator=generator), torch.randn(8, 12, generator=generator))
    x, first, second = (one.requires_grad_() for one in (whole[rank].clone(), first, second))
    hidden = ody.all_gather_linear(x, first, group=group, config=config)
    y = ody.linear_reduce_scatter(hidden, second, group=group, config=config)
    q = y.view(1, 2, 16, 4)
    out = ody.ring_attention(q, q, q, layout="contiguous", group=group, config=config)
    return [out, *torch.autograd.grad(out.square().sum(), (x, first, second))]


def traced(rank: int, world: int, folder: str, transport: str, mode: str) -> dict[str, Any]:
    config = ody.OverlapConfig(transport=transport, mode=mode, chunks_per_rank=2, timeout_s=60)  # type: ignore[arg-type]
    before = _step(rank, world, config)
    with ody.CommRecorder() as record, ody.trace(Path(folder) / "step.json") as trace:
        found = _step(rank, world, config)
        with pytest.raises(
            RuntimeError, match=r"expected no other trace in this process, one is being made for .*-rank"
        ):
            ody.trace("other.json").__enter__()
    after = _step(rank, world, config)
    return {
        "equal": all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(before, found, after, strict=True)),
        "name": trace.path.name,
        "document": json.loads(trace.path.read_text()),
        "bytes": record.bytes(),
        "operators": sorted({(str(row["operator"]), str(row["phase"])) for row in record.rows()}),
    }
