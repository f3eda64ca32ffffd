"""What ranks run in the tests of torch's graph machinery: opcheck, torch.compile, activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import odysseus_kernels as ody

CONFIG = ody.OverlapConfig(timeout_s=30)


def run_opcheck(rank: int, world: int) -> None:
    name, key = dist.group.WORLD.group_name, CONFIG.key()

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    x, weights, biases = tensor(2, 4, 8), [tensor(6, 8), tensor(3, 8)], [tensor(6)]
    for keep in (False, True):
        arguments = (x, weights, biases, [True, False], name, 1, key, keep, [], "")
        torch.library.opcheck(torch.ops.odysseus.all_gather_linear.default, arguments)
    whole = tensor(2, 2 * world, 8)
    torch.library.opcheck(
        torch.ops.odysseus.linear_reduce_scatter.default, (whole, weights[0], biases[0], name, 1, key, [], "")
    )
    for ahead, text in (([], ""), ([torch.randn(4, 8), torch.randn(3, 8)], "gather:1 gather:1 shared:0")):
        arguments = (x, weights[0], biases[0], name, key, ahead, text)
        torch.library.opcheck(torch.ops.odysseus.zero3_linear.default, arguments)


def chain(config: ody.OverlapConfig) -> Callable[..., Tensor]:
    """All operators after one another, as a layer has them."""

    def run(x: Tensor, wide: Tensor, second: Tensor, narrow: Tensor, shard: Tensor, bias: Tensor) -> Tensor:
        a, b = ody.all_gather_linear(x, (wide, second), (bias, None), group=None, config=config)
        y = ody.linear_reduce_scatter(a.sin() * b.mean(), narrow, group=None, config=config)
        return ody.zero3_linear(y, shard, group=None, config=config).cos()

    return run


def _inputs(world: int) -> list[Tensor]:
    shapes = ((2, 4, 8), (6, 8), (3, 8), (8, 6), (5, 8), (6,))
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


def _gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def run_compiled(rank: int, world: int, backend: str, gathered: str) -> None:
    torch.manual_seed(rank)
    function = chain(ody.OverlapConfig(timeout_s=60, gathered=gathered))
    inputs = _inputs(world)
    expected = _gradients(function, inputs)
    actual = _gradients(torch.compile(function, fullgraph=True, backend=backend), inputs)
    for one, other in zip(actual, expected, strict=True):
        # The compiler may reorder the elementwise part: rounding in fp32, on sums of a few dozen terms.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def run_compiled_shapes(rank: int, world: int) -> None:
    """One compiled function for several lengths: no shape is baked in."""
    compiled = torch.compile(
        lambda x, w: ody.all_gather_linear(x, w, group=None, config=CONFIG),
        fullgraph=True,
        backend="eager",
        dynamic=True,
    )
    weight = torch.randn(6, 8)
    for rows in (3, 5, 8):
        x = torch.randn(rows, 8)
        assert torch.equal(compiled(x, weight), ody.all_gather_linear(x, weight, group=None, config=CONFIG))


def run_checkpointed(rank: int, world: int) -> None:
    torch.manual_seed(rank)
    for transport in ("symmetric", "collective"):
        function = chain(ody.OverlapConfig(transport=transport, timeout_s=30))
        inputs = _inputs(world)
        expected = _gradients(function, inputs)
        actual = _gradients(lambda *args, f=function: checkpoint(f, *args, use_reentrant=False), inputs)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)


def run_some_gradients(rank: int, world: int) -> None:
    """Whatever subset of inputs wants gradients, those are right and the others stay None."""
    torch.manual_seed(0)
    function = chain(CONFIG)
    inputs = _inputs(world)
    expected = dict(enumerate(_gradients(function, inputs)[1:]))
    for mask in range(1, 2 ** len(inputs)):
        leaves = [tensor.detach().clone().requires_grad_(bool(mask >> i & 1)) for i, tensor in enumerate(inputs)]
        function(*leaves).square().sum().backward()
        for index, one in enumerate(leaves):
            if one.requires_grad:
                torch.testing.assert_close(one.grad, expected[index], rtol=1e-5, atol=1e-5)
            else:
                assert one.grad is None


def run_unused_output(rank: int, world: int) -> None:
    """Only one of several projections is used: the other's gradient is zero, not missing, on every rank."""
    x, used, unused = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8), torch.randn(3, 8, requires_grad=True)
    y, _ = ody.all_gather_linear(x, (used, unused), group=None, config=CONFIG)
    y.sum().backward()
    assert x.grad is not None
    assert unused.grad is None or not unused.grad.any()
    torch.testing.assert_close(x.grad, world * used.sum(0).expand(4, 8), rtol=1e-5, atol=1e-4)
