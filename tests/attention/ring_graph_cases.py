"""What ranks run in the tests of Ring attention under torch's graph machinery."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import odysseus_kernels as ody
from odysseus_kernels.attention import ring  # noqa: F401  (registers the operator)

CONFIG = ody.OverlapConfig(timeout_s=60)


def inputs() -> list[Tensor]:
    return [torch.randn(2, heads, 6, 8, requires_grad=True) for heads in (4, 2, 2)]


def run_opcheck(rank: int, world: int) -> None:
    torch.manual_seed(rank)
    settings = (dist.group.WORLD.group_name, CONFIG.key(), True, "zigzag")
    documents = torch.arange(6 * world).expand(2, -1) // 4
    for more in ((None, *settings, None), (documents, *settings, 5)):
        arguments = (*inputs(), *more, 0.35, 0.0, 0, 0, "sdpa")
        torch.library.opcheck(torch.ops.odysseus.ring_attention.default, arguments)


def attention(**more: Any) -> Any:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ody.ring_attention(q.sin(), k, v, group=None, config=CONFIG, **more).cos()

    return run


def gradients(function: Any, tensors: list[Tensor]) -> list[Tensor]:
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors)]


def run_compiled(rank: int, world: int, backend: str) -> None:
    torch.manual_seed(rank)
    documents = torch.arange(6 * world).expand(2, -1) // 4
    for more in ({}, {"documents": documents, "window": 5}, {"dropout": 0.2, "dropout_seed": 3}):
        function, tensors = attention(**more), inputs()
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        for one, other in zip(gradients(compiled, tensors), gradients(function, tensors), strict=True):
            # The compiler may reorder the elementwise part: rounding in fp32, on sums of a few dozen terms.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def run_compiled_shapes(rank: int, world: int) -> None:
    """One compiled function for several lengths: no shape is baked in."""
    compiled = torch.compile(attention(), fullgraph=True, backend="eager", dynamic=True)
    for rows in (4, 6, 10):
        tensors = [torch.randn(2, heads, rows, 8) for heads in (4, 2, 2)]
        assert torch.equal(compiled(*tensors), attention()(*tensors))


def run_checkpointed(rank: int, world: int) -> None:
    torch.manual_seed(rank)
    function, tensors = attention(dropout=0.2, dropout_seed=3), inputs()
    expected = gradients(function, tensors)
    actual = gradients(lambda *args: checkpoint(function, *args, use_reentrant=False), tensors)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def run_some_gradients(rank: int, world: int) -> None:
    """Ranks may want different gradients: those are right, the others stay None."""
    torch.manual_seed(rank)
    tensors = inputs()
    expected = gradients(attention(), tensors)[1:]
    wanted = [index != rank for index in range(3)]
    leaves = [x.detach().clone().requires_grad_(one) for x, one in zip(tensors, wanted, strict=True)]
    attention()(*leaves).square().sum().backward()
    for leaf, gradient, one in zip(leaves, expected, wanted, strict=True):
        assert torch.equal(leaf.grad, gradient) if one else leaf.grad is None
