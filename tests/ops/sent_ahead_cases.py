"""What ranks run in the tests of operators that send ahead what the next one gathers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from operator_cases import nan_empty, poison_windows
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.ops import zero3_experts

TOKENS, WIDTH, HEADS = 12, 8, 4


class Operators:
    """Operators on fixed tensors, by name: each takes what it sends ahead, in forward and in backward."""

    def __init__(self, rank: int, world: int, config: ody.OverlapConfig, dtype: torch.dtype) -> None:
        torch.manual_seed(rank)
        self.settings: dict[str, Any] = {"group": None, "config": config}
        self.world = world

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype)

        self.x, self.whole = make(1, TOKENS, WIDTH), make(1, TOKENS * world, WIDTH)
        self.weight, self.bias = make(5, WIDTH), make(5)
        self.qkv = tuple(make(2 * HEADS, WIDTH) for _ in range(3))
        self.out = make(6, WIDTH)
        self.experts = make(2, 2 * 3, WIDTH), make(2, WIDTH, 3)
        generator = torch.Generator().manual_seed(0)
        self.index = torch.randint(2 * world, (TOKENS, 1), generator=generator)
        self.routing = torch.ones(TOKENS, 1, dtype=dtype)

    def gather(self, x: Tensor, **ahead: Any) -> Tensor:
        ahead.pop("prefetch", None)  # nothing of a layer comes behind it
        return ody.all_gather_linear(x, self.weight, **self.settings, **ahead)

    def scatter(self, x: Tensor, **ahead: Any) -> Tensor:
        ahead.pop("prefetch_backward", None)
        whole = self.whole + x.sum()
        return ody.linear_reduce_scatter(whole, self.weight, **self.settings, **ahead)

    def zero3(self, x: Tensor, **ahead: Any) -> Tensor:
        return ody.zero3_linear(x, self.weight, self.bias, **self.settings, **ahead)

    def heads(self, x: Tensor, **ahead: Any) -> Tensor:
        settings = {**self.settings, "heads": (HEADS * self.world,) * 3}
        return sum(ody.linear_all_to_all(x, self.qkv, **settings, **ahead))  # type: ignore[return-value]

    def tokens(self, x: Tensor, **ahead: Any) -> Tensor:
        return ody.all_to_all_linear(self.whole + x.sum(), self.out, **self.settings, **ahead)

    def mixture(self, x: Tensor, **ahead: Any) -> Tensor:
        return zero3_experts(x[0], self.index, self.routing, *self.experts, **self.settings, **ahead)

    @property
    def shards(self) -> dict[str, Any]:
        """What each of those that gather weights gathers first."""
        return {"zero3": self.weight, "heads": self.qkv, "tokens": (self.out,), "mixture": self.experts}


SENDERS = ("gather", "scatter", "zero3", "heads", "tokens", "mixture")
RECEIVERS = ("zero3", "heads", "tokens", "mixture")


def _outcome(operators: Operators, sender: str, receiver: str, ahead: dict[str, Any]) -> list[Tensor]:
    """Outputs and input gradients of ``sender`` behind ``receiver`` in backward, and before it in forward."""
    poison_windows()
    first: Callable[..., Tensor] = getattr(operators, sender)
    second: Callable[..., Tensor] = getattr(operators, receiver)
    with nan_empty():
        leaf, last = (operators.x.clone().requires_grad_() for _ in range(2))
        w = second(last)
        y = first(leaf, prefetch=ahead.get("forward"), prefetch_backward=ahead.get("backward"))
        z = second(operators.x)
        # Backward goes the other way: the sender's, then the receiver's.
        gradients = torch.autograd.grad(y.square().sum() + w.square().sum(), (leaf, last))
    return [y.detach(), z, w.detach(), *gradients]


WAYS: dict[str, tuple[str, str | int]] = {
    "fused": ("fused", "auto"),
    "3 pieces": ("fused", 3),
    "unfused": ("unfused", 1),
}


def every_pair(rank: int, world: int, transport: str, dtype: str, how: str) -> int:
    """Every operator sends ahead what every other gathers first: same bits, and all is used."""
    checked = 0
    mode, pieces = WAYS[how]
    config = ody.OverlapConfig(mode=mode, transport=transport, chunks_per_rank=pieces, timeout_s=30)  # type: ignore[arg-type]
    operators = Operators(rank, world, config, getattr(torch, dtype))
    for sender, receiver in itertools.product(SENDERS, RECEIVERS):
        shards = operators.shards[receiver]
        plain = _outcome(operators, sender, receiver, {})
        with ody.CommRecorder() as record:
            ahead = _outcome(operators, sender, receiver, {"forward": shards, "backward": shards})
        for one, other in zip(plain, ahead, strict=True):
            assert torch.equal(one, other), (mode, sender, receiver)
        found = record.ahead()
        if mode == "fused":
            assert found["served"] == (sender != "gather") + (sender != "scatter"), (sender, receiver, found)
            assert found["dropped"] == 0, (sender, receiver, found)
        checked += 1
    return checked


def one_rank_sends_ahead(rank: int, world: int, transport: str) -> str:
    config = ody.OverlapConfig(transport=transport, timeout_s=20)
    x, weight, shard = torch.ones(2 * world, 8), torch.ones(3, 8), torch.ones(2, 8)
    try:
        ody.linear_reduce_scatter(x, weight, group=None, config=config, prefetch=shard if rank == 1 else None)
    except ody.RankMismatchError as error:
        return str(error)
    return ""


def refused(rank: int, world: int) -> list[str]:
    """What operators say of what cannot be sent ahead."""
    x, weight = torch.ones(2 * world, 8), torch.ones(3, 8)
    messages = []
    for bad in (torch.ones(3), torch.ones(3, 8, dtype=torch.float64), ("weight",)):
        for call in (
            lambda bad: ody.linear_reduce_scatter(x, weight, group=None, prefetch=bad),
            lambda bad: ody.zero3_linear(x, weight, group=None, prefetch_backward=bad),
        ):
            try:
                call(bad)
            except ValueError as error:
                messages.append(str(error))
    return messages
