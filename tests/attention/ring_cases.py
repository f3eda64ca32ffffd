"""What ranks run in the tests of Ring attention: the operator against plain attention in fp64 on the whole sequence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.attention.layout import inverse, positions, visible
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.testing.compare import (
    assert_close_to_truth,
    nan_empty,
    relative_error,
    rounding_tolerance,
    unit_roundoff,
)

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
    key_mask: bool = False
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

    def seen_keys(self, world: int) -> Tensor | None:
        """Padding at the left of one sequence, holes in the others: some queries see nothing."""
        if not self.key_mask:
            return None
        length = self.rows * world
        mask = torch.rand(self.batch, length, generator=torch.Generator().manual_seed(self.seed)) < 0.6
        mask[0] = torch.arange(length) >= length // 3
        return mask


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, factors: Tensor | None = None) -> Tensor:
    """Attention by its definition; ``seen`` bool [B or 1, L, L]; ``factors`` of dropout."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    probabilities = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    probabilities = probabilities.masked_fill(~seen[:, None], 0)  # also where a query sees nothing
    return (probabilities if factors is None else probabilities * factors) @ v


def whole_mask(problem: Problem, world: int) -> Tensor:
    where, ids = torch.arange(problem.rows * world), problem.ids(world)
    seen, keys = visible(where, where, ids, ids, causal=problem.causal, window=problem.window), problem.seen_keys(world)
    return seen if keys is None else seen & keys[:, None, :]


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
    *inputs, grad = (x[:, :, where].transpose(1, 2).contiguous().transpose(1, 2) for x in problem.inputs(world, dtype))
    for x in inputs:
        x.requires_grad_()
    with nan_empty():
        out = ody.ring_attention(
            *inputs,
            group=None,
            causal=problem.causal,
            layout=problem.layout,
            documents=problem.ids(world),
            key_mask=problem.seen_keys(world),
            window=problem.window,
            dropout=problem.dropout,
            dropout_seed=7 if problem.dropout else None,
            config=config,
            **more,
        )
        return gradients(out, inputs, grad)


def check(
    rank: int,
    world: int,
    dtype: str,
    transports: tuple[str, ...],
    modes: tuple[str, ...],
    problems: list[dict[str, Any]],
) -> None:
    """Every problem on every transport in every mode."""
    kind = getattr(torch, dtype)
    for case in (Problem(**problem) for problem in problems):
        where = positions(rank, world, case.rows * world, case.layout)
        truths = [x[:, :, where] for x in truth(case, world, kind)]
        baselines = [x[:, :, where] for x in unsharded(case, world, kind)] if kind.itemsize == 2 else None
        for transport in transports:
            for mode in modes:
                config = ody.OverlapConfig(mode=mode, transport=transport, timeout_s=60)
                results = ring(case, rank, world, kind, config)
                _compare(results, truths, baselines, kind, world, case, f"rank {rank}, {transport}, {mode}, {case}")


def _compare(
    results: list[Tensor],
    truths: list[Tensor],
    baselines: list[Tensor] | None,
    kind: torch.dtype,
    world: int,
    case: Problem,
    what: str,
) -> None:
    for index, (name, result) in enumerate(zip(NAMES, results, strict=True)):
        terms = max(64, case.rows * world, case.width * 4)
        if index in (1, 2) and kind == torch.float64 and case.rows * world == 1:
            # The softmax of one score is 1: what its gradient is the difference of cancels.
            norm = torch.linalg.vector_norm(result).item()
            limit = rounding_tolerance(kind, terms=terms) * _cancelled(case, world, index)
            assert norm <= limit, f"{name} of {what}: expected zero up to {limit:.2e}, got norm {norm:.2e}"
            continue
        # Sums of at most L terms, or of the width, twice in a row.  16 bits: the kernel rounds probabilities and
        # their gradients, its output and a partial result, which is merged or sent; the end is rounded once: 4.
        assert_close_to_truth(
            result,
            truths[index],
            dtype=kind,
            terms=terms,
            roundings=4,
            name=f"{name} of {what}",
        )
        if baselines is not None and result.numel() >= 256:
            error, unfair = (relative_error(x, truths[index]) for x in (result, baselines[index]))
            # Gradients are made and sent in fp32. Outputs are merged from what the kernel has rounded: 0.4 unit
            # roundoffs (root of the mean square) that an unsharded run does not have; errors add up as squares.
            limit = 1.2 * unfair + (unit_roundoff(kind) / 4 if index == 0 else 0)
            assert error <= limit, f"{name} of {what}: {error:.2e}, {unfair:.2e}"


def _cancelled(case: Problem, world: int, index: int) -> float:
    """Norm of what the gradient of q (1) or k (2) is a difference of, where a query sees one key: twice (g v) k."""
    q, k, v, grad = case.inputs(world, torch.float64)
    shared = case.heads // case.kv_heads
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = (grad * v).sum(-1, keepdim=True) / math.sqrt(case.width)
    return 2 * torch.linalg.vector_norm(scores * (k if index == 1 else q)).item()


def traffic(rank: int, world: int, transport: str, mode: str, dtype: str) -> dict[str, int]:
    """Bytes by phase and collective for k, v [1, 2, 6, 8] on each rank."""
    case = Problem(batch=1, rows=6, width=8)
    config = ody.OverlapConfig(transport=transport, mode=mode, timeout_s=60)
    with ody.CommRecorder() as record:
        ring(case, rank, world, getattr(torch, dtype), config)
    assert all(row["operator"] == "ring_attention" and row["transport"] == transport for row in record.rows())
    return {
        f"{phase} {collective}": count
        for phase in ("forward", "backward")
        for collective in {str(row["collective"]) for row in record.rows()}
        if (count := record.bytes(phase=phase, collective=collective))
    }


