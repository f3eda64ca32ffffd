"""What ``mode="tiles"`` runs: one Triton kernel for all chunks, which waits for them and signals by itself.

Triton is imported when the first such kernel runs, never before.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from ..comm.transport import TileGather, TileScatter
from ._products import Layout, WeightGradient

__all__ = ["can_serve", "keep", "project", "scatter", "weight_gradient"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_PROJECTIONS = 3


def can_serve(layout: Layout, weights: Sequence[Tensor]) -> bool:
    """Whether the kernels can do it: chunks that are plain matrices, up to three projections laid out alike."""
    if not _installed():
        return False
    if layout.batch != 1 or layout.inner_size != 1 or len(weights) > _MOST_PROJECTIONS:
        return False
    by_rows, by_columns = (all(weight.stride(dim) == 1 for weight in weights) for dim in (1, 0))
    return weights[0].dtype in _DTYPES and (by_rows or by_columns)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def project(
    found: TileGather, outs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> None:
    """``outs[i]`` [world * rows, n] ``= gathered @ weights[i].T + biases[i]``; weights [n, K]."""
    from ..kernels.gather_matmul import gather_matmul

    gather_matmul(
        outs,
        found.local,
        found.gathered,
        weights,
        biases,
        rank=found.rank,
        world=found.world,
        pieces=found.pieces,
        words=found.words,
        epoch=found.epoch,
        aborted=found.aborted,
    )


def keep(found: TileGather, into: Tensor) -> None:
    """Copies the gathered chunks [world * rows, K] into rank order, behind a kernel that has waited for them all."""
    by_rank = into.view(found.world, *found.local.shape)
    by_rank[found.rank].copy_(found.local)
    for visit in range(found.world - 1):
        by_rank[(found.rank + visit + 1) % found.world].copy_(found.gathered[visit])


def scatter(found: TileScatter, xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> None:
    """Each owner's rows of the sum of ``xs[i]`` [world * rows, K_i] ``@ weights[i].T``, stored where it receives them.

    weights [n, K_i]; the bias is added to this rank's own part.
    """
    from ..kernels.matmul_scatter import matmul_scatter

    matmul_scatter(
        found.own,
        xs,
        weights,
        bias,
        found.slots,
        rank=found.rank,
        world=found.world,
        credits=found.credits,
        credit_value=found.credit_value,
        arrived=found.arrived,
        arrived_value=found.arrived_value,
        counters=found.counters,
        epoch=found.epoch,
        aborted=found.aborted,
    )


def weight_gradient(found: TileGather, total: WeightGradient, local: Tensor, *, gathered_is_grad: bool = False) -> None:
    """``total = grad.T @ x`` over all chunks; ``local`` [world * rows, ...] is the operand that was not gathered."""
    from ..kernels.weight_gradient import weight_gradient as kernel

    into = total.accumulator()
    if into is None:
        return
    kernel(
        into.t() if gathered_is_grad else into,
        local,
        found.local,
        found.gathered,
        rank=found.rank,
        world=found.world,
        pieces=found.pieces,
        words=found.words,
        epoch=found.epoch,
        aborted=found.aborted,
    )
