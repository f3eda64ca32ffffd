"""What ranks run in the tests of the pipelined attention block: against the same block in fp64, unsharded."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from ring_tiles import tiles_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import odysseus_kernels as ody
from benchmarks.common.memory import peak_of_others, record_allocations
from odysseus_kernels.attention.layout import positions, seen_parts, striped_positions, visible
from odysseus_kernels.ops._attention_pieces import Settings
from odysseus_kernels.planner.ring import ring_peers
from odysseus_kernels.testing.compare import assert_close_to_truth, nan_empty

WIDTH, HEAD = 24, 8


@dataclasses.dataclass
class Problem:
    """One case; ``rows`` is what each of the ranks holds of the sequence, ``ring`` * N of them."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 1
    rows: int = 16
    pieces: int | list[int] = 4
    bias: bool = False
    norms: bool = False
    rotation: bool = True
    documents: bool = False
    key_mask: bool = False
    window: int | None = None
    gathered: str = "regather"
    ring: int = 1
    seed: int = 0

    def tensors(self, world: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Of the whole sequence and all heads; ``heads`` of them are each rank's."""
        generator = torch.Generator().manual_seed(self.seed + 100 * world)
        size = world // self.ring
        queries, keys, length = self.heads * size * HEAD, self.kv_heads * size * HEAD, self.rows * world

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

        found = {
            "x": random(self.batch, length, WIDTH),
            "wq": random(queries, WIDTH, scale=WIDTH**-0.5),
            "wk": random(keys, WIDTH, scale=WIDTH**-0.5),
            "wv": random(keys, WIDTH, scale=WIDTH**-0.5),
            "wo": random(WIDTH, queries, scale=queries**-0.5),
        }
        if self.bias:
            found |= {"bq": random(queries), "bk": random(keys), "bv": random(keys), "bo": random(WIDTH)}
        if self.norms:
            found |= {"nq": 1 + random(HEAD, scale=0.3), "nk": 1 + random(HEAD, scale=0.3)}
        return found | {"grad": random(self.batch, length, WIDTH)}

    def tables(self, world: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if not self.rotation:
            return None
        angles = torch.arange(self.rows * world)[:, None] / 50 ** (torch.arange(HEAD // 2) / (HEAD // 2))
        angles = torch.cat((angles, angles), dim=-1)[None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def ids(self, world: int) -> Tensor | None:
        if not self.documents:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.rand(self.batch, self.rows * world, generator=generator) < 0.1).cumsum(1)

    def seen_keys(self, world: int) -> Tensor | None:
        if not self.key_mask:
            return None
        length = self.rows * world
        mask = torch.rand(self.batch, length, generator=torch.Generator().manual_seed(self.seed)) < 0.7
        mask[0] = torch.arange(length) >= length // 3  # left padding: the first queries see nothing
        return mask


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def normed(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def whole(problem: Problem, world: int, dtype: torch.dtype, precision: torch.dtype) -> dict[str, Tensor]:
    """y and all gradients of the block on the whole sequence, from inputs in ``dtype``, computed in ``precision``."""
    t = {name: one.to(precision).requires_grad_() for name, one in problem.tensors(world, dtype).items()}
    grad = t.pop("grad").detach()
    q, k, v = (F.linear(t["x"], t[f"w{n}"], t.get(f"b{n}")).unflatten(-1, (-1, HEAD)).transpose(1, 2) for n in "qkv")
    if problem.norms:
        q, k = normed(q, t["nq"]), normed(k, t["nk"])
    tables = problem.tables(world, precision)
    if tables is not None:
        q, k = turned(q, *tables), turned(k, *tables)
    where, ids, keys = torch.arange(problem.rows * world), problem.ids(world), problem.seen_keys(world)
    seen = visible(where, where, ids, ids, causal=True, window=problem.window)
    seen = (seen if keys is None else seen & keys[:, None])[:, None]
    shared = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(shared, 1).mT / math.sqrt(HEAD)
    probabilities = scores.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen, 0)
    out = (probabilities @ v.repeat_interleave(shared, 1)).transpose(1, 2).flatten(2)
    y = F.linear(out, t["wo"], t.get("bo"))
    return {"y": y.detach()} | dict(zip(t, torch.autograd.grad(y, list(t.values()), grad), strict=True))


def part(name: str, tensor: Tensor, rank: int, world: int, where: Tensor, ring: int) -> Tensor:
    """What a rank has of a whole tensor, or of its gradient; norms' gradients are those of its heads."""
    size = world // ring
    if name in ("x", "y", "grad"):
        return tensor[:, where]
    if name == "wo":
        return tensor.chunk(size, 1)[rank % size]
    return tensor if name in ("bo", "nq", "nk") else tensor.chunk(size, 0)[rank % size]


def where_of(problem: Problem, rank: int, world: int) -> Tensor:
    """Positions of a rank's tokens."""
    size = world // problem.ring
    own = positions(rank // size, problem.ring, problem.rows * world, "zigzag")
    if isinstance(problem.pieces, int):
        return own[striped_positions(rank % size, size, own.shape[0], problem.pieces)]
    found, start = [], 0
    for rows in problem.pieces:
        found.append(own[start + rank % size * rows : start + (rank % size + 1) * rows])
        start += rows * size
    return torch.cat(found)


@functools.cache
def groups(world: int, ring: int) -> tuple[Any, Any]:
    """Groups of seq and of the ring."""
    if ring == 1:
        return init_device_mesh("cpu", (world,), mesh_dim_names=("seq",)).get_group(), None
    mesh = init_device_mesh("cpu", (ring, world // ring), mesh_dim_names=("ring", "seq"))
    return mesh.get_group("seq"), mesh.get_group("ring")


def block(problem: Problem, rank: int, world: int, dtype: torch.dtype, config: ody.OverlapConfig) -> dict[str, Tensor]:
    """This rank's y and gradients."""
    mine = inputs(problem, rank, world, dtype)
    grad = mine.pop("grad")
    for one in mine.values():
        one.requires_grad_()
    with nan_empty():
        y = call(problem, mine, rank, world, config)
        return {"y": y.detach()} | dict(zip(mine, torch.autograd.grad(y, list(mine.values()), grad), strict=True))


def inputs(problem: Problem, rank: int, world: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """This rank's, and the gradient of its y."""
    where, ring = where_of(problem, rank, world), problem.ring
    return {n: part(n, t, rank, world, where, ring).clone() for n, t in problem.tensors(world, dtype).items()}


def settings_of(problem: Problem, rank: int, world: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments beside tensors and norms."""
    size, (group, ring) = world // problem.ring, groups(world, problem.ring)
    tables = problem.tables(world, dtype)
    own = positions(rank // size, problem.ring, problem.rows * world, "zigzag")
    return {
        "group": group,
        "ring": ring,
        "head_dim": HEAD,
        "pieces": problem.pieces,
        "rotation": None if tables is None else tuple(table[:, own] for table in tables),
        "documents": problem.ids(world),
        "key_mask": problem.seen_keys(world),
        "window": problem.window,
    }


def apply(mine: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    norms = (mine["nq"], mine["nk"]) if "nq" in mine else None
    return ody.pipelined_attention(
        mine["x"],
        (mine["wq"], mine["wk"], mine["wv"]),
        mine["wo"],
        (mine["bq"], mine["bk"], mine["bv"]) if "bq" in mine else None,
        mine.get("bo"),
        **{"head_norms": norms, **settings},
    )


def call(
    problem: Problem, mine: dict[str, Tensor], rank: int, world: int, config: ody.OverlapConfig, **more: Any
) -> Tensor:
    return apply(mine, {**settings_of(problem, rank, world, mine["x"].dtype), "config": config, **more})


def check(
    rank: int, world: int, dtype: str, modes: tuple[tuple[str, str], ...], problems: list[dict[str, Any]]
) -> None:
    """Every problem in every (transport, mode); gradients of norms are added over the ranks first."""
    kind = getattr(torch, dtype)
    for case in (Problem(**problem) for problem in problems):
        where = where_of(case, rank, world)
        truth = whole(case, world, kind, torch.float64)
        baseline = whole(case, world, kind, kind) if kind.itemsize == 2 else None
        for transport, mode in modes:
            config = ody.OverlapConfig(mode=mode, transport=transport, gathered=case.gathered, timeout_s=60)
            found = block(case, rank, world, kind, config)
            again = block(case, rank, world, kind, config)
            for name, tensor in found.items():
                assert torch.equal(tensor, again[name]), f"{name} differs from run to run"
                if name in ("nq", "nk"):
                    torch.distributed.all_reduce(tensor)
                elif case.ring > 1 and name not in ("x", "y"):  # used for other tokens on other ring ranks
                    torch.distributed.all_reduce(tensor, group=groups(world, case.ring)[1])
                wanted = part(name, truth[name], rank, world, where, case.ring)
                usual = None if baseline is None else part(name, baseline[name], rank, world, where, case.ring)
                # Sums of at most L terms, several in a row.  16 bits: projections, norm, rotation, attention's output
                # and the partial sums are rounded on the way there, and as many gradients on the way back: 12.  What an
                # unsharded run in that type loses says more, where there are enough elements for a ratio of errors.
                assert_close_to_truth(
                    tensor,
                    wanted,
                    dtype=kind,
                    terms=16 * max(64, case.rows * world),
                    roundings=12,
                    baseline=usual if tensor.numel() >= 256 else None,
                    name=f"{name} of {case}, {transport}, {mode}, rank {rank}",
                )


def check_parts(
    rank: int, world: int, dtype: str, modes: tuple[tuple[str, str], ...], tile: int, problems: list[dict[str, Any]]
) -> None:
    """The same where a ring rank's keys are cut into parts of some tiles of so many tokens."""
    with tiles_of(tile):
        check(rank, world, dtype, modes, problems)


def ring_bytes(rank: int, world: int, transport: str, tile: int, problem: dict[str, Any]) -> list[tuple[int, int]]:
    """What a ring rank sends of keys and values, and their gradients, forward and backward: recorded, and by hand."""
    case, config = Problem(**problem), ody.OverlapConfig(transport=transport, timeout_s=60)
    size, ids = world // case.ring, case.ids(world)
    tokens = case.rows * size
    with tiles_of(tile), ody.CommRecorder() as record:
        block(case, rank, world, torch.float32, config)
        parts = seen_parts(case.ring, tokens, "zigzag", causal=True, window=case.window, documents=ids)
    peers = ring_peers(parts, rank // size)
    elements = case.batch * 2 * inputs(case, rank, world, torch.float32)["wk"].shape[0] * tokens
    expected = {"forward": 4 * peers.served * elements, "backward": 4 * (peers.served + peers.visited) * elements}
    return [(record.bytes(operator="ring_attention", phase=phase), int(count)) for phase, count in expected.items()]


def graphs(rank: int, world: int) -> None:
    """opcheck, torch.compile with fullgraph, activation checkpointing: the same bits as without."""
    torch.manual_seed(rank)
    problem = Problem(bias=True, norms=True, rows=8, pieces=2, documents=True)
    config = ody.OverlapConfig(timeout_s=60)
    mine = inputs(problem, rank, world, torch.float32)
    grad = mine.pop("grad")
    names = list(mine)
    settings = {**settings_of(problem, rank, world, torch.float32), "config": config}

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
    for mask in range(1, 2 ** len(names), 7):
        leaves = [mine[name].clone().requires_grad_(bool(mask >> i & 1)) for i, name in enumerate(names)]
        run(*leaves).backward(grad)
        for index, one in enumerate(leaves):
            if one.requires_grad:  # a bias's sum is cut into other parts where no weight wants the gathered x
                torch.testing.assert_close(one.grad, expected[index + 1], rtol=1e-5, atol=1e-5)
            else:
                assert one.grad is None
    key = Settings(HEAD, (0, 4, 8), 1e-6, None, 0.3, 0.0, 0, 0, "sdpa").key()
    leaves = [mine[name].clone().requires_grad_() for name in ("x", "wq", "wk", "wv", "bq", "bk", "bv", "wo", "bo")]
    x, wq, wk, wv, bq, bk, bv, wo, bo = leaves
    for keep in (False, True):
        torch.library.opcheck(
            torch.ops.odysseus.pipelined_attention.default,
            (
                x, [wq, wk, wv], [bq, bk, bv], [True] * 3, wo, bo, [], [], None,
                groups(world, 1)[0].group_name, "", config.key(), key, keep, [], "",
            ),
        )  # fmt: skip


def dropped(rank: int, world: int) -> None:
    """Dropout is that of heads and positions, not of ranks and pieces: what another number of pieces gives."""
    found = []
    for pieces in (1, 4):
        problem = Problem(rows=8, pieces=pieces, window=9, heads=1)
        mine = inputs(problem, rank, world, torch.float64)
        grad = mine.pop("grad")
        for one in mine.values():
            one.requires_grad_()
        config = ody.OverlapConfig(timeout_s=60)
        y = call(problem, mine, rank, world, config, dropout=0.4, dropout_seed=3, first_head=rank)
        rows = [torch.cat([y, *torch.autograd.grad(y, mine["x"], grad)], -1)]
        whole_rows = torch.empty(problem.batch, problem.rows * world, rows[0].shape[-1], dtype=torch.float64)
        parts = [torch.empty_like(rows[0]) for _ in range(world)]
        torch.distributed.all_gather(parts, rows[0].detach())
        for source, one in enumerate(parts):
            whole_rows[:, where_of(problem, source, world)] = one
        found.append(whole_rows)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    plain = call(problem, mine, rank, world, ody.OverlapConfig(timeout_s=60))
    assert not torch.allclose(plain, y), "something is dropped"


def private_memory(rank: int, world: int, pieces: int) -> dict[str, float]:
    """The most that a step holds beside inputs, outputs and gradients, and the largest allocation; in shards of x."""
    rows, width, head = 1024, 512, 64
    torch.manual_seed(0)
    x = torch.randn(1, rows, width, requires_grad=True)
    heads = 2  # of this rank: q, k, v, out are an eighth of what is as long and as wide as x
    weights = [torch.randn(heads * head, width, requires_grad=True) for _ in range(3)]
    output = torch.randn(width, heads * head, requires_grad=True)
    config = ody.OverlapConfig(transport="collective", timeout_s=60)
    grad = torch.randn_like(x)

    def step() -> list[Tensor]:
        y = ody.pipelined_attention(x, weights, output, group=None, head_dim=head, pieces=pieces, config=config)
        return [y.detach(), *torch.autograd.grad(y, [x, *weights, output], grad)]

    step()
    results, events = record_allocations(step)
    peak, largest = peak_of_others(events, {one.untyped_storage().data_ptr() for one in results})
    return {"peak": peak / x.nbytes, "largest": largest / x.nbytes}
