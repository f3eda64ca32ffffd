"""Every public operator as one table: what each rank passes, what a single process computes, and what of it a rank has.

Tests of what no operator may get wrong (strides, derivatives, autocast, refusals) run over this table, so that an
operator that is added to it is tested for all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.ops import (
    linear_log_probs,
    vocab_parallel_linear_cross_entropy,
    zero3_experts,
    zero3_linear_cross_entropy,
)

EVERYWHERE = None  # the whole tensor on every rank


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator on tensors of fixed sizes.

    Attributes:
        shapes: of the whole inputs for ``world`` ranks.
        cuts: dimension along which each input is cut over the ranks.
        out_cut: the same of the outputs.
        call: ``call(tensors, **settings)`` is the operator on one rank's inputs.
        whole: ``whole(tensors, world)`` is the same by plain torch on the whole inputs.
        integers: further inputs.
    """

    shapes: Callable[[int], dict[str, tuple[int, ...]]]
    cuts: dict[str, int | None]
    out_cut: int | None
    call: Callable[..., Any]
    whole: Callable[[dict[str, Tensor], int], Any]
    integers: Callable[[int, torch.Generator], dict[str, Tensor]] = lambda world, generator: {}

    def inputs(self, world: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """The whole inputs."""
        generator = torch.Generator().manual_seed(100 * seed + world)
        floats = {
            name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, shape in self.shapes(world).items()
        }
        return floats | self.integers(world, generator)

    def part(self, name: str, whole: Tensor, rank: int, world: int) -> Tensor:
        return cut(whole, self.cuts[name], rank, world)


def cut(whole: Tensor, dim: int | None, rank: int, world: int) -> Tensor:
    return whole if dim is None else whole.chunk(world, dim)[rank]


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, by its definition: it has second derivatives."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf).softmax(-1) @ v


def stock_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.dtype == torch.float64:
        return attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _losses(t: dict[str, Tensor], world: int, each: bool) -> Tensor:
    logits = F.linear(t["hidden"], t["weight"], t["bias"])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits, t["targets"], reduction="none")
    return losses.view(world, -1).sum(1) if each else losses.sum()


def _experts(t: dict[str, Tensor], world: int) -> Tensor:
    y = torch.zeros_like(t["x"])
    for expert, (gate_up, down) in enumerate(zip(t["gate_up"], t["down"], strict=True)):
        token, place = (t["index"] == expert).nonzero(as_tuple=True)
        gate, up = F.linear(t["x"][token], gate_up).chunk(2, -1)
        found = F.linear(F.silu(gate) * up, down) * t["routing"][token, place][:, None]
        y = y.index_add(0, token, found.to(y.dtype))
    return y


def _linear(t: dict[str, Tensor], world: int) -> Any:
    return F.linear(t["x"], t["weight"], t["bias"])


def _two(t: dict[str, Tensor], world: int) -> Any:
    return F.linear(t["x"], t["weight"], t["bias"]), F.linear(t["x"], t["second"])


def _targets(rows: Callable[[int], int]) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    return lambda world, generator: {"targets": torch.randint(5 * world, (rows(world),), generator=generator)}


def _loss(function: Any, **more: Any) -> Callable[..., Tensor]:
    return lambda t, **s: function(t["hidden"], t["targets"], t["weight"], t["bias"], chunk_rows=4, **more, **s)


def _log_probs(t: dict[str, Tensor], world: int) -> tuple[Tensor, Tensor]:
    logits = F.linear(t["hidden"], t["weight"], t["bias"]) / 0.7
    log_probs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return log_probs.gather(-1, t["ids"]), -(log_probs.exp() * log_probs).sum(-1)


def _ids(rows: Callable[[int], int]) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    return lambda world, generator: {"ids": torch.randint(5 * world, (rows(world), 3), generator=generator)}


