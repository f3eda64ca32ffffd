"""One row's work on one rank: its tensors, everything that is timed, and the truth.

Three shapes of the same problem, with global matrices X [L, K], W [n, K] and Y = X·Wᵀ [L, n]:

- all_gather_linear: a rank has rows of X and rows of W, and computes columns of Y for all rows.
- linear_reduce_scatter: a rank has columns of X and of W, and its partial Y is summed; it keeps rows of Y.
- zero3_linear: a rank has rows of X and rows of W, and computes rows of Y with the whole W.

The truth of a rank's share comes from the global matrices in fp64, with gradients from a global dY.  All ranks draw
the same global matrices from one seed, so that each can compute its own share of the truth without communication.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.operators.cases import Case
from benchmarks.operators.torch_fused import TORCH_FUSED, torch_fused
from odysseus_kernels import ops
from odysseus_kernels.comm import functional
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops import reference
from odysseus_kernels.testing.compare import relative_error, rounding_tolerance

__all__ = ["TRANSPORTS", "Workload", "check_variants"]

Group = dist.ProcessGroup

TRANSPORTS = ("symmetric", "collective")
_MODES = ("unfused", "fused", "communication")

_TRUTH_FLOPS = 20e9
"""fp64 operations for which a rank checks all rows of a result; beyond, it checks as many rows as they pay for."""


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """What a rank holds; lists have one entry for each projection."""

    x: Tensor
    weights: list[Tensor]
    grads: list[Tensor]  # dY, as the operator's backward gets it
    x_product: Tensor  # operands of the local products, gathered
    weights_product: list[Tensor]
    grads_product: list[Tensor]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all ranks must agree on.

    Attributes:
        variants: a regular expression; of what is timed beside the products, only what it is found in.
    """

    rows: tuple[Case, ...]
    dtype: str
    device: str
    repeats: int
    transports: tuple[str, ...] = TRANSPORTS
    memory: bool = False
    seed: int = 1
    count_bytes: bool = False
    variants: str = ""


def check_variants(pattern: str, transports: Sequence[str]) -> None:
    """Raises ValueError unless ``pattern`` is an expression that is found in something beside the products."""
    names = [f"{mode} {transport}" for transport in transports for mode in _MODES] + ["torch"]
    try:
        found = any(re.search(pattern, name) for name in names)
    except re.error as error:
        raise ValueError(f"--variants: {pattern!r} is not a regular expression: {error}") from None
    if not found:
        raise ValueError(f"--variants: {pattern!r} is found in no name; the names are\n  " + "\n  ".join(names))


