"""What ranks run in the tests of the losses with a distributed head: against F.cross_entropy in fp64 on unsharded data.

Every rank makes the same global tensors from a seed, takes its part, and knows the whole truth.  Uninitialised memory
is NaN throughout.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from operator_cases import leaf, poison_windows
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import odysseus_kernels as ody
from benchmarks.common.memory import peak_of_others, record_allocations
from odysseus_kernels.ops import vocab_parallel_linear_cross_entropy, zero3_linear_cross_entropy
from odysseus_kernels.testing.compare import nan_empty, relative_error, unit_roundoff

IGNORE = -100
KINDS = ("zero3", "sharded", "replicated")


@dataclasses.dataclass
class Problem:
    """Sizes of one case: ``rows`` of rank r are ``rows[r % len(rows)]``; ``vocabulary`` rows of each rank."""

    rows: tuple[int, ...] = (13,)
    features: int = 24
    vocabulary: int = 20
    bias: bool = True
    valid: float = 0.7
    silent_rank: int | None = None
    contiguous: bool = True
    ignore_index: int = IGNORE

    def of(self, rank: int) -> int:
        return self.rows[rank % len(self.rows)]


@dataclasses.dataclass
class Data:
    hidden: Tensor
    targets: Tensor
    weight: Tensor
    bias: Tensor | None
    grads: Tensor


def make_data(problem: Problem, world: int, dtype: torch.dtype) -> Data:
    generator = torch.Generator().manual_seed(17 + world)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = sum(problem.of(rank) for rank in range(world))
    vocabulary = world * problem.vocabulary
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) >= problem.valid] = problem.ignore_index
    if problem.silent_rank is not None:
        first = sum(problem.of(rank) for rank in range(problem.silent_rank))
        targets[first : first + problem.of(problem.silent_rank)] = problem.ignore_index
    hidden, weight = make(rows, problem.features), make(vocabulary, problem.features) / math.sqrt(problem.features)
    bias = make(vocabulary).to(dtype) if problem.bias else None
    return Data(hidden.to(dtype), targets, weight.to(dtype), bias, make(world))


def unsharded(
    data: Data, problem: Problem, world: int, kind: str, dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Tensor], float]:
    """Each rank's value, gradients of the sum of grad times value, and the largest logit; computed in ``dtype``."""
    leaves = {"hidden": data.hidden, "weight": data.weight} | ({} if data.bias is None else {"bias": data.bias})
    leaves = {name: tensor.detach().to(dtype, copy=True).requires_grad_() for name, tensor in leaves.items()}
    logits = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    wide = logits if dtype == torch.float64 else logits.float()
    each = F.cross_entropy(wide, data.targets, reduction="none", ignore_index=problem.ignore_index)
    if kind == "replicated":
        values = [each.sum()] * world
        (data.grads[0] * values[0]).backward()
    else:
        values = [part.sum() for part in each.split([problem.of(rank) for rank in range(world)])]
        sum(grad * value for grad, value in zip(data.grads, values, strict=True)).backward()
    return values, {name: tensor.grad for name, tensor in leaves.items()}, logits.abs().max().item()


