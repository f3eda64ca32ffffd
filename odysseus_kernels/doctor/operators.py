"""Every public operator as a row: its inputs, how ranks share them, its call, and the same by plain torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from odysseus_kernels import ops
from odysseus_kernels.attention.ring import ring_attention

__all__ = ["OPERATORS", "Operator"]

Tensors = dict[str, Tensor]
Result = Tensor | Sequence[Tensor]

WHOLE = None  # the same tensor on every rank
_D, _HEAD = 32, 16  # features, and those of a head
_ROWS = 24  # of each rank
_VOCABULARY, _CHOSEN = 20, 2
_UNSCALED = ("x", "hidden", "q", "k", "v", "bias", "routing")


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator on tensors of fixed sizes.

    Attributes:
        shapes: of the whole inputs for N ranks.
        cuts: dimension along which each input is cut over the ranks, or WHOLE.
        out_cut: the same of its outputs.
        call: ``call(part, **settings)`` is the operator on one rank's inputs.
        whole: ``whole(inputs, ranks)`` computes the same from the whole inputs.
        integers: shapes of further inputs, and the numbers below which their values lie; cut along dimension 0.
    """

    shapes: Callable[[int], dict[str, tuple[int, ...]]]
    cuts: dict[str, int | None]
    out_cut: int | None
    call: Callable[..., Result]
    whole: Callable[[Tensors, int], Result]
    integers: Callable[[int], dict[str, tuple[tuple[int, ...], int]]] = lambda n: {}

    def inputs(self, ranks: int) -> Tensors:
        """The whole inputs, fp32 and on the CPU; equal on all ranks."""
        generator = torch.Generator().manual_seed(ranks)
        made = {name: torch.randn(*shape, generator=generator) for name, shape in self.shapes(ranks).items()}
        for name in made.keys() - set(_UNSCALED):  # weights, as models begin with them: results are of size 1
            made[name] /= math.sqrt(made[name].shape[-1])
        for name, (shape, below) in self.integers(ranks).items():
            # Along a row no value comes twice: a token goes to different experts.
            rows = torch.rand(shape[0], below, generator=generator).argsort(1)
            made[name] = rows[:, : shape[1]].contiguous() if len(shape) > 1 else rows[:, 0].contiguous()
        return made


def cut(whole: Tensor, dim: int | None, rank: int, ranks: int) -> Tensor:
    """Rank ``rank``'s part of a tensor."""
    return whole if dim is WHOLE else whole.chunk(ranks, dim)[rank]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by its definition."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(later, -math.inf).softmax(-1) @ v


def _attention_block(t: Tensors, ranks: int) -> Tensor:
    q, k, v = (
        F.linear(t["x"], t[name]).unflatten(-1, (-1, _HEAD)).transpose(1, 2) for name in ("query", "key", "value")
    )
    return F.linear(_attention(q, k, v).transpose(1, 2).flatten(2), t["output"])


def _linear(t: Tensors, ranks: int) -> Result:
    return F.linear(t["x"], t["weight"], t["bias"])


def _two(t: Tensors, ranks: int) -> Result:
    return F.linear(t["x"], t["weight"], t["bias"]), F.linear(t["x"], t["second"])


def _losses(t: Tensors, ranks: int) -> Tensor:
    losses = F.cross_entropy(F.linear(t["hidden"], t["weight"], t["bias"]), t["targets"], reduction="none")
    return losses.view(ranks, -1).sum(1)


def _experts(t: Tensors, ranks: int) -> Tensor:
    y = torch.zeros_like(t["x"])
    for expert, (gate_up, down) in enumerate(zip(t["gate_up"], t["down"], strict=True)):
        token, place = (t["index"] == expert).nonzero(as_tuple=True)
        gate, up = F.linear(t["x"][token], gate_up).chunk(2, -1)
        y = y.index_add(0, token, F.linear(F.silu(gate) * up, down) * t["routing"][token, place][:, None])
    return y


def _on_two(operator: Callable[..., Result]) -> Callable[..., Result]:
    return lambda t, **s: operator(t["x"], (t["weight"], t["second"]), (t["bias"], None), **s)


def _on_one(operator: Callable[..., Result]) -> Callable[..., Result]:
    return lambda t, **s: operator(t["x"], t["weight"], t["bias"], **s)


def _log_probs(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, **settings: Any) -> Tensor:
    """By the weights that visit the rows: the same as a loss over them."""
    found = ops.linear_log_probs(hidden, targets[:, None], weight, bias, placement="zero3", **settings)
    return -found.log_probs.sum()


def _loss(operator: Callable[..., Result]) -> Operator:
    return Operator(
        lambda n: {"hidden": (_ROWS * n, _D), "weight": (_VOCABULARY * n, _D), "bias": (_VOCABULARY * n,)},
        {"hidden": 0, "weight": 0, "bias": 0},
        0,
        lambda t, **s: operator(t["hidden"], t["targets"], t["weight"], t["bias"], **s),
        _losses,
        lambda n: {"targets": ((_ROWS * n,), _VOCABULARY * n)},
    )