class Workload:
    """Tensors and calls of ``case`` on this rank.

    Args:
        case: the row.
        dtype: type of all tensors.
        device: where they are.
        transports: of :data:`TRANSPORTS`.
        seed: of the inputs; equal on all ranks.

    Attributes:
        no_torch_fused: why torch's own fused operator is not among :meth:`calls`; empty where it is.
    """

    no_torch_fused = ""

    def __init__(
        self, case: Case, *, dtype: torch.dtype, device: torch.device, transports: Sequence[str], seed: int
    ) -> None:
        self.case = case
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._dtype = dtype
        self._transports = tuple(transports)
        self._seed = seed
        self._local = _LAYOUTS[case.operator](self, self._draw(device))

    def calls(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        """Everything that is timed, by name; what operators return is (output(s), then gradients)."""
        calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {"gemm": self._products}
        for transport in self._transports:
            for mode in ("unfused", "fused"):
                calls[f"{mode} {transport}"] = functools.partial(self.operate, mode, transport)
            calls[f"communication {transport}"] = functools.partial(self._communicate, transport)
        calls["torch"] = functools.partial(self.operate, "torch")
        local = self._local
        fused, self.no_torch_fused = torch_fused(self.case, local.x, local.weights, local.x.device)
        if fused is not None:
            calls[TORCH_FUSED] = fused
        return calls

    def operate(
        self,
        mode: Literal["fused", "unfused", "torch"],
        transport: str = "auto",
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, ...]:
        """The operator, or its twin of raw collectives: output(s), then gradients of input and weight(s)."""
        if mode == "torch":
            operator = getattr(reference, f"{self.case.operator}_reference")
        else:
            config = OverlapConfig(mode=mode, transport=transport)
            operator = functools.partial(getattr(ops, self.case.operator), config=config)
        local = self._local
        with torch.set_grad_enabled(self.case.backward):
            weight = local.weights[0] if len(local.weights) == 1 else tuple(local.weights)
            output = operator(local.x, weight, group=group)
            outputs = (output,) if isinstance(output, Tensor) else tuple(output)
        if not self.case.backward:
            return outputs
        gradients = torch.autograd.grad(outputs, (local.x, *local.weights), local.grads)
        return tuple(o.detach() for o in outputs) + gradients

    @property
    def chunk_bytes(self) -> int:
        """Bytes that one rank contributes to what is gathered or scattered: of L/N rows, or of n/N of a weight."""
        local = self._local
        chunk = {
            "all_gather_linear": local.x.numel(),
            "linear_reduce_scatter": local.grads[0].numel(),  # of the output's shape
            "zero3_linear": local.weights[0].numel(),
        }
        return chunk[self.case.operator] * self._dtype.itemsize

    @staticmethod
    def is_checked(name: str) -> bool:
        """Whether what the call returns has a truth: not a product or a collective alone."""
        return name != "gemm" and not name.startswith("communication")

    @property
    def tolerance(self) -> float:
        """Relative error above which a result counts as wrong: what rounding explains, see testing/compare.py."""
        terms = max(self.case.tokens, self.world * self.case.inner, self.world * sum(self.case.outer))
        # A ring of a collective rounds partial sums to the tensors' type once for each rank, then comes the result.
        return rounding_tolerance(self._dtype, terms=terms, roundings=1 + self.world)

    def errors(self, results: Sequence[Tensor]) -> dict[str, float]:
        """Relative Frobenius error of each result on this rank, by name, on rows that :attr:`truth` has.

        A result whose shape or type differs from what is due counts as infinitely wrong.
        """
        if len(results) != len(self.truth):
            return {"number of results": float("inf")}
        errors = {}
        for result, (name, rows, shape, truth) in zip(results, self.truth, strict=True):
            right = tuple(result.shape) == shape and result.dtype == self._dtype
            errors[name] = relative_error(result[rows], truth) if right else float("inf")
        return errors

    @functools.cached_property
    def truth(self) -> list[tuple[str, Tensor, tuple[int, ...], Tensor]]:
        """(name, rows that are checked, shape of the result, its checked rows in fp64) for each result."""
        tensors = self._draw(torch.device("cpu"))
        return [self._share_of_truth(*product) for product in _TRUTHS[self.case.operator](self, *tensors)]

    def shard(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of a global tensor."""
        return tensor.tensor_split(self.world, dim)[self.rank].contiguous()

    # -- tensors ------------------------------------------------------------------------------------------------

    def _draw(self, device: torch.device) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Global X, W and dY for each projection, equal on all ranks; of the size of a trained layer's."""
        case, world = self.case, self.world
        inner = case.inner * (world if case.operator == "linear_reduce_scatter" else 1)
        outer = [n * (world if case.operator == "all_gather_linear" else 1) for n in case.outer]
        generator = torch.Generator().manual_seed(self._seed)

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return torch.randn(rows, columns, generator=generator).mul_(scale).to(device, self._dtype)

        x = normal(case.tokens, inner)
        weights = [normal(n, inner, inner**-0.5) for n in outer]
        return x, weights, [normal(case.tokens, n) for n in outer]

    def _share_of_truth(self, name: str, rows_of: Tensor, other: Tensor) -> tuple[str, Tensor, tuple[int, ...], Tensor]:
        """``rows_of @ other`` in fp64, for rows drawn at random if all would take too long."""
        rows, columns = rows_of.shape[0], other.shape[1]
        affordable = max(1, int(_TRUTH_FLOPS / (2 * other.shape[0] * columns)))
        generator = torch.Generator().manual_seed(self._seed)
        checked = torch.randperm(rows, generator=generator)[:affordable].sort().values
        return name, checked, (rows, columns), rows_of[checked].double() @ other.double()

    # -- what is timed --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _products(self) -> tuple[Tensor, ...]:
        """The operator's matrix products alone, each as one torch.mm on operands that are already there."""
        local = self._local
        outputs = [torch.mm(local.x_product, w.t()) for w in local.weights_product]
        if not self.case.backward:
            return tuple(outputs)
        dx = torch.mm(local.grads_product[0], local.weights_product[0])
        for grad, weight in zip(local.grads_product[1:], local.weights_product[1:], strict=True):
            dx.addmm_(grad, weight)
        return (*outputs, dx, *(torch.mm(grad.t(), local.x_product) for grad in local.grads_product))

    @torch.no_grad()
    def _communicate(self, transport: str) -> tuple[Tensor, ...]:
        """The same bytes as the operator with ``gathered="regather"``, and nothing else."""
        local, config = self._local, OverlapConfig(mode="unfused", transport=transport)
        gather = functools.partial(functional.all_gather, operator="benchmark", config=config)
        scatter = functools.partial(functional.reduce_scatter, operator="benchmark", config=config)
        group = None
        if self.case.operator == "all_gather_linear":
            done = [gather(local.x, group)]
            if self.case.backward:
                done += [gather(local.x, group), scatter(local.x_product, group)]
        elif self.case.operator == "linear_reduce_scatter":
            done = [scatter(local.grads_product[0], group)]  # of the partial output's shape
            if self.case.backward:
                done.append(gather(local.grads[0], group))
        else:
            done = [gather(local.weights[0], group)]
            if self.case.backward:
                done += [gather(local.weights[0], group), scatter(local.weights_product[0], group)]
        return tuple(done)


_Global = tuple[Tensor, list[Tensor], list[Tensor]]


def _all_gather_linear(work: Workload, drawn: _Global) -> _Tensors:
    x, weights, grads = drawn
    mine = [work.shard(w) for w in weights]
    grads = [work.shard(g, dim=1) for g in grads]
    return _tensors(work.shard(x), mine, grads, x, mine, grads)


def _linear_reduce_scatter(work: Workload, drawn: _Global) -> _Tensors:
    x, (weight,), (grad,) = drawn
    x, mine = work.shard(x, dim=1), [work.shard(weight, dim=1)]
    return _tensors(x, mine, [work.shard(grad)], x, mine, [grad])


def _zero3_linear(work: Workload, drawn: _Global) -> _Tensors:
    x, (weight,), (grad,) = drawn
    x, grads = work.shard(x), [work.shard(grad)]
    return _tensors(x, [work.shard(weight)], grads, x, [weight], grads)


def _tensors(
    x: Tensor,
    weights: list[Tensor],
    grads: list[Tensor],
    x_product: Tensor,
    weights_product: list[Tensor],
    grads_product: list[Tensor],
) -> _Tensors:
    """Gives the leaves their own graph nodes, so that products alone run on tensors that need no gradient."""
    leaf = x.detach().requires_grad_()
    leaves = [w.detach().requires_grad_() for w in weights]
    return _Tensors(leaf, leaves, grads, x_product.detach(), [w.detach() for w in weights_product], grads_product)


_Products = list[tuple[str, Tensor, Tensor]]


def _names(kind: str, count: int) -> list[str]:
    return [kind] if count == 1 else [f"{kind} {index}" for index in range(count)]


def _truth_all_gather_linear(work: Workload, x: Tensor, weights: list[Tensor], grads: list[Tensor]) -> _Products:
    products = [(name, x, work.shard(w).t()) for name, w in zip(_names("output", len(weights)), weights, strict=True)]
    if work.case.backward:
        products.append(("input gradient", work.shard(torch.cat(grads, 1)), torch.cat(weights)))
        names = _names("weight gradient", len(weights))
        products += [(name, work.shard(g, dim=1).t(), x) for name, g in zip(names, grads, strict=True)]
    return products


def _truth_linear_reduce_scatter(work: Workload, x: Tensor, weights: list[Tensor], grads: list[Tensor]) -> _Products:
    products = [("output", work.shard(x), weights[0].t())]
    if work.case.backward:
        products.append(("input gradient", grads[0], work.shard(weights[0], dim=1)))
        products.append(("weight gradient", grads[0].t(), work.shard(x, dim=1)))
    return products


def _truth_zero3_linear(work: Workload, x: Tensor, weights: list[Tensor], grads: list[Tensor]) -> _Products:
    products = [("output", work.shard(x), weights[0].t())]
    if work.case.backward:
        products.append(("input gradient", work.shard(grads[0]), weights[0]))
        products.append(("weight gradient", work.shard(grads[0], dim=1).t(), x))
    return products


_LAYOUTS = {
    "all_gather_linear": _all_gather_linear,
    "linear_reduce_scatter": _linear_reduce_scatter,
    "zero3_linear": _zero3_linear,
}
_TRUTHS = {
    "all_gather_linear": _truth_all_gather_linear,
    "linear_reduce_scatter": _truth_linear_reduce_scatter,
    "zero3_linear": _truth_zero3_linear,
}
