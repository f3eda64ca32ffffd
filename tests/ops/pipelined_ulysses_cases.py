"""What ranks run in the tests of Ulysses' attention block: against the same block in fp64, unsharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from pipelined_cases import HEAD, WIDTH, Problem, turned, whole
from pipelined_refusal_cases import DIFFERENCES, MORE_REFUSALS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import odysseus_kernels as ody
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.ops import _ulysses_groups
from odysseus_kernels.ops._attention_pieces import Settings
from odysseus_kernels.testing.compare import assert_close_to_truth, nan_empty

NORMS = ("nq", "nk")


def part(name: str, tensor: Tensor, rank: int, world: int) -> Tensor:
    """What a rank has of a whole tensor, or of its gradient; norms' gradients are those of its heads."""
    if name in NORMS:
        return tensor
    dim = 1 if name in ("x", "y", "grad", "wo") else 0
    return tensor.chunk(world, dim)[rank]


def inputs(problem: Problem, rank: int, world: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """This rank's, and the gradient of its y."""
    return {n: part(n, t, rank, world).clone() for n, t in problem.tensors(world, dtype).items()}


def settings_of(problem: Problem, world: int, dtype: torch.dtype, groups: int) -> dict[str, Any]:
    """Arguments beside tensors and norms."""
    return {
        "group": None,
        "head_dim": HEAD,
        "head_groups": groups,
        "rotation": problem.tables(world, dtype),
        "documents": problem.ids(world),
        "key_mask": problem.seen_keys(world),
        "window": problem.window,
    }


def apply(mine: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    return ody.pipelined_ulysses(
        mine["x"],
        (mine["wq"], mine["wk"], mine["wv"]),
        mine["wo"],
        (mine["bq"], mine["bk"], mine["bv"]) if "bq" in mine else None,
        mine.get("bo"),
        **{"head_norms": (mine["nq"], mine["nk"]) if "nq" in mine else None, **settings},
    )


@contextlib.contextmanager
def units_of(rows: int | None) -> Iterator[None]:
    """Units of fewer queries, as far longer sequences have more of them."""
    before = _ulysses_groups._LEAST_ROWS
    _ulysses_groups._LEAST_ROWS = before if rows is None else rows
    try:
        yield
    finally:
        _ulysses_groups._LEAST_ROWS = before


def block(mine: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """This rank's y and gradients."""
    leaves = {name: one.clone().requires_grad_() for name, one in mine.items() if name != "grad"}
    with nan_empty():
        y = apply(leaves, settings)
        return {"y": y.detach()} | dict(
            zip(leaves, torch.autograd.grad(y, list(leaves.values()), mine["grad"]), strict=True)
        )


def check(
    rank: int,
    world: int,
    dtype: str,
    modes: tuple[tuple[str, str], ...],
    problems: list[tuple[dict[str, Any], int]],
    rows: int | None = None,
) -> None:
    """Every problem and number of groups in every (transport, mode); norms' gradients are added over ranks first."""
    kind = getattr(torch, dtype)
    for fields, groups in problems:
        case = Problem(**fields)
        truth = whole(case, world, kind, torch.float64)
        baseline = whole(case, world, kind, kind) if kind.itemsize == 2 else None
        mine = inputs(case, rank, world, kind)
        for transport, mode in modes:
            config = ody.OverlapConfig(mode=mode, transport=transport, timeout_s=60)
            settings = {**settings_of(case, world, kind, groups), "config": config}
            with units_of(rows):
                found, again = block(mine, settings), block(mine, settings)
            for name, tensor in found.items():
                assert torch.equal(tensor, again[name]), f"{name} differs from run to run"
                if name in NORMS:
                    torch.distributed.all_reduce(tensor)
                # Sums and roundings as in pipelined_cases.check: the same products in another order.
                assert_close_to_truth(
                    tensor,
                    part(name, truth[name], rank, world),
                    dtype=kind,
                    terms=16 * max(64, case.rows * world),
                    roundings=12,
                    baseline=None
                    if baseline is None or tensor.numel() < 256
                    else part(name, baseline[name], rank, world),
                    name=f"{name} of {case}, {groups} groups, {transport}, {mode}, rank {rank}",
                )


def groups_agree(rank: int, world: int) -> None:
    """Any number of groups, and of units of attention: the same y and gradients within rounding."""
    problem = Problem(rows=12, heads=8, kv_heads=4, bias=True, norms=True)
    mine = inputs(problem, rank, world, torch.float64)
    for transport in ("symmetric", "collective"):
        config = ody.OverlapConfig(transport=transport, timeout_s=60)
        found = []
        for groups in (1, 2, 4):
            for rows in (None, 5):
                with units_of(rows):
                    found.append(block(mine, {**settings_of(problem, world, torch.float64, groups), "config": config}))
        for other in found[1:]:
            for name, expected in found[0].items():
                # fp64: 1e-16 relative for each of a few hundred additions.
                torch.testing.assert_close(other[name], expected, rtol=1e-11, atol=1e-11, msg=f"{name}, {transport}")


def choices(rank: int, world: int) -> list[str]:
    """Phases for which a mode was chosen, once for each."""
    problem = Problem(rows=8, heads=4, kv_heads=2, documents=True)
    settings = {**settings_of(problem, world, torch.float32, 2), "config": ody.OverlapConfig(timeout_s=60)}
    group = torch.distributed.new_group()
    leaves = {n: t.requires_grad_() for n, t in inputs(problem, rank, world, torch.float32).items() if n != "grad"}
    for seed in range(3):
        documents = settings["documents"].roll(seed, 1).sort(1).values
        changed = {**settings, "group": group, "documents": documents, "dropout": 0.5, "dropout_seed": seed}
        apply(leaves, changed).sum().backward()
    transports = group_transports(group)
    assert transports._selection is not None
    keys = [decision.key for decision in transports._selection.decisions]
    torch.distributed.barrier()
    transports.close()
    torch.distributed.destroy_process_group(group)
    return sorted(key.phase for key in keys if key.operator == "pipelined_ulysses")


def graphs(rank: int, world: int) -> None:
    """opcheck, torch.compile with fullgraph, activation checkpointing: the same bits as without."""
    problem = Problem(bias=True, norms=True, rows=8, heads=4, kv_heads=2, documents=True)
    config = ody.OverlapConfig(timeout_s=60)
    mine = inputs(problem, rank, world, torch.float32)
    grad = mine.pop("grad")
    names = list(mine)
    settings = {**settings_of(problem, world, torch.float32, 2), "config": config}

    def run(*tensors: Tensor) -> Tensor:
        return apply(dict(zip(names, tensors, strict=True)), settings).sin()

    def gradients(function: Any) -> list[Tensor]:
        leaves = [mine[name].clone().requires_grad_() for name in names]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    expected = gradients(run)
    for function in (
        torch.compile(run, fullgraph=True, backend="aot_eager"),
        lambda *leaves: checkpoint(run, *leaves, use_reentrant=False),
        lambda *leaves: checkpoint(run, *leaves, use_reentrant=False, context_fn=ody.selective_checkpoint),
    ):
        for one, other in zip(gradients(function), expected, strict=True):
            assert torch.equal(one, other)
    for mask in range(1, 2 ** len(names), 37):
        leaves = [mine[name].clone().requires_grad_(bool(mask >> i & 1)) for i, name in enumerate(names)]
        run(*leaves).backward(grad)
        for index, one in enumerate(leaves):
            if one.requires_grad:
                # fp32 rounding: last bits differ where less travels, probably by where operands lie in memory.
                torch.testing.assert_close(one.grad, expected[index + 1], rtol=1e-5, atol=1e-5)
            else:
                assert one.grad is None
    key = Settings(HEAD, (0, 8), 1e-6, None, 0.3, 0.0, 0, 0, "sdpa").key()
    x, wq, wk, wv, bq, bk, bv, wo, bo = (
        mine[name].clone().requires_grad_() for name in ("x", "wq", "wk", "wv", "bq", "bk", "bv", "wo", "bo")
    )
    for keep in (False, True):
        torch.library.opcheck(
            torch.ops.odysseus.pipelined_ulysses.default,
            (
                x, [wq, wk, wv], [bq, bk, bv], [True] * 3, wo.requires_grad_(keep), bo, [], [], None,
                torch.distributed.group.WORLD.group_name, config.key(), key, 2, keep, [], "",
            ),
        )  # fmt: skip


def dropped(rank: int, world: int) -> None:
    """Dropout is that of heads and positions: what one process with the same seed and all heads drops."""
    problem = Problem(rows=8, window=9, heads=4, kv_heads=2)
    mine = inputs(problem, rank, world, torch.float64)
    tensors = problem.tensors(world, torch.float64)
    q, k, v = (F.linear(tensors["x"], tensors[f"w{n}"]).unflatten(-1, (-1, HEAD)).transpose(1, 2) for n in "qkv")
    q, k = (turned(one, *problem.tables(world, torch.float64)) for one in (q, k))
    alone = torch.distributed.new_subgroups(1)[0]
    out = ody.ring_attention(q, k, v, group=alone, window=9, scale=HEAD**-0.5, dropout=0.4, dropout_seed=3)
    truth = F.linear(out.transpose(1, 2).flatten(2), tensors["wo"])
    for groups in (1, 2):
        for rows in (None, 5):
            settings = settings_of(problem, world, torch.float64, groups)
            with units_of(rows):
                y = apply(mine, {**settings, "dropout": 0.4, "dropout_seed": 3})
            # fp64: 1e-16 relative for each of a few hundred additions.
            torch.testing.assert_close(y, part("y", truth, rank, world), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(apply(mine, settings), y), "something is dropped"


def refusals(rank: int, world: int) -> list[str]:
    """Messages of bad input; nothing is sent."""
    problem = Problem(rows=8, heads=4, kv_heads=2)
    mine = inputs(problem, rank, world, torch.float32)
    settings = settings_of(problem, world, torch.float32, 2)
    wide = torch.zeros(1, 3, HEAD)
    changes: tuple[tuple[dict[str, Tensor], dict[str, Any]], ...] = (
        ({}, {"head_groups": 3}),
        ({}, {"head_groups": 0}),
        ({}, {"head_groups": "all"}),
        ({}, {"head_dim": 5}),
        ({}, {"rotation": (wide, wide)}),
        ({}, {"kernel": "eager"}),
        ({}, {"dropout": 0.5}),
        *MORE_REFUSALS,
        ({}, {"config": ody.OverlapConfig(mode="tiles", timeout_s=60)}),
        ({"bo": torch.zeros(WIDTH)}, {}),
        ({"x": mine["x"][0]}, {}),
        ({"wo": mine["wo"][:, 1:]}, {}),
    )
    found = []
    for tensors, more in changes:
        with CommRecorder() as record:
            try:
                apply({**mine, **tensors}, {**settings, **more})
            except ValueError as error:
                found.append(str(error))
            else:
                found.append("no error")
        assert not record.rows()
    return found


def odd_rank(rank: int, world: int, what: str, transport: str) -> str:
    """The error of a step in which rank 1 differs: no shape of what travels would say so of most."""
    plain = what == "head_dim"
    problem = Problem(rows=8, heads=4, kv_heads=2, documents=True, bias=True, norms=not plain, rotation=not plain)
    other = {**DIFFERENCES, "groups": {"head_groups": 1}}
    config = ody.OverlapConfig(transport=transport, timeout_s=60)  # type: ignore[arg-type]
    settings = {**settings_of(problem, world, torch.float32, 2), "config": config}
    mine = inputs(problem, rank, world, torch.float32)
    grad, odd = mine.pop("grad"), rank == 1
    biases = (mine["bq"], mine["bk"], mine["bv"])
    if what == "bias":  # of as many features
        biases = (biases[0], None, biases[2]) if odd else (biases[0], biases[1], None)
    trained = [mine[name] for name in ("x", "wq", "wk", "wv", "wo")]
    if what == "frozen":
        trained = [mine["wk"] if odd else mine["wv"]]
    elif what == "frozen bias":
        trained = [mine["bk"] if odd else mine["bv"]]
    for one in trained:
        one.requires_grad_()
    norms = None if plain else (mine["nq"], mine["nk"])
    more = {"head_norms": norms, **settings, **(other.get(what, {}) if odd else {})}
    try:
        ody.pipelined_ulysses(
            mine["x"], (mine["wq"], mine["wk"], mine["wv"]), mine["wo"], biases, mine["bo"], **more
        ).backward(grad)
    except ody.RankMismatchError as error:
        return str(error)
    return "no error"