def _of_rows(placement: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    return lambda t, **s: linear_log_probs(
        *(t[name] for name in ("hidden", "ids", "weight", "bias")),
        placement=placement, temperature=0.7, entropy=True, chunk_rows=4, **s,
    )[:2]  # fmt: skip


def _attention_block(t: dict[str, Tensor], world: int) -> Tensor:
    q, k, v = (
        F.linear(t["x"], t[name], t["bias"] if name == "query" else None).unflatten(-1, (-1, 4)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    return F.linear(stock_attention(q, k, v).transpose(1, 2).flatten(2), t["output"], t["last"])


_ROWS = {"hidden": 0, "targets": 0, "weight": 0, "bias": 0}
_QKV = {"q": 2, "k": 2, "v": 2}

OPERATORS = {
    "all_gather_linear": Operator(
        lambda n: {"x": (2, 3 * n, 8), "weight": (6 * n, 8), "bias": (6 * n,), "second": (4 * n, 8)},
        {"x": -2, "weight": 0, "bias": 0, "second": 0},
        -1,
        lambda t, **s: ody.all_gather_linear(t["x"], (t["weight"], t["second"]), (t["bias"], None), **s),
        _two,
    ),
    "linear_reduce_scatter": Operator(
        lambda n: {"x": (2, 3 * n, 4 * n), "weight": (6, 4 * n), "bias": (6,)},
        {"x": -1, "weight": 1, "bias": EVERYWHERE},
        -2,
        lambda t, **s: ody.linear_reduce_scatter(t["x"], t["weight"], t["bias"], **s),
        _linear,
    ),
    "zero3_linear": Operator(
        lambda n: {"x": (2, 3 * n, 8), "weight": (6 * n, 8), "bias": (6 * n,)},
        {"x": -2, "weight": 0, "bias": 0},
        -2,
        lambda t, **s: ody.zero3_linear(t["x"], t["weight"], t["bias"], **s),
        _linear,
    ),
    "linear_all_reduce": Operator(
        lambda n: {"x": (2, 5, 4 * n), "weight": (6, 4 * n), "bias": (6,)},
        {"x": -1, "weight": 1, "bias": EVERYWHERE},
        EVERYWHERE,
        lambda t, **s: ody.linear_all_reduce(t["x"], t["weight"], t["bias"], **s),
        _linear,
    ),
    "column_parallel_linear": Operator(
        lambda n: {"x": (2, 5, 8), "weight": (6 * n, 8), "bias": (6 * n,), "second": (4 * n, 8)},
        {"x": EVERYWHERE, "weight": 0, "bias": 0, "second": 0},
        -1,
        lambda t, **s: ody.column_parallel_linear(t["x"], (t["weight"], t["second"]), (t["bias"], None), **s),
        _two,
    ),
    "linear_all_to_all": Operator(
        lambda n: {"x": (2, 3 * n, 8), "weight": (6 * n, 8), "bias": (6 * n,), "second": (4 * n, 8)},
        {"x": -2, "weight": 0, "bias": 0, "second": 0},
        -1,
        lambda t, **s: ody.linear_all_to_all(t["x"], (t["weight"], t["second"]), (t["bias"], None), **s),
        _two,
    ),
    "all_to_all_linear": Operator(
        lambda n: {"x": (2, 3 * n, 4 * n), "weight": (6 * n, 4 * n), "bias": (6 * n,)},
        {"x": -1, "weight": 1, "bias": 0},
        -2,
        lambda t, **s: ody.all_to_all_linear(t["x"], t["weight"], t["bias"], **s),
        _linear,
    ),
    "ulysses_attention": Operator(
        lambda n: {"q": (2, 2 * n, 3 * n, 4), "k": (2, n, 3 * n, 4), "v": (2, n, 3 * n, 4)},
        _QKV,
        2,
        lambda t, **s: ody.ulysses_attention(t["q"], t["k"], t["v"], attention=stock_attention, **s),
        lambda t, n: stock_attention(t["q"], t["k"], t["v"]),
    ),
    "ring_attention": Operator(
        lambda n: {"q": (2, 4, 6 * n, 8), "k": (2, 2, 6 * n, 8), "v": (2, 2, 6 * n, 8)},
        _QKV,
        2,
        lambda t, **s: ody.ring_attention(t["q"], t["k"], t["v"], layout="contiguous", **s),
        lambda t, n: stock_attention(t["q"], t["k"], t["v"]),
    ),
    "pipelined_attention": Operator(
        lambda n: {
            "x": (2, 3 * n, 8),
            "query": (8 * n, 8),
            "key": (4 * n, 8),
            "value": (4 * n, 8),
            "output": (8, 8 * n),
            "bias": (8 * n,),
            "last": (8,),
        },
        {"x": -2, "query": 0, "key": 0, "value": 0, "output": 1, "bias": 0, "last": EVERYWHERE},
        -2,
        # In one piece stripes are contiguous.
        lambda t, **s: ody.pipelined_attention(
            t["x"],
            (t["query"], t["key"], t["value"]),
            t["output"],
            (t["bias"], None, None),
            t["last"],
            head_dim=4,
            pieces=1,
            **s,
        ),
        _attention_block,
    ),
    "pipelined_ulysses": Operator(
        lambda n: {
            "x": (2, 3 * n, 8),
            "query": (16 * n, 8),
            "key": (8 * n, 8),
            "value": (8 * n, 8),
            "output": (6 * n, 16 * n),
            "bias": (16 * n,),
            "last": (6 * n,),
        },
        {"x": -2, "query": 0, "key": 0, "value": 0, "output": 1, "bias": 0, "last": 0},
        -2,
        lambda t, **s: ody.pipelined_ulysses(
            t["x"],
            (t["query"], t["key"], t["value"]),
            t["output"],
            (t["bias"], None, None),
            t["last"],
            head_dim=4,
            head_groups=2,
            **s,
        ),
        _attention_block,
    ),
    "vocab_parallel_linear_cross_entropy": Operator(
        lambda n: {"hidden": (7 * n, 8), "weight": (5 * n, 8), "bias": (5 * n,)},
        _ROWS,
        0,
        _loss(vocab_parallel_linear_cross_entropy),
        lambda t, n: _losses(t, n, True),
        _targets(lambda n: 7 * n),
    ),
    "replicated vocab_parallel_linear_cross_entropy": Operator(
        lambda n: {"hidden": (7, 8), "weight": (5 * n, 8), "bias": (5 * n,)},
        {"hidden": EVERYWHERE, "targets": EVERYWHERE, "weight": 0, "bias": 0},
        EVERYWHERE,
        _loss(vocab_parallel_linear_cross_entropy, tokens="replicated"),
        lambda t, n: _losses(t, n, False),
        _targets(lambda n: 7),
    ),
    "zero3_linear_cross_entropy": Operator(
        lambda n: {"hidden": (7 * n, 8), "weight": (5 * n, 8), "bias": (5 * n,)},
        _ROWS,
        0,
        _loss(zero3_linear_cross_entropy),
        lambda t, n: _losses(t, n, True),
        _targets(lambda n: 7 * n),
    ),
    "zero3 linear_log_probs": Operator(
        lambda n: {"hidden": (7 * n, 8), "weight": (5 * n, 8), "bias": (5 * n,)},
        {"hidden": 0, "ids": 0, "weight": 0, "bias": 0},
        0,
        _of_rows("zero3"),
        _log_probs,
        _ids(lambda n: 7 * n),
    ),
    "vocab_parallel linear_log_probs": Operator(
        lambda n: {"hidden": (7, 8), "weight": (5 * n, 8), "bias": (5 * n,)},
        {"hidden": EVERYWHERE, "ids": EVERYWHERE, "weight": 0, "bias": 0},
        EVERYWHERE,
        _of_rows("vocab_parallel"),
        _log_probs,
        _ids(lambda n: 7),
    ),
    "zero3_experts": Operator(
        lambda n: {"x": (5 * n, 8), "routing": (5 * n, 2), "gate_up": (2 * n, 12, 8), "down": (2 * n, 8, 6)},
        {"x": 0, "routing": 0, "index": 0, "gate_up": 0, "down": 0},
        0,
        lambda t, **s: zero3_experts(t["x"], t["index"], t["routing"], t["gate_up"], t["down"], **s),
        _experts,
        lambda n, generator: {"index": torch.rand(5 * n, 2 * n, generator=generator).topk(2, dim=1).indices},
    ),
}
