"""What ranks run in the tests of what Ulysses' attention block sends, holds, and does beside what travels."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from pipelined_cases import HEAD, Problem, normed, turned
from pipelined_ulysses_cases import apply, inputs, settings_of, units_of
from torch import Tensor

import odysseus_kernels as ody
from benchmarks.common.memory import peak_of_others, record_allocations
from benchmarks.layers.memory import saved_for_backward
from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.ops import _ulysses_groups
from odysseus_kernels.planner.formulas import LayerShape
from odysseus_kernels.planner.memory import saved


def traffic(record: CommRecorder) -> dict[tuple[str, str], int]:
    """Bytes by phase and collective, whichever operator sent them."""
    found: dict[tuple[str, str], int] = {}
    for row in record.rows():
        key = (str(row["phase"]), str(row["collective"]))
        found[key] = found.get(key, 0) + int(row["bytes"])
    return found


def by_two_operators(mine: dict[str, Tensor], problem: Problem, world: int, config: ody.OverlapConfig) -> Tensor:
    """What runs without a pipeline: two operators and attention between them."""
    q, k, v = ody.linear_all_to_all(
        mine["x"],
        (mine["wq"], mine["wk"], mine["wv"]),
        (mine["bq"], mine["bk"], mine["bv"]) if "bq" in mine else None,
        group=None,
        config=config,
    )
    q, k, v = (one.unflatten(-1, (-1, HEAD)).transpose(1, 2) for one in (q, k, v))
    if "nq" in mine:
        q, k = normed(q, mine["nq"]), normed(k, mine["nk"])
    tables = problem.tables(world, q.dtype)
    if tables is not None:
        q, k = turned(q, *tables), turned(k, *tables)
    k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
    scores = (q @ k.mT / math.sqrt(HEAD)).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -math.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return ody.all_to_all_linear(out, mine["wo"], mine.get("bo"), group=None, config=config)


def same_bytes(rank: int, world: int, frozen: tuple[str, ...]) -> None:
    """What two operators send, to the byte, in every mode, however many groups there are; frozen parameters as well."""
    problem = Problem(bias=True, norms=True, heads=4, kv_heads=2, rows=4)
    mine = inputs(problem, rank, world, torch.float32)
    for transport in ("symmetric", "collective"):
        for mode in ("fused", "unfused"):
            config = ody.OverlapConfig(mode=mode, transport=transport, timeout_s=60)
            counted, gradients = [], []
            for groups in (None, 1, 2):
                leaves = {n: one.clone().requires_grad_(n not in frozen) for n, one in mine.items() if n != "grad"}
                with CommRecorder() as record:
                    if groups is None:
                        y = by_two_operators(leaves, problem, world, config)
                    else:
                        y = apply(leaves, {**settings_of(problem, world, y.dtype, groups), "config": config})
                    if y.requires_grad:
                        y.backward(mine["grad"])
                counted.append(traffic(record))
                gradients.append({n: one.grad for n, one in leaves.items()})
            assert counted[0] == counted[1] == counted[2], (transport, mode, frozen, counted)
            for found in gradients[1:]:
                for name, expected in gradients[0].items():
                    assert (expected is None) == (found[name] is None), name
                    if expected is not None:
                        # fp32 sums of at most 16 * L products in another order: a few hundred times 6e-8.
                        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)


def memory(rank: int, world: int, transport: str, groups: int) -> dict[str, float]:
    """Bytes kept for backward and by the formula; most held and largest block beside results, in shards of x."""
    rows, width, head, heads = 512, 512, 32, 4
    torch.manual_seed(0)
    x = torch.randn(1, rows, width, requires_grad=True)
    weights = [torch.randn(heads * head, width, requires_grad=True) for _ in range(3)]
    output = torch.randn(width, heads * head, requires_grad=True)
    grad = torch.randn_like(x)
    config = ody.OverlapConfig(transport=transport, timeout_s=60)  # type: ignore[arg-type]

    def call() -> Tensor:
        return ody.pipelined_ulysses(x, weights, output, group=None, head_dim=head, head_groups=groups, config=config)

    def step() -> list[Tensor]:
        y = call()
        return [y.detach(), *torch.autograd.grad(y, [x, *weights, output], grad)]

    step()
    results, events = record_allocations(step)
    peak, largest = peak_of_others(events, {one.untyped_storage().data_ptr() for one in results})
    sizes = LayerShape(width, 1, heads * world, heads * world, head)
    kept = saved(sizes, "ulysses", world, tokens=rows * world, stock_norms=False)
    # Of the formula's layer only the block: without the feed-forward network, the norms' inputs and outputs (4d).
    formula = sum(kept.values()) - 4 * rows * (4 * width + 4)
    return {
        "saved": saved_for_backward(call, (x, *weights, output)),
        "formula": formula,
        "peak": peak / x.nbytes,
        "largest": largest / x.nbytes,
    }


def given_at_once(rank: int, world: int, groups: int) -> tuple[list[float], list[float]]:
    """Forward and backward: what a rank gives of its weights at each stage, in parts of all of them."""
    from odysseus_kernels.ops._ulysses_heads import BackwardHeads, ForwardHeads

    problem = Problem(rows=8, heads=8, kv_heads=4)
    mine = {name: tensor.requires_grad_() for name, tensor in inputs(problem, rank, world, torch.float32).items()}
    whole_bytes = sum(mine[name].nbytes for name in ("wq", "wk", "wv", "wo"))
    found: dict[type, list[float]] = {ForwardHeads: [], BackwardHeads: []}
    kept = {kind: kind.exchange for kind in found}

    def noted(self: Any, stage: int, shared: tuple[Tensor, ...]) -> Any:
        found[type(self)].append(sum(one.nbytes for one in shared) / whole_bytes)
        return kept[type(self)](self, stage, shared)

    try:
        for kind in found:
            kind.exchange = noted  # type: ignore[attr-defined]
        apply(mine, settings_of(problem, world, torch.float32, groups)).sum().backward()
    finally:
        for kind, method in kept.items():
            kind.exchange = method  # type: ignore[attr-defined]
    return found[ForwardHeads], found[BackwardHeads]


def order_of_work(rank: int, world: int) -> list[list[str]]:
    """For each exchange of forward what is done at each of its visits, attention by its heads."""
    from odysseus_kernels.ops._ulysses_heads import ForwardHeads

    said: list[list[str]] = []
    attend, exchange = ForwardHeads._attend, ForwardHeads.exchange

    def noted_attend(self: ForwardHeads, unit: _ulysses_groups.Unit) -> None:
        said[-1].append(f"heads {unit.kv_heads.start}, rows {unit.rows.start}")
        attend(self, unit)

    def noted_exchange(self: ForwardHeads, stage: int, shared: tuple[Tensor, ...]) -> Any:
        said.append([])
        made = exchange(self, stage, shared)

        def visit(source: int, given: tuple[Tensor, ...], made_for: tuple[Tensor, ...]) -> None:
            said[-1].append(f"visit {source}")
            made.visit(source, given, made_for)

        return dataclasses.replace(made, visit=visit)

    problem = Problem(rows=8, heads=4, kv_heads=2, batch=1)
    mine = inputs(problem, rank, world, torch.float32)
    ForwardHeads._attend, ForwardHeads.exchange = noted_attend, noted_exchange  # type: ignore[method-assign]
    try:
        with units_of(4):
            apply(mine, settings_of(problem, world, torch.float32, 2))
    finally:
        ForwardHeads._attend, ForwardHeads.exchange = attend, exchange  # type: ignore[method-assign]
    return said
