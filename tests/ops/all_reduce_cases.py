"""What ranks run in the tests of tensor parallelism's operators: against fp64 on unsharded data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from operator_cases import MODES, Outputs, leaf, poison_windows, shard
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm.functional import all_reduce
from odysseus_kernels.ops import reference
from odysseus_kernels.testing.compare import assert_close_to_truth, nan_empty


@dataclasses.dataclass
class Problem:
    """Sizes of one case: x [*before, features of all ranks]."""

    before: tuple[int, ...] = (2, 9)
    features: int = 16  # of each rank
    outputs: tuple[int, ...] = (24, 8)
    bias: bool = True
    contiguous: bool = True
    seed: int = 0


def _compare(
    run: Callable[[ody.OverlapConfig], Outputs], truths: Outputs, dtype: torch.dtype, config: ody.OverlapConfig,
    problem: Problem, world: int, equal: str,
) -> None:  # fmt: skip
    # The longest sum: of a weight gradient over all rows, of an output over all ranks' features.
    terms = max(64, torch.Size(problem.before).numel(), world * problem.features, world * sum(problem.outputs))
    compared = config.mode == "fused" and dtype.itemsize == 2
    unfused = run(dataclasses.replace(config, mode="unfused")) if compared else None
    poison_windows()
    actual = run(config)
    assert set(actual) == set(truths)
    for what, result in actual.items():
        # As in operator_cases: a ratio of norms of a few dozen elements says nothing.
        baseline = unfused[what] if unfused is not None and result.numel() >= 256 else None
        assert_close_to_truth(
            result,
            truths[what],
            dtype=dtype,
            terms=terms,
            roundings=2 + len(problem.outputs),
            baseline=baseline,
            name=f"{what}, {config}, {problem}",
        )
    # What is summed over the ranks has the same bits on all of them.
    mine = actual[equal].detach().contiguous().view(torch.uint8)
    everyone = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(everyone, mine)
    assert all(torch.equal(one, mine) for one in everyone)


def check_linear_all_reduce(
    rank: int, world: int, problem: Problem, dtype: torch.dtype, config: ody.OverlapConfig, function: Any = None
) -> None:
    generator = torch.Generator().manual_seed(problem.seed + 1000 * world)
    n, k = problem.outputs[0], world * problem.features
    shapes = [(*problem.before, k), (n, k), *([(n,)] if problem.bias else [])]
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    grad = torch.randn(*problem.before, n, generator=generator, dtype=torch.float64).to(dtype)
    wide = [tensor.double().requires_grad_() for tensor in tensors]
    truth = torch.nn.functional.linear(*wide)
    truth.backward(grad.double())

    def run(config: ody.OverlapConfig) -> Outputs:
        own = [leaf(shard(tensor, -1, rank, world), problem.contiguous) for tensor in tensors[:2]]
        own += [leaf(tensor) for tensor in tensors[2:]]
        with nan_empty():
            operator = function or functools.partial(ody.linear_all_reduce, config=config)
            y = operator(*own, group=None)
            y.backward(grad)
        return {"output": y} | {f"gradient {i}": tensor.grad for i, tensor in enumerate(own)}

    truths = {"output": truth} | {f"gradient {i}": shard(t.grad, -1, rank, world) for i, t in enumerate(wide[:2])}
    truths |= {f"gradient {2 + i}": tensor.grad for i, tensor in enumerate(wide[2:])}
    _compare(run, truths, dtype, config, problem, world, "output")


def check_column_parallel_linear(
    rank: int, world: int, problem: Problem, dtype: torch.dtype, config: ody.OverlapConfig, function: Any = None
) -> None:
    generator = torch.Generator().manual_seed(problem.seed + 1000 * world)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = make(*problem.before, problem.features)
    weights = [make(world * n, problem.features) for n in problem.outputs]
    biases = [make(world * n) if problem.bias else None for n in problem.outputs]
    grads = [make(*problem.before, world * n) for n in problem.outputs]
    wide = [t.double().requires_grad_() for t in (x, *weights, *(b for b in biases if b is not None))]
    count = len(weights)
    wide_biases = wide[1 + count :] if problem.bias else [None] * count
    truth = [torch.nn.functional.linear(wide[0], w, b) for w, b in zip(wide[1:], wide_biases, strict=False)]
    torch.autograd.backward(truth, [grad.double() for grad in grads])

    def run(config: ody.OverlapConfig) -> Outputs:
        own_x = leaf(x, problem.contiguous)
        own_w = [leaf(shard(w, 0, rank, world), problem.contiguous) for w in weights]
        own_b = [None if b is None else leaf(shard(b, 0, rank, world)) for b in biases]
        with nan_empty():
            operator = function or functools.partial(ody.column_parallel_linear, config=config)
            ys = operator(own_x, own_w, own_b, group=None)
            torch.autograd.backward(ys, [shard(grad, -1, rank, world) for grad in grads])
        results = {f"output {i}": y for i, y in enumerate(ys)} | {"input gradient": own_x.grad}
        results |= {f"weight gradient {i}": w.grad for i, w in enumerate(own_w)}
        return results | {f"bias gradient {i}": b.grad for i, b in enumerate(own_b) if b is not None}

    truths = {f"output {i}": shard(y, -1, rank, world) for i, y in enumerate(truth)}
    truths["input gradient"] = wide[0].grad
    truths |= {f"weight gradient {i}": shard(w.grad, 0, rank, world) for i, w in enumerate(wide[1 : 1 + count])}
    truths |= {f"bias gradient {i}": shard(b.grad, 0, rank, world) for i, b in enumerate(wide_biases) if b is not None}
    _compare(run, truths, dtype, config, problem, world, "input gradient")


CHECKS = {"linear_all_reduce": check_linear_all_reduce, "column_parallel_linear": check_column_parallel_linear}


def check(
    rank: int, world: int, operator: str, dtype: str, transport: str, problem: dict[str, Any],
    chunks: tuple[int | str, ...] = ("auto",),
) -> None:  # fmt: skip
    for mode in MODES:
        for pieces in chunks:
            config = ody.OverlapConfig(mode=mode, transport=transport, chunks_per_rank=pieces, timeout_s=30)
            CHECKS[operator](rank, world, Problem(**problem), getattr(torch, dtype), config)


def check_references(rank: int, world: int) -> None:
    for operator, function in CHECKS.items():
        twin = getattr(reference, f"{operator}_reference")
        function(rank, world, Problem(), torch.float64, ody.OverlapConfig(), twin)


def traffic(rank: int, world: int, mode: str, transport: str, dtype: str, rows: int, pieces: int) -> dict[str, int]:
    """Bytes of both operators: x [2, rows, 24], 10 outputs."""
    kind = getattr(torch, dtype)
    config = ody.OverlapConfig(mode=mode, transport=transport, chunks_per_rank=pieces, timeout_s=30)
    x, w = torch.randn(2, rows, 24, dtype=kind, requires_grad=True), torch.randn(10, 24, dtype=kind, requires_grad=True)
    with ody.CommRecorder() as record:
        ody.linear_all_reduce(x, w, group=None, config=config).sum().backward()
        ys = ody.column_parallel_linear(x, (w, w[:3]), group=None, config=config)
        torch.cat(ys, -1).sum().backward()
    assert all(row["transport"] == transport for row in record.rows())
    return {f"{row['operator']} {row['phase']} {row['collective']}": int(row["bytes"]) for row in record.rows()}


def calls(rank: int, world: int, mode: str, transport: str, pieces: int) -> list[tuple[str, int]]:
    """(operator and phase, calls) of an all-reduce of each kind."""
    config = ody.OverlapConfig(mode=mode, transport=transport, chunks_per_rank=pieces, timeout_s=30)
    x, w = torch.randn(2, 12, 24, requires_grad=True), torch.randn(10, 24, requires_grad=True)
    with ody.CommRecorder() as record:
        all_reduce(torch.ones(5), config=config)
        ody.linear_all_reduce(x, w, group=None, config=config)
        ody.column_parallel_linear(x, w, group=None, config=config).sum().backward()
    assert {row["collective"] for row in record.rows()} == {"all_reduce"}
    return [(f"{row['operator']} {row['phase']}", int(row["calls"])) for row in record.rows()]


def _mlp(config: ody.OverlapConfig) -> Callable[..., Tensor]:
    def run(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor, last: Tensor) -> Tensor:
        a, b = ody.column_parallel_linear(x, (gate, up), (bias, None), group=None, config=config)
        return ody.linear_all_reduce(a.sin() * b, down, last, group=None, config=config).cos()

    return run


def _inputs() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 3, 8), (6, 8), (6, 8), (8, 6), (6,), (8,))
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


def some_gradients(rank: int, world: int) -> None:
    """Whatever subset of inputs wants gradients, those are right and the others stay None."""
    function, inputs = _mlp(ody.OverlapConfig(timeout_s=30)), _inputs()
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    for mask in range(1, 2 ** len(inputs), 3):
        leaves = [tensor.detach().clone().requires_grad_(bool(mask >> i & 1)) for i, tensor in enumerate(inputs)]
        function(*leaves).square().sum().backward()
        for one, gradient in zip(leaves, expected, strict=True):
            if one.requires_grad:
                torch.testing.assert_close(one.grad, gradient, rtol=1e-5, atol=1e-5)
            else:
                assert one.grad is None


def no_rows(rank: int, world: int) -> None:
    """An empty batch sends nothing and has zero gradients."""
    x, w = torch.randn(2, 0, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    assert ody.linear_all_reduce(x, w, group=None).shape == (2, 0, 6)
    y = ody.column_parallel_linear(x, w, group=None)
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == (2, 0, 6) and dx.shape == x.shape and not dw.any()


def messages(rank: int, world: int) -> dict[str, str]:
    from input_cases import _message

    x, w = torch.randn(2, 4, 8), torch.randn(6, 8)
    row, column = ody.linear_all_reduce, ody.column_parallel_linear
    tiles = ody.OverlapConfig(mode="tiles")
    return {
        "row inner": _message(lambda: row(x, torch.randn(6, 7), group=None)),
        "row bias": _message(lambda: row(x, w, torch.randn(5), group=None)),
        "row dtype": _message(lambda: row(x, w.double(), group=None)),
        "row tiles": _message(lambda: row(x, w, group=None, config=tiles)),
        "column inner": _message(lambda: column(x, (w, torch.randn(6, 7)), group=None)),
        "column biases": _message(lambda: column(x, (w, w), (None,), group=None)),
        "column tiles": _message(lambda: column(x, w, group=None, config=tiles)),
    }


def opcheck(rank: int, world: int) -> None:
    name, key = dist.group.WORLD.group_name, ody.OverlapConfig(timeout_s=30).key()
    x, gate, up, _, bias, _ = _inputs()
    torch.library.opcheck(torch.ops.odysseus.linear_all_reduce.default, (x, gate, bias, name, key))
    arguments = (x, [gate, up], [bias], [True, False], name, key)
    torch.library.opcheck(torch.ops.odysseus.column_parallel_linear.default, arguments)


def compiled(rank: int, world: int) -> None:
    function, inputs = _mlp(ody.OverlapConfig(timeout_s=60)), _inputs()

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(*inputs)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]

    expected = results(function)
    for one, other in zip(results(torch.compile(function, fullgraph=True, backend="aot_eager")), expected, strict=True):
        # The compiler may reorder the elementwise part: rounding in fp32, on sums of a few dozen terms.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
