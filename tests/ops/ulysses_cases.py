"""What ranks run in the tests of Ulysses' operators: against their own mathematics in fp64 on unsharded data.

Every rank makes the same global tensors from a seed and knows the whole truth.  With R rings there are R sequences, and
the weights are cut over all ranks; rank e is rank ``e % N`` of ring ``e // N``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from operator_cases import MODES, Outputs, leaf, poison_windows
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import odysseus_kernels as ody
from odysseus_kernels.ops import reference
from odysseus_kernels.testing.compare import assert_close_to_truth, nan_empty


@dataclasses.dataclass
class Problem:
    """Sizes of one case; ``rows`` is what one rank holds of a sequence."""

    batch: tuple[int, ...] = (2,)
    rows: int = 6
    features: int = 24
    heads: int = 2  # query heads of each rank
    kv_heads: int | None = None  # of all ranks; as many as ranks if None
    head_dim: int = 12
    rings: int = 1
    bias: bool = True
    contiguous: bool = True
    seed: int = 0


@functools.lru_cache(maxsize=4)
def groups(rings: int) -> tuple[Any, Any]:
    """(the ranks of this rank's ring, all ranks or None if that is one ring)."""
    if rings == 1:
        return None, None
    mesh = init_device_mesh("cpu", (rings, dist.get_world_size() // rings), mesh_dim_names=("ring", "seq"))
    return mesh["seq"], dist.group.WORLD


class Case:
    """One problem on one rank."""

    def __init__(self, rank: int, world: int, problem: Problem, dtype: torch.dtype, config: ody.OverlapConfig) -> None:
        self.rank, self.world, self.problem, self.dtype, self.config = rank, world, problem, dtype, config
        self.size = world // problem.rings
        self.ring, self.seq = divmod(rank, self.size)
        self.group, self.everyone = groups(problem.rings)
        self.kv_heads = problem.kv_heads or self.size
        self.generator = torch.Generator().manual_seed(problem.seed + 1000 * world)

    def make(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def leaf(self, tensor: Tensor) -> Tensor:
        return leaf(tensor, self.problem.contiguous)

    def tokens(self, tensor: Tensor) -> Tensor:
        """This rank's tokens of [rings, ..., L, n]."""
        return tensor[self.ring].chunk(self.size, -2)[self.seq]

    def heads(self, tensor: Tensor, count: int) -> Tensor:
        """This rank's heads of [rings, ..., L, n] with ``count`` heads."""
        if count < self.size:
            return tensor[self.ring].chunk(count, -1)[self.seq * count // self.size]
        return tensor[self.ring].chunk(self.size, -1)[self.seq]

    def shard(self, tensor: Tensor, dim: int = 0) -> Tensor:
        return tensor.chunk(self.world, dim)[self.rank]

    def compare(self, run: Callable[[ody.OverlapConfig], Outputs], truths: Outputs, terms: int, added: int) -> None:
        """``terms``: the longest sum; ``added``: results that are rounded and then added."""
        config, dtype = self.config, self.dtype
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
                terms=max(64, terms),
                roundings=2 + added,
                baseline=baseline,
                name=f"{what}, {config}, {self.problem}",
            )


def check_linear_all_to_all(case: Case, function: Callable[..., Any] | None = None) -> None:
    """Query, key and value projections; shared key and value heads if there are fewer than ranks."""
    problem, size = case.problem, case.size
    counts = (problem.heads * size, case.kv_heads, case.kv_heads)
    length = problem.rows * size
    x = case.make(problem.rings, *problem.batch, length, problem.features)
    weights = [case.make(count * problem.head_dim, problem.features) for count in counts]
    biases = [case.make(count * problem.head_dim) if problem.bias else None for count in counts]
    # Each rank's gradient of its heads: ranks that share a head have different ones, which add up.
    shares = [max(count, size) * problem.head_dim for count in counts]
    grads = [case.make(problem.rings, *problem.batch, length, share) for share in shares]

    wide = [t.double().requires_grad_() for t in (x, *weights, *(b for b in biases if b is not None))]
    wide_biases = wide[4:] if problem.bias else [None] * 3
    truth = [torch.nn.functional.linear(wide[0], w, b) for w, b in zip(wide[1:4], wide_biases, strict=True)]
    summed = [
        grad.double().unflatten(-1, (min(count, size), -1, y.shape[-1] // min(count, size))).sum(-2).flatten(-2)
        for grad, count, y in zip(grads, counts, truth, strict=True)
    ]
    torch.autograd.backward(truth, summed)

    def run(config: ody.OverlapConfig) -> Outputs:
        own_x = case.leaf(case.tokens(x))
        own_w = [case.leaf(case.shard(w)) for w in weights]
        own_b = [None if b is None else leaf(case.shard(b)) for b in biases]
        with nan_empty():
            operator = function or functools.partial(ody.linear_all_to_all, config=config)
            ys = operator(own_x, own_w, own_b, group=case.group, heads=counts, zero3_group=case.everyone)
            torch.autograd.backward(ys, [case.heads(grad, size) for grad in grads])
        results = {f"output {i}": y for i, y in enumerate(ys)} | {"input gradient": own_x.grad}
        results |= {f"weight gradient {i}": w.grad for i, w in enumerate(own_w)}
        return results | {f"bias gradient {i}": b.grad for i, b in enumerate(own_b) if b is not None}

    truths = {f"output {i}": case.heads(y, count) for i, (y, count) in enumerate(zip(truth, counts, strict=True))}
    truths["input gradient"] = case.tokens(wide[0].grad)
    truths |= {f"weight gradient {i}": case.shard(w.grad) for i, w in enumerate(wide[1:4])}
    truths |= {f"bias gradient {i}": case.shard(b.grad) for i, b in enumerate(wide_biases) if b is not None}
    case.compare(run, truths, problem.rings * x[0, ..., 0].numel() + sum(w.shape[0] for w in weights), added=3)


def check_all_to_all_linear(case: Case, function: Callable[..., Any] | None = None) -> None:
    problem, size = case.problem, case.size
    length, across, n = problem.rows * size, problem.heads * size * problem.head_dim, 2 * case.world
    x = case.make(problem.rings, *problem.batch, length, across)
    weight, bias = case.make(n, across), case.make(n) if problem.bias else None
    grad = case.make(problem.rings, *problem.batch, length, n)

    wide = [t.double().requires_grad_() for t in (x, weight, *((bias,) if bias is not None else ()))]
    truth = torch.nn.functional.linear(*wide)
    truth.backward(grad.double())

    def run(config: ody.OverlapConfig) -> Outputs:
        own_x, own_w = case.leaf(case.heads(x, size)), case.leaf(case.shard(weight, 1))
        own_b = None if bias is None else leaf(case.shard(bias))
        with nan_empty():
            operator = function or functools.partial(ody.all_to_all_linear, config=config)
            y = operator(own_x, own_w, own_b, group=case.group, zero3_group=case.everyone)
            y.backward(case.tokens(grad))
        results = {"output": y, "input gradient": own_x.grad, "weight gradient": own_w.grad}
        return results if own_b is None else results | {"bias gradient": own_b.grad}

    truths = {
        "output": case.tokens(truth),
        "input gradient": case.heads(wide[0].grad, size),
        "weight gradient": case.shard(wide[1].grad, 1),
    }
    if bias is not None:
        truths["bias gradient"] = case.shard(wide[2].grad)
    case.compare(run, truths, problem.rings * x[0, ..., 0].numel() + across, added=1)


def _scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An attention that mixes all tokens and is linear in v, so that its rounding is that of a few products."""
    shared = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(shared, 1) for tensor in (k, v))
    return torch.matmul(torch.matmul(q, k.mT) / 64, v)


def check_ulysses_attention(case: Case, function: Callable[..., Any] | None = None) -> None:
    problem, size = case.problem, case.size
    heads, length = problem.heads * size, problem.rows * size
    tensors = [case.make(2, count, length, problem.head_dim) for count in (heads, case.kv_heads, case.kv_heads)]
    tensors[2] = torch.cat((tensors[2], tensors[2][..., :3]), -1)  # values of another width
    grad = case.make(2, heads, length, problem.head_dim + 3)
    wide = [tensor.double().requires_grad_() for tensor in tensors]
    truth = _scores(*wide)
    truth.backward(grad.double())

    def run(config: ody.OverlapConfig) -> Outputs:
        own = [case.leaf(tensor.chunk(size, 2)[case.seq]) for tensor in tensors]
        with nan_empty():
            operator = function or functools.partial(ody.ulysses_attention, config=config)
            out = operator(*own, group=case.group, attention=_scores)
            out.backward(grad.chunk(size, 2)[case.seq])
        return {"output": out} | {f"gradient {i}": tensor.grad for i, tensor in enumerate(own)}

    truths = {"output": truth} | {f"gradient {i}": tensor.grad for i, tensor in enumerate(wide)}
    truths = {name: tensor.chunk(size, 2)[case.seq] for name, tensor in truths.items()}
    # Intermediate results of the attention are rounded as well: scores, their gradients, repeated heads.
    case.compare(run, truths, length * problem.heads * size * problem.head_dim, added=6)


CHECKS = {
    "linear_all_to_all": check_linear_all_to_all,
    "all_to_all_linear": check_all_to_all_linear,
    "ulysses_attention": check_ulysses_attention,
}


def check(
    rank: int, world: int, operator: str, dtype: str, transport: str, problem: dict[str, Any], modes: Any = MODES
) -> None:
    for mode in modes:
        config = ody.OverlapConfig(mode=mode, transport=transport, timeout_s=30)
        CHECKS[operator](Case(rank, world, Problem(**problem), getattr(torch, dtype), config))


def check_references(rank: int, world: int, problem: dict[str, Any]) -> None:
    for operator, function in CHECKS.items():
        case = Case(rank, world, Problem(**problem), torch.float64, ody.OverlapConfig())
        function(case, getattr(reference, f"{operator}_reference"))


def some_gradients(rank: int, world: int) -> None:
    """Whatever subset of inputs wants gradients, those are right and the others stay None."""
    torch.manual_seed(0)
    shapes = ((2, 3, 8), (2, 8), (2, 8), (2,), (8, 2), (8 // world,))
    inputs = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    for mode in MODES:
        config = ody.OverlapConfig(mode=mode, timeout_s=30)

        def chain(x: Tensor, q: Tensor, k: Tensor, b: Tensor, o: Tensor, c: Tensor) -> Tensor:
            heads = (2 * world, 1)
            y, z = ody.linear_all_to_all(x, (q, k), (b, None), group=None, heads=heads, config=config)  # noqa: B023
            y = y * z.mean(-1, keepdim=True)
            return ody.all_to_all_linear(y, o, c, group=None, config=config)  # noqa: B023

        expected = torch.autograd.grad(chain(*inputs).square().sum(), inputs)
        for mask in (1, 2, 4, 8, 16, 32, 3, 5, 12, 17, 20, 47):
            leaves = [tensor.detach().clone().requires_grad_(bool(mask >> i & 1)) for i, tensor in enumerate(inputs)]
            chain(*leaves).square().sum().backward()
            for one, gradient in zip(leaves, expected, strict=True):
                if one.requires_grad:
                    torch.testing.assert_close(one.grad, gradient, rtol=1e-5, atol=1e-5)
                else:
                    assert one.grad is None


def causal(rank: int, world: int) -> None:
    """Without an attention function it is causal over the whole sequence."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5 * world, 8) for heads in (2 * world, world, world))
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    own = [tensor.chunk(world, 2)[rank] for tensor in (q, k, v)]
    torch.testing.assert_close(ody.ulysses_attention(*own, group=None), truth.chunk(world, 2)[rank])


def same_mode_same_bits(rank: int, world: int) -> None:
    """Twice the same call gives the same bits."""
    torch.manual_seed(rank)
    x, w = torch.randn(2, 6, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    for transport, mode in itertools.product(("symmetric", "collective"), MODES):
        config = ody.OverlapConfig(mode=mode, transport=transport, timeout_s=30)

        def run() -> list[Tensor]:
            y = ody.linear_all_to_all(x, w, group=None, config=config)  # noqa: B023
            return [y, *torch.autograd.grad(y.square().sum(), (x, w))]

        assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def unused_inputs(rank: int, world: int) -> None:
    """An attention that ignores keys and values: they have no gradient, or zeros, on all ranks alike."""
    q, k, v = (torch.randn(1, world, 2, 4, requires_grad=True) for _ in range(3))
    ody.ulysses_attention(q, k, v, group=None, attention=lambda q, k, v: 2 * q).sum().backward()
    assert torch.equal(q.grad, torch.full_like(q, 2))
    assert all(tensor.grad is None or not tensor.grad.any() for tensor in (k, v))


def measured(rank: int, world: int) -> None:
    """The mode is found by running all of them several times: results are those of one run."""
    for transport, rings in itertools.product(("symmetric", "collective"), (1, 2)):
        config = ody.OverlapConfig(tune="measure", transport=transport, timeout_s=30)
        for operator in ("linear_all_to_all", "all_to_all_linear"):
            problem = Problem(rings=rings, kv_heads=1)
            CHECKS[operator](Case(rank, world, problem, torch.float64, config))
        from all_reduce_cases import CHECKS as REDUCED
        from all_reduce_cases import Problem as Reduced

        for check_one in REDUCED.values():
            check_one(rank, world, Reduced(), torch.float64, config)
