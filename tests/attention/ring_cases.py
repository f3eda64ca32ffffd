"""What ranks run in the tests of Ring attention: the operator against plain attention in fp64 on the whole sequence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.attention.layout import positions, visible
from odysseus_kernels.testing.compare import assert_close_to_truth, nan_empty, relative_error, unit_roundoff

NAMES = ("output", "query gradient", "key gradient", "value gradient")


@dataclasses.dataclass
class Problem:
    """One case; ``rows`` is what each rank holds of the sequence."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    rows: int = 24
    width: int = 16
    value_width: int | None = None
    causal: bool = True
    layout: str = "zigzag"
    documents: str | None = None
    window: int | None = None
    dropout: float = 0.0
    seed: int = 0

    def inputs(self, world: int, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the output's gradient of the whole sequence."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * world)
        length, values = self.rows * world, self.value_width or self.width
        shapes = ((self.heads, self.width), (self.kv_heads, self.width), (self.kv_heads, values), (self.heads, values))
        return [
            torch.randn(self.batch, heads, length, width, generator=generator, dtype=torch.float64).to(dtype)
            for heads, width in shapes
        ]

    def ids(self, world: int) -> Tensor | None:
        """Document ids: packed one behind the other, each sequence of the batch in its own way, or any."""
        if self.documents is None:
            return None
        length = self.rows * world
        generator = torch.Generator().manual_seed(self.seed)
        if self.documents == "scattered":
            return torch.randint(0, 3, (self.batch, length), generator=generator)
        ends = torch.rand(self.batch, length, generator=generator) < 4 / length
        return ends.cumsum(1)


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None = None) -> Tensor:
    """Attention by its definition; ``seen`` bool [B or 1, L, L]."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    return scores.masked_fill(~seen[:, None], -math.inf).softmax(-1) @ v


def whole_mask(problem: Problem, world: int) -> Tensor:
    where, ids = torch.arange(problem.rows * world), problem.ids(world)
    return visible(where, where, ids, ids, causal=problem.causal, window=problem.window)


def gradients(out: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def truth(problem: Problem, world: int, dtype: torch.dtype) -> list[Tensor]:
    *inputs, grad = (x.double() for x in problem.inputs(world, dtype))
    for x in inputs:
        x.requires_grad_()
    return gradients(attention(*inputs, whole_mask(problem, world)), inputs, grad)


def unsharded(problem: Problem, world: int, dtype: torch.dtype) -> list[Tensor]:
    """PyTorch's flash attention on the whole sequence in ``dtype``."""
    *inputs, grad = problem.inputs(world, dtype)
    for x in inputs:
        x.requires_grad_()
    mask = whole_mask(problem, world)[:, None]
    mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs, attn_mask=mask)[0]
    return gradients(out, inputs, grad)


def ring(
    problem: Problem, rank: int, world: int, dtype: torch.dtype, config: ody.OverlapConfig, **more: Any
) -> list[Tensor]:
    """This rank's output and gradients."""
    where = positions(rank, world, problem.rows * world, problem.layout)
    # As a layer has them: [B, S, H, D] seen as [B, H, S, D].
    *inputs, grad = (
        x[:, :, where].transpose(1, 2).contiguous().transpose(1, 2) for x in problem.inputs(world, dtype)
    )
    for x in inputs:
        x.requires_grad_()
    with nan_empty():
        out = ody.ring_attention(
            *inputs,
            group=None,
            causal=problem.causal,
            layout=problem.layout,
            documents=problem.ids(world),
            window=problem.window,
            dropout=problem.dropout,
            dropout_seed=7 if problem.dropout else None,
            config=config,
            **more,
        )
        return gradients(out, inputs, grad)


def check(
    rank: int, world: int, dtype: str, transports: tuple[str, ...], modes: tuple[str, ...], problem: dict[str, Any]
) -> None:
    case, kind = Problem(**problem), getattr(torch, dtype)
    where = positions(rank, world, case.rows * world, case.layout)
    truths = truth(case, world, kind)
    baseline = unsharded(case, world, kind) if kind.itemsize == 2 and case.value_width is None else None
    for transport in transports:
        for mode in modes:
            config = ody.OverlapConfig(mode=mode, transport=transport, timeout_s=30)
            results = ring(case, rank, world, kind, config)
            for index, (name, result) in enumerate(zip(NAMES, results, strict=True)):
                # Scores, their exponentials and two products in a row: sums of at most L terms and of the width.
                # 16 bits: the kernel rounds probabilities (and, in backward, their gradients), its output, the
                # partial result that is merged or sent, and the end result: 4 roundings.
                assert_close_to_truth(
                    result,
                    truths[index][:, :, where],
                    dtype=kind,
                    terms=max(64, case.rows * world, case.width * 4),
                    roundings=4,
                    name=f"{name} of rank {rank}, {transport}, {mode}, {case}",
                )
                if baseline is not None and result.numel() >= 256:
                    expected = truths[index][:, :, where]
                    error, limit = relative_error(result, expected), relative_error(baseline[index][:, :, where], expected)
                    # The contract: 1.5 times the unsharded kernel's error, and one rounding more of what is merged.
                    assert error <= 1.5 * limit + unit_roundoff(kind), f"{name}, {transport}, {mode}, {case}: {error} {limit}"
