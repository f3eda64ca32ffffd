"""What ranks run in the operator tests: one operator against its own mathematics in fp64 on unsharded data.

Every rank makes the same global tensors from a seed, takes its shards, and knows the whole truth; what a rank gets is
compared on that rank.  Uninitialised memory is NaN throughout, shared windows included.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.testing.compare import assert_close_to_truth, nan_empty

MODES = ("fused", "unfused")
Outputs = dict[str, Tensor]


@dataclasses.dataclass
class Problem:
    """Sizes of one case; ``rows`` is what one rank holds of the cut dimension."""

    before: tuple[int, ...] = (2,)
    rows: int = 12
    inner: tuple[int, ...] = ()
    features: int = 24
    outputs: tuple[int, ...] = (16,)
    bias: bool = True
    contiguous: bool = True
    seed: int = 0

    @property
    def dim(self) -> int:
        return len(self.before)


def poison_windows() -> None:
    """Fills this rank's reserved shared memory with NaN, whatever type is read from it."""
    transport = group_transports(dist.group.WORLD)._symmetric
    if transport is not None and not transport.broken:
        dist.barrier()
        for window, nbytes in enumerate(transport._windows.backed):
            if nbytes:
                transport._windows.raw(transport.rank, window)[:nbytes].fill_(0xFF)
        dist.barrier()


def leaf(tensor: Tensor, contiguous: bool = True) -> Tensor:
    """A leaf that requires gradients; not contiguous if asked, with the same values."""
    copy = tensor.detach().clone()
    if not contiguous:
        wide = copy.new_zeros(*copy.shape[:-1], copy.shape[-1] + 3)
        wide[..., : copy.shape[-1]] = copy
        copy = wide[..., : copy.shape[-1]]
    return copy.requires_grad_()


def shard(tensor: Tensor, dim: int, rank: int, world: int) -> Tensor:
    return tensor.chunk(world, dim)[rank]