def _gathering(operator: Callable[..., Result], x_cut: int | None) -> Operator:
    """Operators whose weight is cut by its outputs, several at once."""
    return Operator(
        lambda n: {"x": (2, _ROWS * n, _D), "weight": (_D * n, _D), "bias": (_D * n,), "second": (8 * n, _D)},
        {"x": x_cut, "weight": 0, "bias": 0, "second": 0},
        -1,
        _on_two(operator),
        _two,
    )


def _scattering(operator: Callable[..., Result], out_cut: int | None) -> Operator:
    """Operators whose weight is cut by its inputs."""
    return Operator(
        lambda n: {"x": (2, _ROWS * n, _D * n), "weight": (_D, _D * n), "bias": (_D,)},
        {"x": -1, "weight": 1, "bias": WHOLE},
        out_cut,
        _on_one(operator),
        _linear,
    )


def _attending(call: Callable[..., Result]) -> Operator:
    """Attention of tokens that are cut over the ranks, with fewer heads of keys and values."""
    return Operator(
        lambda n: {
            "q": (2, 2 * n, _ROWS * n, _HEAD),
            "k": (2, n, _ROWS * n, _HEAD),
            "v": (2, n, _ROWS * n, _HEAD),
        },
        {"q": 2, "k": 2, "v": 2},
        2,
        call,
        lambda t, n: _attention(t["q"], t["k"], t["v"]),
    )


OPERATORS: dict[str, Operator] = {
    "all_gather_linear": _gathering(ops.all_gather_linear, -2),
    "linear_reduce_scatter": _scattering(ops.linear_reduce_scatter, -2),
    "zero3_linear": Operator(
        lambda n: {"x": (2, _ROWS * n, _D), "weight": (_D * n, _D), "bias": (_D * n,)},
        {"x": -2, "weight": 0, "bias": 0},
        -2,
        _on_one(ops.zero3_linear),
        _linear,
    ),
    "linear_all_reduce": _scattering(ops.linear_all_reduce, WHOLE),
    "column_parallel_linear": _gathering(ops.column_parallel_linear, WHOLE),
    "linear_all_to_all": _gathering(ops.linear_all_to_all, -2),
    "all_to_all_linear": Operator(
        lambda n: {"x": (2, _ROWS * n, 8 * n), "weight": (_D * n, 8 * n), "bias": (_D * n,)},
        {"x": -1, "weight": 1, "bias": 0},
        -2,
        _on_one(ops.all_to_all_linear),
        _linear,
    ),
    "ulysses_attention": _attending(lambda t, **s: ops.ulysses_attention(t["q"], t["k"], t["v"], **s)),
    "ring_attention": _attending(
        lambda t, **s: ring_attention(t["q"], t["k"], t["v"], layout="contiguous", **s),
    ),
    "pipelined_attention": Operator(
        lambda n: {
            "x": (2, _ROWS * n, _D),
            "query": (2 * _HEAD * n, _D),
            "key": (_HEAD * n, _D),
            "value": (_HEAD * n, _D),
            "output": (_D, 2 * _HEAD * n),
        },
        {"x": -2, "query": 0, "key": 0, "value": 0, "output": 1},
        -2,
        # In one piece a rank's tokens are contiguous.
        lambda t, **s: ops.pipelined_attention(
            t["x"], (t["query"], t["key"], t["value"]), t["output"], head_dim=_HEAD, pieces=1, **s
        ),
        _attention_block,
    ),
    "pipelined_ulysses": Operator(
        lambda n: {
            "x": (2, _ROWS * n, _D),
            "query": (4 * _HEAD * n, _D),
            "key": (2 * _HEAD * n, _D),
            "value": (2 * _HEAD * n, _D),
            "output": (_D, 4 * _HEAD * n),
        },
        {"x": -2, "query": 0, "key": 0, "value": 0, "output": 1},
        -2,
        lambda t, **s: ops.pipelined_ulysses(
            t["x"], (t["query"], t["key"], t["value"]), t["output"], head_dim=_HEAD, head_groups=2, **s
        ),
        _attention_block,
    ),
    "linear_log_probs": _loss(_log_probs),
    "vocab_parallel_linear_cross_entropy": _loss(ops.vocab_parallel_linear_cross_entropy),
    "zero3_linear_cross_entropy": _loss(ops.zero3_linear_cross_entropy),
    "zero3_experts": Operator(
        lambda n: {
            "x": (_ROWS * n, _D),
            "routing": (_ROWS * n, _CHOSEN),
            "gate_up": (2 * n, 24, _D),
            "down": (2 * n, _D, 12),
        },
        {"x": 0, "routing": 0, "gate_up": 0, "down": 0},
        0,
        lambda t, **s: ops.zero3_experts(t["x"], t["index"], t["routing"], t["gate_up"], t["down"], **s),
        _experts,
        lambda n: {"index": ((_ROWS * n, _CHOSEN), 2 * n)},
    ),
}