def run_kind(
    kind: str, data: Data, problem: Problem, rank: int, world: int, config: ody.OverlapConfig, chunk_rows: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's value and gradients."""
    first = sum(problem.of(other) for other in range(rank))
    part = slice(None) if kind == "replicated" else slice(first, first + problem.of(rank))
    columns = slice(rank * problem.vocabulary, (rank + 1) * problem.vocabulary)
    leaves = {"hidden": leaf(data.hidden[part], problem.contiguous)}
    leaves["weight"] = leaf(data.weight[columns], problem.contiguous)
    if data.bias is not None:
        leaves["bias"] = leaf(data.bias[columns])
    settings: dict[str, Any] = {"ignore_index": problem.ignore_index, "chunk_rows": chunk_rows, "config": config}
    arguments = (leaves["hidden"], data.targets[part], leaves["weight"], leaves.get("bias"))
    with nan_empty():
        if kind == "zero3":
            value = zero3_linear_cross_entropy(*arguments, group=None, **settings)
        else:
            value = vocab_parallel_linear_cross_entropy(*arguments, group=None, tokens=kind, **settings)
        value.backward(data.grads[0 if kind == "replicated" else rank].to(value.dtype))
    return value.detach(), {name: tensor.grad for name, tensor in leaves.items()}


def own_part(name: str, tensor: Tensor, kind: str, problem: Problem, rank: int) -> Tensor:
    if name == "hidden":
        first = sum(problem.of(other) for other in range(rank))
        return tensor if kind == "replicated" else tensor[first : first + problem.of(rank)]
    return tensor[rank * problem.vocabulary : (rank + 1) * problem.vocabulary]


def check_once(
    rank: int, world: int, kind: str, problem: Problem, dtype: torch.dtype, config: ody.OverlapConfig, chunk_rows: int
) -> None:
    data = make_data(problem, world, dtype)
    values, truths, largest = unsharded(data, problem, world, kind, torch.float64)
    poison_windows()
    value, gradients = run_kind(kind, data, problem, rank, world, config, chunk_rows)
    name = f"{kind}, {problem}, {config}, chunk_rows={chunk_rows}"

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # A logit is a sum of d products: off by u * sqrt(d) of its size, a random walk, four times that allowed; an error
    # of a logit is one of its row's loss and a relative one of its row's probabilities.  Sums over rows, vocabulary
    # and ranks add as many terms.
    terms = max(64, data.hidden.shape[0], data.weight.shape[0], problem.features)
    tolerance = 4 * unit_roundoff(wide) * math.sqrt(terms) * (1 + largest)
    if dtype != wide:
        # In 16 bits logits are rounded to u of their size (the logit's and the logsumexp's error add), dlogits once,
        # what each rank makes once, and the result once.
        tolerance += unit_roundoff(dtype) * (2 * largest + 3)
    assert value.dtype == wide, name
    valid = int((data.targets != problem.ignore_index).sum())
    assert abs(value.item() - values[rank].item()) <= tolerance * max(1, valid), name

    baseline = unsharded(data, problem, world, kind, dtype)[1] if dtype != wide else {}
    assert set(gradients) == set(truths)
    for what, gradient in gradients.items():
        truth = own_part(what, truths[what], kind, problem, rank)
        assert gradient.dtype == dtype and gradient.shape == truth.shape, name
        error = relative_error(gradient, truth)
        assert error <= tolerance, f"{what} of {name}: {error:.2e} above {tolerance:.2e}"
        if what in baseline and gradient.numel() >= 256:
            # Partial results of ranks travel in 16 bits, a rounding (about u/2 in the mean) that one process lacks.
            limit = 1.5 * relative_error(own_part(what, baseline[what], kind, problem, rank), truth)
            limit += unit_roundoff(dtype) / 2
            assert error <= limit, f"{what} of {name}: {error:.2e}, the single process's allows {limit:.2e}"
    if valid == 0:
        assert value.item() == 0.0
        assert not any(gradient.any() for gradient in gradients.values())


def check(
    rank: int,
    world: int,
    kind: str,
    dtype: str,
    problems: list[dict[str, Any]],
    transports: tuple[str, ...] = ("symmetric", "collective"),
    modes: tuple[str, ...] = ("fused", "unfused"),
    chunks: tuple[int, ...] = (5,),
) -> None:
    for arguments, transport, mode, chunk_rows in itertools.product(problems, transports, modes, chunks):
        config = ody.OverlapConfig(mode=mode, transport=transport, timeout_s=30)  # type: ignore[arg-type]
        check_once(rank, world, kind, Problem(**arguments), getattr(torch, dtype), config, chunk_rows)


def traffic(rank: int, world: int, kind: str, transport: str, mode: str, dtype: str, bias: bool) -> dict[str, int]:
    """Bytes by phase and collective."""
    config = ody.OverlapConfig(mode=mode, transport=transport, timeout_s=30)  # type: ignore[arg-type]
    problem = Problem(bias=bias)
    data = make_data(problem, world, getattr(torch, dtype))
    with ody.CommRecorder() as record:
        run_kind(kind, data, problem, rank, world, config, 5)
    name = "zero3_linear_cross_entropy" if kind == "zero3" else "vocab_parallel_linear_cross_entropy"
    assert all(row["operator"] == name and row["transport"] == transport for row in record.rows())
    return {f"{row['phase']} {row['collective']}": int(row["bytes"]) for row in record.rows()}


def largest_allocation(rank: int, world: int, kind: str, dtype: str) -> tuple[int, int, int, int]:
    """Bytes of the largest allocation; of a chunk's logits, of the gathered operand, and of logits [R, V/N].

    A chunk's are what torch's own product with them allocates, where that is more: on some CPUs it copies them.
    Many rows and a large vocabulary of few features, so that logits would be larger than anything else.
    """
    problem = Problem(rows=(1024,), features=8, vocabulary=512, bias=False)
    config = ody.OverlapConfig(transport="symmetric", timeout_s=60)
    data = make_data(problem, world, getattr(torch, dtype))
    chunk_rows = 32
    run_kind(kind, data, problem, rank, world, config, chunk_rows)
    _, events = record_allocations(lambda: [run_kind(kind, data, problem, rank, world, config, chunk_rows)[0]])
    _, largest = peak_of_others(events, set())
    wide = 8 if dtype == "float64" else 4
    gathered = max(data.hidden.numel(), data.weight.numel()) * wide
    logits = torch.ones(chunk_rows, problem.vocabulary, dtype=getattr(torch, dtype))
    weight = torch.ones(problem.vocabulary, problem.features, dtype=logits.dtype)
    _, of_product = peak_of_others(record_allocations(lambda: [logits @ weight])[1], set())
    chunk = max(chunk_rows * problem.vocabulary * wide, of_product)
    return largest, chunk, gathered, 1024 * problem.vocabulary * wide


def subsets_of_gradients(rank: int, world: int, kind: str) -> None:
    """Whatever subset of inputs wants gradients, those are right and the others stay None."""
    config = ody.OverlapConfig(timeout_s=30)
    problem = Problem()
    data = make_data(problem, world, torch.float64)
    _, expected = run_kind(kind, data, problem, rank, world, config, 5)
    names = list(expected)
    for mask in itertools.product((False, True), repeat=len(names)):
        if any(mask):
            leaves = _leaves(kind, data, problem, rank, mask)
            _loss(kind, problem, config)(*leaves, _own_targets(kind, data, problem, rank)).backward(
                data.grads[0 if kind == "replicated" else rank]
            )
            for name, tensor, wanted in zip(names, leaves, mask, strict=True):
                if wanted:
                    torch.testing.assert_close(tensor.grad, expected[name], rtol=1e-12, atol=1e-12)
                else:
                    assert tensor.grad is None


def _own_targets(kind: str, data: Data, problem: Problem, rank: int) -> Tensor:
    return own_part("hidden", data.targets, kind, problem, rank)


def _leaves(kind: str, data: Data, problem: Problem, rank: int, wanted: tuple[bool, ...]) -> list[Tensor]:
    assert data.bias is not None
    tensors = {"hidden": data.hidden, "weight": data.weight, "bias": data.bias}
    return [
        own_part(name, tensor, kind, problem, rank).clone().requires_grad_(want)
        for (name, tensor), want in zip(tensors.items(), wanted, strict=True)
    ]


def _loss(kind: str, problem: Problem, config: ody.OverlapConfig) -> Callable[..., Tensor]:
    def run(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        settings: dict[str, Any] = {"group": None, "chunk_rows": 5, "config": config}
        if kind == "zero3":
            return zero3_linear_cross_entropy(hidden, targets, weight, bias, **settings)
        return vocab_parallel_linear_cross_entropy(hidden, targets, weight, bias, tokens=kind, **settings)

    return run


def opcheck(rank: int, world: int) -> None:
    name, key = dist.group.WORLD.group_name, ody.OverlapConfig(timeout_s=30).key()
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    targets = torch.tensor([0, 4, IGNORE, 2, 1, 3])
    for bias, each in itertools.product((None, torch.randn(5, requires_grad=True)), (False, True)):
        arguments: tuple[Any, ...] = (hidden, targets, weight, bias, name, key, IGNORE, 4, each, [], "")
        torch.library.opcheck(torch.ops.odysseus.zero3_linear_cross_entropy.default, arguments)
        for sharded in (True, False):
            arguments = (hidden, targets, weight, bias, [5] * world, sharded, name, key, IGNORE, 4, each)
            torch.library.opcheck(torch.ops.odysseus.vocab_parallel_linear_cross_entropy.default, arguments)


def each_row(rank: int, world: int, kind: str, mode: str, transport: str) -> None:
    """``reduction="none"``: a loss and a gradient of its own for each row, against fp64 in this process."""
    problem, dtype = Problem(), torch.float64
    data = make_data(problem, world, dtype)
    scale = torch.rand(data.targets.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    whole = {"hidden": leaf(data.hidden), "weight": leaf(data.weight)}
    logits = F.linear(whole["hidden"], whole["weight"], data.bias)
    losses = F.cross_entropy(logits, data.targets, reduction="none", ignore_index=problem.ignore_index)
    (losses * scale).sum().backward()

    part = own_part("hidden", torch.arange(len(data.targets)), kind, problem, rank)
    mine = {name: leaf(own_part(name, tensor, kind, problem, rank).detach()) for name, tensor in whole.items()}
    bias = None if data.bias is None else own_part("bias", data.bias, kind, problem, rank)
    settings: dict[str, Any] = {"ignore_index": problem.ignore_index, "chunk_rows": 4, "reduction": "none"}
    settings |= {"group": None, "config": ody.OverlapConfig(mode=mode, transport=transport, timeout_s=60)}
    arguments = (mine["hidden"], data.targets[part], mine["weight"], bias)
    poison_windows()
    with nan_empty():
        if kind == "zero3":
            found = zero3_linear_cross_entropy(*arguments, **settings)
        else:
            found = vocab_parallel_linear_cross_entropy(*arguments, tokens=kind, **settings)
        (found * scale[part]).sum().backward()
    torch.testing.assert_close(found.detach(), losses[part].detach(), rtol=1e-13, atol=1e-13)
    for name, tensor in mine.items():
        expected = own_part(name, whole[name].grad, kind, problem, rank)
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match='expected reduction "sum" or "none", got \'mean\''):
        zero3_linear_cross_entropy(*arguments, **{**settings, "reduction": "mean"})


def compiled(rank: int, world: int, kind: str, backend: str) -> None:
    problem, config = Problem(), ody.OverlapConfig(timeout_s=60)
    data = make_data(problem, world, torch.float64)
    loss = _loss(kind, problem, config)
    leaves = _leaves(kind, data, problem, rank, (True, True, True))
    targets = _own_targets(kind, data, problem, rank)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return loss(hidden.tanh(), weight, bias, targets) * 2

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        value = function(*leaves, targets)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    expected = results(run)
    for function in (
        torch.compile(run, fullgraph=True, backend=backend),
        lambda *arguments: checkpoint(run, *arguments, use_reentrant=False),
    ):
        for one, other in zip(results(function), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def under_autocast(rank: int, world: int, kind: str) -> None:
    """The same bits as of what autocast makes of the operands, logits and sums in fp32 included."""
    problem, config = Problem(), ody.OverlapConfig(timeout_s=30)
    data = make_data(problem, world, torch.float32)
    expected, _ = run_kind(kind, make_data(problem, world, torch.bfloat16), problem, rank, world, config, 5)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = run_kind(kind, data, problem, rank, world, config, 5)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def messages(rank: int, world: int) -> dict[str, str]:
    hidden, targets, weight = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64), torch.randn(5, 8)

    def message(function: Callable[..., Tensor], *arguments: Any, **settings: Any) -> str:
        with ody.CommRecorder() as record:
            try:
                function(*arguments, group=None, **settings)
            except ValueError as error:
                assert record.bytes() == 0, "something was sent before the input was refused"
                return str(error)
        raise AssertionError("no ValueError")

    zero3, parallel = zero3_linear_cross_entropy, vocab_parallel_linear_cross_entropy
    return {
        "width": message(zero3, hidden, targets, torch.randn(5, 7)),
        "dtype": message(parallel, hidden, targets, weight.double()),
        "bias": message(zero3, hidden, targets, weight, torch.randn(4)),
        "bias dtype": message(parallel, hidden, targets, weight, torch.randn(5).double()),
        "float targets": message(zero3, hidden, targets.float(), weight),
        "targets": message(parallel, hidden, targets[:, 1:], weight),
        "chunks": message(zero3, hidden, targets, weight, chunk_rows=0),
        "tokens": message(parallel, hidden, targets, weight, tokens="cut"),
        "empty": message(parallel, hidden[:0], targets[:0], weight),
        "above": message(zero3, hidden, targets + 5 * world, weight),
        "below": message(parallel, hidden, targets - 3, weight),
        "below replicated": message(parallel, hidden, targets - 3, weight, tokens="replicated"),
    }


def different_rows(rank: int, world: int) -> str:
    """Sharded tokens of different numbers are an error on every rank, not a hang."""
    hidden, targets = torch.randn(3 + (rank == 1), 8), torch.zeros(3 + (rank == 1), dtype=torch.int64)
    try:
        vocab_parallel_linear_cross_entropy(
            hidden, targets, torch.randn(5, 8), group=None, config=ody.OverlapConfig(timeout_s=30)
        )
    except ody.RankMismatchError as error:
        return str(error)
    raise AssertionError("no error")
