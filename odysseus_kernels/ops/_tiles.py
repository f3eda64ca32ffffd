"""What ``mode="tiles"`` runs: one Triton kernel for all chunks, which waits for them and signals by itself.

Triton is imported when the first such kernel runs, never before.  The first run of a shape tries the configurations of
its kernel on the operands at hand, with every signal given, and keeps the fastest.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..comm.transport import TileGather, TileScatter
from ._products import Layout, WeightGradient

if TYPE_CHECKING:
    from ..kernels.configs import TileConfig

__all__ = ["can_serve", "keep", "project", "scatter", "weight_gradient"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_PROJECTIONS = 3


def can_serve(layout: Layout, weights: Sequence[Tensor]) -> bool:
    """Whether the kernels can do it: chunks that are plain matrices, up to three projections laid out alike."""
    if not _installed():
        return False
    if layout.batch != 1 or layout.inner_size != 1 or layout.rows < 1 or len(weights) > _MOST_PROJECTIONS:
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
    from ..kernels.configs import Problem
    from ..kernels.gather_matmul import gather_matmul
    from ..kernels.tuning import Signals, fastest

    local, world = found.local, found.world

    def run(words: Tensor, epoch: Tensor, aborted: Tensor, config: TileConfig | None) -> None:
        gather_matmul(
            outs,
            local,
            found.gathered,
            weights,
            biases,
            rank=found.rank,
            world=world,
            pieces=found.pieces,
            words=words,
            epoch=epoch,
            aborted=aborted,
            config=config,
        )

    def trial() -> Callable[[TileConfig], None]:
        signals = Signals(world, local.device)
        return lambda config: run(signals.words[: world - 1], signals.epoch, signals.aborted, config)

    problem = Problem(world, local.shape[0], tuple(weight.shape[0] for weight in weights), local.shape[1])
    layout = (tuple(weight.stride(1) == 1 for weight in weights), tuple(bias is None for bias in biases))
    config = fastest("gather_matmul", problem, local, trial, layout=layout)
    run(found.words, found.epoch, found.aborted, config)


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
    from ..kernels.configs import Problem
    from ..kernels.matmul_scatter import matmul_scatter
    from ..kernels.tuning import Signals, fastest

    own, world = found.own, found.world

    def trial() -> Callable[[TileConfig], None]:
        # All targets' parts go to one place of our own.
        signals, place = Signals(world, own.device), torch.empty_like(own)
        slots = torch.full((world,), place.data_ptr(), dtype=torch.int64, device=own.device)
        waited, put = signals.waited_addresses(), signals.set_addresses()

        def run(config: TileConfig) -> None:
            matmul_scatter(
                place,
                xs,
                weights,
                bias,
                slots,
                rank=found.rank,
                world=world,
                credits=waited,
                credit_value=found.credit_value,
                arrived=put,
                arrived_value=found.arrived_value,
                counters=signals.counters,
                epoch=signals.epoch,
                aborted=signals.aborted,
                config=config,
            )

        return run

    problem = Problem(world, own.shape[0], (own.shape[1],), sum(x.shape[1] for x in xs))
    layout = (tuple(weight.stride(1) == 1 for weight in weights), bias is None)
    config = fastest("matmul_scatter", problem, xs[0], trial, layout=layout)
    matmul_scatter(
        own,
        xs,
        weights,
        bias,
        found.slots,
        rank=found.rank,
        world=world,
        credits=found.credits,
        credit_value=found.credit_value,
        arrived=found.arrived,
        arrived_value=found.arrived_value,
        counters=found.counters,
        epoch=found.epoch,
        aborted=found.aborted,
        config=config,
    )


def weight_gradient(found: TileGather, total: WeightGradient, local: Tensor, *, gathered_is_grad: bool = False) -> None:
    """``total = grad.T @ x`` over all chunks; ``local`` [world * rows, ...] is the operand that was not gathered."""
    from ..kernels.configs import Problem
    from ..kernels.tuning import Signals, fastest
    from ..kernels.weight_gradient import weight_gradient as kernel

    into = total.accumulator()
    if into is None:
        return
    out, chunk, world = into.t() if gathered_is_grad else into, found.local, found.world

    def run(words: Tensor, epoch: Tensor, aborted: Tensor, config: TileConfig | None) -> None:
        kernel(
            out,
            local,
            chunk,
            found.gathered,
            rank=found.rank,
            world=world,
            pieces=found.pieces,
            words=words,
            epoch=epoch,
            aborted=aborted,
            config=config,
        )

    def trial() -> Callable[[TileConfig], None]:
        signals = Signals(world, chunk.device)
        return lambda config: run(signals.words[: world - 1], signals.epoch, signals.aborted, config)

    problem = Problem(1, local.shape[1], (chunk.shape[1],), world * chunk.shape[0])
    config = fastest("weight_gradient", problem, chunk, trial, layout=gathered_is_grad)
    run(found.words, found.epoch, found.aborted, config)
