"""Bytes that the recorder counted on one rank, for each operator."""

from __future__ import annotations

import torch

import odysseus_kernels as ody


def traffic(
    rank: int, world: int, operator: str, transport: str, mode: str, gathered: str, dtype: str
) -> dict[str, int]:
    """Sizes: x [2, 6, 10] of each rank, weight [4, 10]."""
    config = ody.OverlapConfig(mode=mode, transport=transport, gathered=gathered, timeout_s=30)
    kind = getattr(torch, dtype)
    weight = torch.randn(4, 10, dtype=kind, requires_grad=True)
    rows = 6 * world if operator == "linear_reduce_scatter" else 6
    x = torch.randn(2, rows, 10, dtype=kind, requires_grad=True)
    with ody.CommRecorder() as record:
        y = getattr(ody, operator)(x, weight, group=None, config=config)
        y.sum().backward()
    counted = {f"{row['phase']} {row['collective']}": int(row["bytes"]) for row in record.rows()}
    assert all(row["operator"] == operator and row["transport"] == transport for row in record.rows())
    assert sum(counted.values()) == record.bytes() == record.bytes(operator=operator)
    assert f"{record.bytes():,}" in record.table()
    return counted
