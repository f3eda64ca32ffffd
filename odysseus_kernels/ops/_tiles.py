"""What ``mode="tiles"`` runs: one Triton kernel for all chunks, which waits for them and signals by itself.

Triton is imported when the first such kernel is prepared, never before.  Preparing comes before ranks depend on one
another: it tries the configurations of a kernel on the operands at hand, with every signal given, keeps the fastest,
and launches it once.  Later calls with such operands find that done.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from odysseus_kernels.comm.tiles import TileGather, TileScatter, WaitLimit
from odysseus_kernels.ops._products import Layout, WeightGradient

if TYPE_CHECKING:
    from odysseus_kernels.kernels.configs import Kernel, Problem, TileConfig
    from odysseus_kernels.kernels.tuning import Signals

Trial = Callable[["TileConfig | None"], None]

__all__ = [
    "can_serve",
    "keep",
    "prepare_project",
    "prepare_scatter",
    "prepare_weight_gradient",
    "project",
    "scatter",
    "weight_gradient",
]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_PROJECTIONS = 3
_TRIAL_S = 10.0  # that no wait of a kernel which is only tried ever takes


def can_serve(layout: Layout, weights: Sequence[Tensor]) -> bool:
    """Whether the kernels can serve it: chunks that are plain matrices, up to three projections laid out alike."""
    if not _installed():
        return False
    if layout.batch != 1 or layout.inner_size != 1 or layout.rows < 1 or len(weights) > _MOST_PROJECTIONS:
        return False
    by_rows, by_columns = (all(weight.stride(dim) == 1 for weight in weights) for dim in (1, 0))
    return weights[0].dtype in _DTYPES and (by_rows or by_columns)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _operands(*tensors: Tensor | None) -> Hashable:
    """All that a compiler may specialise on besides their sizes."""
    return tuple(None if t is None else (t.dtype, t.stride(), t.data_ptr() % 16) for t in tensors)


def _limit(limit: WaitLimit) -> dict[str, Any]:
    """As kernels take it."""
    return {field.name: getattr(limit, field.name) for field in dataclasses.fields(limit)}


def _satisfied(signals: Signals) -> WaitLimit:
    """Of waits that find every signal given."""
    return WaitLimit(signals.aborted, signals.control, _TRIAL_S, 0)


def _prepare(
    kernel: Kernel, problem: Problem, like: Tensor, operands: Hashable, trial: Callable[[], Trial], layout: Hashable
) -> None:
    from odysseus_kernels.kernels.prepare import prepare

    def run() -> None:
        # Here and not before: that Triton cannot be imported is one of the reasons why there is no kernel.
        from odysseus_kernels.kernels.tuning import fastest

        launch = trial()
        launch(fastest(kernel, problem, like, lambda: launch, layout=layout))

    prepare(kernel, (like.device, problem, operands), run)


# ---- gathered @ weights ----------------------------------------------------------------------------------------------


def _projection(
    local: Tensor, world: int, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Problem, Hashable]:
    """The problem, and what else distinguishes it from others."""
    from odysseus_kernels.kernels.configs import Problem

    problem = Problem(world, local.shape[0], tuple(weight.shape[0] for weight in weights), local.shape[1])
    return problem, (tuple(weight.stride(1) == 1 for weight in weights), tuple(bias is None for bias in biases))


def prepare_project(
    local: Tensor,
    rank: int,
    world: int,
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> None:
    """Makes sure that :func:`project` can run for this rank's chunk ``local`` [rows, K]; overwrites ``outs``.

    Raises:
        KernelUnavailableError: it cannot.
    """

    def trial() -> Trial:
        from odysseus_kernels.kernels.tuning import Signals

        signals, gathered = Signals(world, local.device), local.new_empty((world - 1, *local.shape))
        found = TileGather(
            rank, world, local, gathered, 1, signals.words[: world - 1], signals.epoch, _satisfied(signals)
        )
        return lambda config: _run_project(found, outs, weights, biases, config)

    problem, layout = _projection(local, world, weights, biases)
    _prepare("gather_matmul", problem, local, _operands(local, *outs, *weights, *biases), trial, layout)


def project(
    found: TileGather, outs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> None:
    """``outs[i]`` [world * rows, n] ``= gathered @ weights[i].T + biases[i]``; weights [n, K]."""
    from odysseus_kernels.kernels.tuning import tuned

    problem, layout = _projection(found.local, found.world, weights, biases)
    _run_project(found, outs, weights, biases, tuned("gather_matmul", problem, found.local, layout=layout))


def _run_project(
    found: TileGather,
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    config: TileConfig | None,
) -> None:
    from odysseus_kernels.kernels.gather_matmul import gather_matmul

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
        **_limit(found.limit),
        config=config,
    )


def keep(found: TileGather, into: Tensor) -> None:
    """Copies the gathered chunks [world * rows, K] into rank order, after a kernel that has waited for them all."""
    by_rank = into.view(found.world, *found.local.shape)
    by_rank[found.rank].copy_(found.local)
    for visit in range(found.world - 1):
        by_rank[(found.rank + visit + 1) % found.world].copy_(found.gathered[visit])


# ---- parts for their owners ------------------------------------------------------------------------------------------


def _scattering(
    own: Tensor, world: int, xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None
) -> tuple[Problem, Hashable]:
    from odysseus_kernels.kernels.configs import Problem

    problem = Problem(world, own.shape[0], (own.shape[1],), sum(x.shape[1] for x in xs))
    return problem, (tuple(weight.stride(1) == 1 for weight in weights), bias is None)


def prepare_scatter(
    own: Tensor, rank: int, world: int, xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None
) -> None:
    """Makes sure that :func:`scatter` can run; overwrites ``own`` [rows, n].

    Raises:
        KernelUnavailableError: it cannot.
    """

    def trial() -> Trial:
        from odysseus_kernels.kernels.tuning import Signals

        # All targets' parts go to one place of our own.
        signals, place = Signals(world, own.device), own.new_empty(own.shape)
        found = TileScatter(
            rank,
            world,
            own,
            torch.full((world,), place.data_ptr(), dtype=torch.int64, device=own.device),
            signals.waited_addresses(),
            0,
            signals.set_addresses(),
            1,
            signals.counters,
            signals.epoch,
            _satisfied(signals),
        )

        def run(config: TileConfig | None, kept: object = (signals, place)) -> None:
            # ``kept``: tensors that the kernel knows only by their addresses must live as long as this.
            _run_scatter(found, xs, weights, bias, config)

        return run

    problem, layout = _scattering(own, world, xs, weights, bias)
    _prepare("matmul_scatter", problem, xs[0], _operands(own, *xs, *weights, bias), trial, layout)


def scatter(found: TileScatter, xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> None:
    """Each owner's rows of the sum of ``xs[i]`` [world * rows, K_i] ``@ weights[i].T``, stored where it receives them.

    weights [n, K_i]; the bias is added to this rank's own part.
    """
    from odysseus_kernels.kernels.tuning import tuned

    problem, layout = _scattering(found.own, found.world, xs, weights, bias)
    _run_scatter(found, xs, weights, bias, tuned("matmul_scatter", problem, xs[0], layout=layout))


def _run_scatter(
    found: TileScatter,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    config: TileConfig | None,
) -> None:
    from odysseus_kernels.kernels.matmul_scatter import matmul_scatter

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
        **_limit(found.limit),
        config=config,
    )


# ---- gradients of weights --------------------------------------------------------------------------------------------


def _gradient(chunk: Tensor, world: int, local: Tensor) -> Problem:
    from odysseus_kernels.kernels.configs import Problem

    return Problem(1, local.shape[1], (chunk.shape[1],), world * chunk.shape[0])


def prepare_weight_gradient(
    chunk: Tensor, rank: int, world: int, total: WeightGradient, local: Tensor, *, gathered_is_grad: bool = False
) -> None:
    """Makes sure that :func:`weight_gradient` can run for this rank's ``chunk`` [rows, ...]; overwrites ``total``.

    Raises:
        KernelUnavailableError: it cannot.
    """
    into = total.accumulator()
    if into is None:
        return
    out = into.t() if gathered_is_grad else into

    def trial() -> Trial:
        from odysseus_kernels.kernels.tuning import Signals

        signals, gathered = Signals(world, chunk.device), chunk.new_empty((world - 1, *chunk.shape))
        found = TileGather(
            rank, world, chunk, gathered, 1, signals.words[: world - 1], signals.epoch, _satisfied(signals)
        )
        return lambda config: _run_weight_gradient(found, out, local, config)

    problem = _gradient(chunk, world, local)
    _prepare("weight_gradient", problem, chunk, _operands(chunk, out, local), trial, gathered_is_grad)


def weight_gradient(found: TileGather, total: WeightGradient, local: Tensor, *, gathered_is_grad: bool = False) -> None:
    """``total = grad.T @ x`` over all chunks; ``local`` [world * rows, ...] is the operand that was not gathered."""
    from odysseus_kernels.kernels.tuning import tuned

    into = total.accumulator()
    if into is None:
        return
    out = into.t() if gathered_is_grad else into
    problem = _gradient(found.local, found.world, local)
    config = tuned("weight_gradient", problem, found.local, layout=gathered_is_grad)
    _run_weight_gradient(found, out, local, config)


def _run_weight_gradient(found: TileGather, out: Tensor, local: Tensor, config: TileConfig | None) -> None:
    from odysseus_kernels.kernels.weight_gradient import weight_gradient as kernel

    kernel(
        out,
        local,
        found.local,
        found.gathered,
        rank=found.rank,
        world=found.world,
        pieces=found.pieces,
        words=found.words,
        epoch=found.epoch,
        **_limit(found.limit),
        config=config,
    )