def _random(problem: Problem, world: int, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(problem.seed + 1000 * world)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return make


def check_all_gather_linear(
    rank: int, world: int, problem: Problem, dtype: torch.dtype, config: ody.OverlapConfig
) -> None:
    """Output and all gradients; with several weights a tuple is passed."""
    make = _random(problem, world, dtype)
    length = problem.rows * world
    x = make(*problem.before, length, *problem.inner, problem.features)
    weights = [make(world * n, problem.features) for n in problem.outputs]
    biases = [make(world * n) if problem.bias else None for n in problem.outputs]
    grads = [make(*problem.before, length, *problem.inner, world * n) for n in problem.outputs]

    wide = [t.double().requires_grad_() for t in (x, *weights, *(b for b in biases if b is not None))]
    wide_biases = wide[1 + len(weights) :] if problem.bias else [None] * len(weights)
    truth = [torch.nn.functional.linear(wide[0], w, b) for w, b in zip(wide[1:], wide_biases, strict=False)]
    torch.autograd.backward(truth, [g.double() for g in grads])

    def run(config: ody.OverlapConfig) -> Outputs:
        own_x = leaf(shard(x, problem.dim, rank, world), problem.contiguous)
        own_w = [leaf(shard(w, 0, rank, world), problem.contiguous) for w in weights]
        own_b = [None if b is None else leaf(shard(b, 0, rank, world)) for b in biases]
        with nan_empty():
            if len(own_w) == 1:
                ys = (ody.all_gather_linear(own_x, own_w[0], own_b[0], group=None, dim=problem.dim, config=config),)
            else:
                ys = ody.all_gather_linear(own_x, own_w, own_b, group=None, dim=problem.dim, config=config)
            torch.autograd.backward(ys, [shard(g, -1, rank, world) for g in grads])
        results = {f"output {i}": y for i, y in enumerate(ys)} | {"input gradient": own_x.grad}
        results |= {f"weight gradient {i}": w.grad for i, w in enumerate(own_w)}
        return results | {f"bias gradient {i}": b.grad for i, b in enumerate(own_b) if b is not None}

    truths = {f"output {i}": shard(y, -1, rank, world) for i, y in enumerate(truth)}
    truths["input gradient"] = shard(wide[0].grad, problem.dim, rank, world)
    truths |= {f"weight gradient {i}": shard(wide[1 + i].grad, 0, rank, world) for i in range(len(weights))}
    if problem.bias:
        truths |= {f"bias gradient {i}": shard(b.grad, 0, rank, world) for i, b in enumerate(wide_biases)}
    _compare(run, truths, dtype, config, problem, world, f"all_gather_linear, {config}, {problem}")


def check_linear_reduce_scatter(
    rank: int, world: int, problem: Problem, dtype: torch.dtype, config: ody.OverlapConfig
) -> None:
    make = _random(problem, world, dtype)
    n = problem.outputs[0]
    x = make(*problem.before, problem.rows * world, *problem.inner, world * problem.features)
    weight, bias = make(n, world * problem.features), make(n) if problem.bias else None
    grad = make(*problem.before, problem.rows * world, *problem.inner, n)

    wide = [t.double().requires_grad_() for t in (x, weight, *((bias,) if bias is not None else ()))]
    truth = torch.nn.functional.linear(*wide)
    truth.backward(grad.double())

    def run(config: ody.OverlapConfig) -> Outputs:
        own_x = leaf(shard(x, -1, rank, world), problem.contiguous)
        own_w = leaf(shard(weight, 1, rank, world), problem.contiguous)
        own_b = None if bias is None else leaf(bias)
        with nan_empty():
            y = ody.linear_reduce_scatter(own_x, own_w, own_b, group=None, dim=problem.dim, config=config)
            y.backward(shard(grad, problem.dim, rank, world))
        results = {"output": y, "input gradient": own_x.grad, "weight gradient": own_w.grad}
        return results if own_b is None else results | {"bias gradient": own_b.grad}

    truths = {
        "output": shard(truth, problem.dim, rank, world),
        "input gradient": shard(wide[0].grad, -1, rank, world),
        "weight gradient": shard(wide[1].grad, 1, rank, world),
    }
    if bias is not None:
        truths["bias gradient"] = wide[2].grad  # replicated: complete on every rank
    _compare(run, truths, dtype, config, problem, world, f"linear_reduce_scatter, {config}, {problem}")


def check_zero3_linear(rank: int, world: int, problem: Problem, dtype: torch.dtype, config: ody.OverlapConfig) -> None:
    make = _random(problem, world, dtype)
    n = problem.outputs[0]
    x = make(*problem.before, problem.rows * world, *problem.inner, problem.features)
    weight, bias = make(world * n, problem.features), make(world * n) if problem.bias else None
    grad = make(*problem.before, problem.rows * world, *problem.inner, world * n)

    wide = [t.double().requires_grad_() for t in (x, weight, *((bias,) if bias is not None else ()))]
    truth = torch.nn.functional.linear(*wide)
    truth.backward(grad.double())

    def run(config: ody.OverlapConfig) -> Outputs:
        own_x = leaf(shard(x, problem.dim, rank, world), problem.contiguous)
        own_w = leaf(shard(weight, 0, rank, world), problem.contiguous)
        own_b = None if bias is None else leaf(shard(bias, 0, rank, world))
        with nan_empty():
            # What is sent ahead is the same shard in backward, and one that nobody uses in forward.
            y = ody.ops.zero3_linear(
                own_x,
                own_w,
                own_b,
                group=None,
                config=config,
                prefetch=own_w[:2].contiguous(),
                prefetch_backward=own_w,
            )
            y.backward(shard(grad, problem.dim, rank, world))
        results = {"output": y, "input gradient": own_x.grad, "weight gradient": own_w.grad}
        return results if own_b is None else results | {"bias gradient": own_b.grad}

    truths = {
        "output": shard(truth, problem.dim, rank, world),
        "input gradient": shard(wide[0].grad, problem.dim, rank, world),
        "weight gradient": shard(wide[1].grad, 0, rank, world),
    }
    if bias is not None:
        truths["bias gradient"] = shard(wide[2].grad, 0, rank, world)
    _compare(run, truths, dtype, config, problem, world, f"zero3_linear, {config}, {problem}")


def _compare(
    run: Any, truths: Outputs, dtype: torch.dtype, config: ody.OverlapConfig, problem: Problem, world: int, name: str
) -> None:
    # Longest sum of any result: the weight gradient's, over all tokens; the products' are shorter.
    tokens = torch.Size(problem.before).numel() * problem.rows * world * torch.Size(problem.inner).numel()
    # At least 64: the error of a few terms is no random walk, and a handful of elements can cancel.
    terms = max(64, tokens, world * problem.features, world * sum(problem.outputs))
    # In 16 bits a value is rounded as a partial result, once for each weight of a tuple, and once at the end.
    roundings = 2 + len(problem.outputs)
    # The contract for 16 bits is relative to the unfused result; fp32 and fp64 answer to rounding alone.
    compared = config.mode == "fused" and dtype.itemsize == 2
    unfused = run(dataclasses.replace(config, mode="unfused")) if compared else None
    poison_windows()
    actual = run(config)
    assert set(actual) == set(truths)
    for what, result in actual.items():
        # Small samples: the 1.5 of the contract is a ratio of norms, which a few dozen elements do not settle.
        baseline = unfused[what] if unfused is not None and result.numel() >= 256 else None
        assert_close_to_truth(
            result,
            truths[what],
            dtype=dtype,
            terms=terms,
            roundings=roundings,
            baseline=baseline,
            name=f"{what} of {name}",
        )


CHECKS = {
    "all_gather_linear": check_all_gather_linear,
    "linear_reduce_scatter": check_linear_reduce_scatter,
    "zero3_linear": check_zero3_linear,
}


def check(
    rank: int,
    world: int,
    operator: str,
    dtype: str,
    transport: str,
    problem: dict[str, Any],
    chunks: tuple[int | str, ...] = ("auto",),
    gathered: tuple[str, ...] = ("regather", "save"),
) -> None:
    """One operator in every mode, choice of what is kept, and number of pieces."""
    for mode, kept, pieces in itertools.product(MODES, gathered, chunks):
        config = ody.OverlapConfig(mode=mode, transport=transport, gathered=kept, chunks_per_rank=pieces, timeout_s=30)
        CHECKS[operator](rank, world, Problem(**problem), getattr(torch, dtype), config)


def bias_gradients(rank: int, world: int, dtype: str, transport: str, before: tuple[int, ...]) -> list[Tensor]:
    """Gradients of linear_reduce_scatter's bias on this rank, for every mode and several numbers of pieces."""
    found = []
    for mode, pieces in (("unfused", "auto"), ("fused", 1), ("fused", 3), ("fused", 7)):
        config = ody.OverlapConfig(mode=mode, transport=transport, chunks_per_rank=pieces, timeout_s=30)  # type: ignore[arg-type]
        torch.manual_seed(3)
        kind = getattr(torch, dtype)
        weight, bias = torch.randn(17, 8, dtype=kind), leaf(torch.randn(17, dtype=kind))
        x, grad = torch.randn(*before, 150 * world, 8, dtype=kind), torch.randn(*before, 150 * world, 17, dtype=kind)
        y = ody.linear_reduce_scatter(x, weight, bias, group=None, config=config)
        y.backward(shard(grad, -2, rank, world))
        assert bias.grad is not None
        found.append(bias.grad)
    return found