def dropped(rank: int, world: int, length: int, first_head: int, heads: int, layout: str) -> list[Tensor]:
    """(output, dq, dk, dv) of the whole sequence, in natural order, with dropout; on every rank."""
    case = Problem(rows=length // world, dropout=0.3, layout=layout, documents="packed")
    whole = Problem(rows=length, dropout=0.3, documents="packed")
    q, k, v, grad = whole.inputs(1, torch.float64)
    some, kv_some = slice(first_head, first_head + heads), slice(first_head // 2, (first_head + heads) // 2)
    where = positions(rank, world, length, layout)
    inputs = [x[:, part][:, :, where].requires_grad_() for x, part in ((q, some), (k, kv_some), (v, kv_some))]
    out = ody.ring_attention(
        *inputs,
        group=None,
        layout=layout,
        documents=whole.ids(1),
        dropout=case.dropout,
        dropout_seed=7,
        first_head=first_head,
        config=ody.OverlapConfig(timeout_s=60),
    )
    results = gradients(out, inputs, grad[:, some][:, :, where])
    order = inverse(world, length, layout)
    found = []
    for result in results:
        parts = [torch.empty_like(result) for _ in range(world)]
        dist.all_gather(parts, result.contiguous())
        found.append(torch.cat(parts, 2)[:, :, order])
    return found


def documents_apart(rank: int, world: int, layout: str) -> None:
    """Other tokens in one document: not a bit changes in the others, nor in gradients of others' outputs."""
    length, batch = 32 * world, 1
    ids = torch.zeros(batch, length, dtype=torch.int64)
    ids[:, length // 3 :] = 1
    ids[:, 3 * length // 4 :] = 2
    where = positions(rank, world, length, layout)
    others = (ids != 1)[0, where]
    config = ody.OverlapConfig(timeout_s=60)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(batch, 4, length, 8, generator=generator) for _ in range(4))
    grad[:, :, ids[0] == 1] = 0  # the loss of the other documents
    noise = torch.randn(length, 8, generator=generator) * (ids[0] == 1)[:, None]
    found = []
    for change in (0.0, 1e3):
        inputs = [(x + change * noise)[:, :, where].requires_grad_() for x in (q, k, v)]
        out = ody.ring_attention(*inputs, group=None, layout=layout, documents=ids, config=config)
        found.append(gradients(out, inputs, grad[:, :, where]))
    for before, after in zip(*found, strict=True):
        assert torch.equal(before[:, :, others], after[:, :, others])
    for one in found[1][1:]:
        assert not one[:, :, ~others].any()


def refusals(rank: int, world: int) -> dict[str, str]:
    """What bad input is told, before anything is sent."""
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    ids = torch.zeros(2, 6 * world, dtype=torch.int64)

    def message(*inputs: Any, **more: Any) -> str:
        with ody.CommRecorder() as record:
            try:
                ody.ring_attention(*inputs, group=None, **more)
            except ValueError as error:
                assert record.bytes() == 0, "something was sent before the input was refused"
                return str(error)
        raise AssertionError("no ValueError")

    odd = [x[:, :, :5] for x in (q, k, k)]
    return {
        "heads": message(torch.randn(2, 3, 6, 8), k, k),
        "odd": message(*odd),
        "documents": message(q, k, k, documents=ids[:, :6]),
        "real documents": message(q, k, k, documents=ids.float()),
        "key_mask": message(q, k, k, key_mask=ids[:, :6].bool()),
        "real key_mask": message(q, k, k, key_mask=ids.float()),
        "batch": message(q, k[:1], k[:1]),
        "values": message(q, k, k[:, :, :5]),
        "dtype": message(q, k.double(), k),
        "integers": message(q.int(), k.int(), k.int()),
        "dimensions": message(q[0], k, k),
        "empty": message(q[:0], k[:0], k[:0]),
        "layout": message(q, k, k, layout="striped"),
        "window": message(q, k, k, window=0),
        "two-sided window": message(q, k, k, window=3, causal=False),
        "dropout": message(q, k, k, dropout=1.0),
        "seed": message(q, k, k, dropout=0.1),
        "head": message(q, k, k, first_head=-1),
        "scale": message(q, k, k, scale=0.0),
        "kernel": message(q, k, k, kernel="eager"),
        "tiles": message(q, k, k, config=ody.OverlapConfig(mode="tiles")),
    }


def disagreement(rank: int, world: int, transport: str, what: str) -> str:
    """The last rank calls with another ``what``: all are told, before keys and values have moved."""
    last = rank == world - 1
    ids = torch.zeros(2, 6 * world, dtype=torch.int64)
    ids[:, 4 + last :] = 1
    arguments: dict[str, Any] = {
        "seed": {"dropout": 0.1, "dropout_seed": 5 + last},
        "probability": {"dropout": 0.2 if last else 0.1, "dropout_seed": 5},
        "documents": {"documents": ids},
        "key_mask": {"key_mask": 1 - ids},
        "window": {"window": 3 + last},
    }[what]
    group = dist.new_group()
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    config = ody.OverlapConfig(transport=transport, timeout_s=60)
    try:
        with ody.CommRecorder() as record:
            ody.ring_attention(q, k, k, group=group, config=config, **arguments)
    except ody.RankMismatchError as error:
        assert record.bytes() == 0
        return str(error)
    finally:
        group_transports(group).close()
        dist.destroy_process_group(group)
    raise AssertionError("no RankMismatchError")
