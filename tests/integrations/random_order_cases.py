"""Random types, meshes, replicas and orders of calls: what each rank gets, and whether the ranks can go on."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from failure_cases import restart
from family_cases import Case, fully_sharded, replicated, whole
from random_cases import RIGHT, TIMEOUT_S, Use
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import odysseus_kernels as ody

PARTS = ("lm_head", "model.norm", "mlp", "embed_tokens", "self_attn")


@dataclasses.dataclass(frozen=True)
class Order(Use):
    """A use of a sort of its own, ``variant`` of it, with the step in ``ody.step`` or without."""

    variant: int = 0
    stepped: bool = True

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        """The first and further batches of this use, all whole."""
        return dataclasses.replace(self, seed=self.seed + number).whole()


@dataclasses.dataclass
class Side:
    """The model of one process or of ranks, and how it takes a whole batch; ``odd`` is the rank that does otherwise."""

    use: Order
    model: Any
    give: Callable[[dict[str, torch.Tensor]], dict[str, Any]]
    odd: bool = False

    def loss(self, number: int = 0, change: Callable[[dict[str, Any]], Any] | None = None, **settings: Any) -> Any:
        """Of the batch of this number, which ``change`` has changed before it is cut."""
        batch = self.use.batch(number)
        if change is not None:
            change(batch)
        return self.model(**self.give(batch), **{**self.use.settings(), **settings}).loss


def _two_forwards(side: Side) -> Any:
    first, second = side.loss(0), side.loss(1)
    if side.use.variant % 5 == 4:
        (first + second).backward()
    for loss in ((first,), (second,), (first, second), (second, first), ())[side.use.variant % 5]:
        loss.backward()
    return first + second


def _backward_twice(side: Side) -> Any:
    loss = side.loss()
    loss.backward(retain_graph=True)
    loss.backward()
    return loss


def _evaluation_between(side: Side) -> Any:
    loss = side.loss()
    with torch.inference_mode() if side.use.variant % 2 else torch.no_grad():
        other = side.loss(1)
    loss.backward()
    return loss + other


def _accumulates(side: Side) -> Any:
    losses = []
    for number in range(2):
        losses.append(side.loss(number))
        losses[-1].backward()
    return sum(losses)


def _eval(side: Side) -> Any:
    side.model.eval()
    try:
        loss = side.loss()
        loss.backward()
    finally:
        side.model.train()
    return loss


def _eval_one(side: Side) -> Any:
    return _eval(side) if side.odd else _right(side)


def _right(side: Side, **settings: Any) -> Any:
    loss = side.loss(**settings)
    loss.backward()
    return loss


def _no_grad_one(side: Side) -> Any:
    with torch.no_grad() if side.odd else contextlib.nullcontext():
        loss = side.loss()
    if loss.requires_grad or side.use.variant % 2:
        loss.backward()
    return loss


def _skips_backward(side: Side) -> Any:
    loss = side.loss()
    if not side.odd:
        loss.backward()
    return loss


def _backward_alone(side: Side) -> Any:
    """One rank of two forwards takes the other loss, or goes backward twice."""
    first, second = side.loss(0), side.loss(1)
    (second if side.odd else first).backward()
    return first + second


def _evaluates_alone(side: Side) -> Any:
    if side.odd:
        with torch.no_grad():
            side.loss(side.use.variant % 2)
    return _right(side)


def _late_backward(side: Side) -> Any:
    loss = side.loss()
    if side.odd:
        time.sleep(0.2)
    loss.backward()
    return loss


def _checkpoints(side: Side) -> Any:
    side.model.gradient_checkpointing_enable({"use_reentrant": bool(side.use.variant % 2)})
    try:
        return _right(side)
    finally:
        side.model.gradient_checkpointing_disable()


def _checkpoints_one(side: Side) -> Any:
    return _checkpoints(side) if side.odd else _right(side)


def _scaled(side: Side) -> Any:
    loss = side.loss()
    (loss * 2).backward()
    return loss


def _scaled_one(side: Side) -> Any:
    return _scaled(side) if side.odd else _right(side)


def _autograd_grad(side: Side) -> Any:
    loss, parameters = side.loss(), list(side.model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    return loss


def _part(side: Side) -> str:
    return PARTS[side.use.variant % len(PARTS)]


def _frozen(side: Side) -> Any:
    chosen = [p for name, p in side.model.named_parameters() if _part(side) in name]
    for parameter in chosen:
        parameter.requires_grad_(False)
    try:
        return _right(side)
    finally:
        for parameter in chosen:
            parameter.requires_grad_(True)


def _frozen_one(side: Side) -> Any:
    return _frozen(side) if side.odd else _right(side)


def _autocast(side: Side) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        loss = side.loss()
    loss.backward()
    return loss


def _autocast_one(side: Side) -> Any:
    return _autocast(side) if side.odd else _right(side)


def _model_cast_one(side: Side) -> Any:
    if side.odd:
        side.model.to((torch.bfloat16, torch.float64)[side.use.variant % 2])
    return _right(side)


def _part_cast(side: Side) -> Any:
    for name, module in side.model.named_modules():
        if name.endswith(_part(side)):
            module.to(torch.float64)
    return _right(side)


def _part_cast_one(side: Side) -> Any:
    return _part_cast(side) if side.odd else _right(side)


def _types(side: Side) -> Any:
    """Other types of what a batch holds, which are no other values."""
    kind = side.use.variant % 5
    casts = {
        0: ("input_ids", torch.int32),
        1: ("labels", torch.int32),
        2: ("attention_mask", torch.bool),
        3: ("attention_mask", torch.float32),
        4: ("position_ids", torch.int32),
    }
    name, dtype = casts[kind]

    def change(batch: dict[str, Any]) -> None:
        if name in batch and side.model.sequence_group is not None:
            batch[name] = batch[name].to(dtype)

    return _right(side, change=change if hasattr(side.model, "sequence_group") else None)


def _types_one(side: Side) -> Any:
    return _types(side) if side.odd else _right(side)


def _items_types(side: Side) -> Any:
    made = (13.0, torch.tensor(13.0), torch.tensor([13.0], dtype=torch.float64), torch.tensor(13, dtype=torch.int32))
    return _right(side, num_items_in_batch=made[side.use.variant % 4])


PROGRAMS: dict[str, Callable[[Side], Any]] = {
    "two_forwards": _two_forwards,
    "backward_twice": _backward_twice,
    "evaluation_between": _evaluation_between,
    "accumulates": _accumulates,
    "eval": _eval,
    "eval_one": _eval_one,
    "no_grad_one": _no_grad_one,
    "skips_backward": _skips_backward,
    "backward_alone": _backward_alone,
    "evaluates_alone": _evaluates_alone,
    "late_backward": _late_backward,
    "checkpoints": _checkpoints,
    "checkpoints_one": _checkpoints_one,
    "scaled": _scaled,
    "scaled_one": _scaled_one,
    "autograd_grad": _autograd_grad,
    "frozen": _frozen,
    "frozen_one": _frozen_one,
    "autocast": _autocast,
    "autocast_one": _autocast_one,
    "double": _right,
    "model_cast_one": _model_cast_one,
    "part_cast": _part_cast,
    "part_cast_one": _part_cast_one,
    "types": _types,
    "types_one": _types_one,
    "items_types": _items_types,
}
"""What is done with a model, by its sort; the single process does it with a stock one."""

MESHES = ("permuted", "cut_elsewhere", "cut_elsewhere_one", "subsets")
REPLICAS = ("replicas", "replicas_accumulate", "replica_raises", "rank_forgets_items")
SORTS = (*PROGRAMS, *MESHES, *REPLICAS)
CHANGED = ("model_cast_one", "part_cast", "part_cast_one")  # models that are of no further use


def case_of(use: Order) -> Case:
    """The model of a use."""
    return dataclasses.replace(RIGHT, dtype=torch.float64) if use.sort == "double" else RIGHT


# Meshes and models of this process, until an error that lasts.
_kept: dict[Any, Any] = {}
_numbers = itertools.count()


def _keep(key: Any, make: Callable[[], Any]) -> Any:
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]


def _mesh(world: int, ring: int) -> DeviceMesh:
    names = ("ring", "seq")
    return _keep(("mesh", ring), lambda: init_device_mesh("cpu", (ring, world // ring), mesh_dim_names=names))  # type: ignore[no-any-return]


def _named(world: int, which: int) -> DeviceMesh:
    """Meshes in other orders and of other dimensions, some of them permitted."""
    two = [([1, 0], "seq"), ([[1, 0]], "ring seq"), ([[1], [0]], "ring seq"), ([[0], [1]], "ring seq")]
    four = [
        ([3, 1, 2, 0], "seq"),
        ([[0, 2], [1, 3]], "ring seq"),
        ([[3, 1], [2, 0]], "ring seq"),
        ([[0, 1], [2, 3]], "ring seq"),
        ([[0, 1], [2, 3]], "seq ring"),
        ([[0], [1], [2], [3]], "ring seq"),
    ]
    chosen = two if world == 2 else four
    ranks, names = chosen[which % len(chosen)]
    return _keep(  # type: ignore[no-any-return]
        ("named", which % len(chosen)), lambda: DeviceMesh("cpu", ranks, mesh_dim_names=tuple(names.split()))
    )


def _settings() -> ody.OverlapConfig:
    return ody.OverlapConfig(timeout_s=TIMEOUT_S)


def _parallel(use: Order, mesh: DeviceMesh) -> Any:
    def make() -> Any:
        return ody.parallelize(case_of(use).model(), mesh, use.strategy, _settings())

    if use.sort in CHANGED:
        return make()
    return _keep(("model", use.strategy, id(mesh), use.sort == "double"), make)


def _wrapped(use: Order, mesh: DeviceMesh) -> Any:
    wrap = (fully_sharded, replicated)[use.variant % 2]
    key = ("replica", use.strategy, wrap.__name__)
    return _keep(key, lambda: wrap(ody.parallelize(RIGHT.model(), mesh, use.strategy, _settings()), mesh))


def replica_batches(use: Order, replica: int) -> list[dict[str, torch.Tensor]]:
    """What a replica computes: batches of lengths of its own."""
    longer = dataclasses.replace(use, length=use.length + 3 * replica, seed=use.seed + 10 * replica)
    return [longer.batch(number) for number in range(2 if use.sort == "replicas_accumulate" else 1)]


def _replica_step(use: Order, mesh: DeviceMesh, model: Any, rank: int, odd: bool) -> Any:
    """A step beside another replica, with the number of tokens of both."""
    batches = replica_batches(use, mesh.get_local_rank("dp"))
    items: float | None = ody.num_items_in_batch(batches, mesh, config=_settings())
    if use.sort == "rank_forgets_items" and odd:
        items = None
    total = torch.zeros(())
    for batch in batches:
        part = ody.shard_sequence(batch, mesh, use.strategy)
        if use.sort == "replica_raises" and odd:
            part["input_ids"] = part["input_ids"] + 1000
        loss = model(**part, num_items_in_batch=items).loss
        loss.backward()
        total += loss.detach()
    return total


def _program(use: Order, rank: int, world: int) -> tuple[Any, Callable[[], Any], Any]:
    """The model, what is done with it, and the mesh that its next right batch is cut with."""
    odd = rank == use.odd % world
    if use.sort in REPLICAS:
        sizes = (2, world // 2)
        mesh = _keep("replicas", lambda: init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "seq")))
        model = _wrapped(use, mesh)
        return model, lambda: _replica_step(use, mesh, model, rank, odd), mesh
    if use.sort == "subsets":
        places = torch.arange(world).view(-1, 2).T
        mesh = _keep("subsets", lambda: DeviceMesh("cpu", places, mesh_dim_names=("which", "seq")))["seq"]
        mesh = _keep("subset", lambda: mesh)
    elif use.sort == "permuted":
        mesh = _named(world, use.variant)
    else:
        mesh = _mesh(world, use.ring)
    model, cut_with = _parallel(use, mesh), mesh
    if use.sort == "cut_elsewhere" or (use.sort == "cut_elsewhere_one" and odd):
        cut_with = _named(world, use.variant)

    def give(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        part = ody.shard_sequence(batch, cut_with, use.strategy)
        if use.sort == "subsets" and odd:
            part["input_ids"] = part["input_ids"] + 1000
        return part

    side = Side(use, model, give, odd)
    return model, lambda: PROGRAMS.get(use.sort, _right)(side), mesh


@contextlib.contextmanager
def _told(got: dict[str, Any], name: str) -> Iterator[None]:
    begin = time.monotonic()
    try:
        yield
    except Exception as error:  # noqa: BLE001 - what is looked for
        got[name] = f"{type(error).__name__}: {error}"[:400]
        got["lasting"] = got.get("lasting", False) or bool(getattr(error, "lasting", False))
    got["seconds"] = max(got.get("seconds", 0.0), time.monotonic() - begin)


def _use(use: Order, rank: int, world: int) -> dict[str, Any]:
    got: dict[str, Any] = {}
    model = mesh = None
    if use.sort.startswith("cut_elsewhere"):  # all ranks make it
        _named(world, use.variant)
    with _told(got, "error"):
        model, program, mesh = _program(use, rank, world)
        with ody.step(model) if use.stepped else contextlib.nullcontext():
            loss = program()
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))
        got["loss"], got["norm"] = loss.item(), norm.item()
    if model is None and use.sort != "permuted":
        return got
    if model is None or use.sort in CHANGED:
        use = dataclasses.replace(use, sort="right", ring=1)
        with _told(got, "next_error"):
            mesh = _mesh(world, 1)
            model = _parallel(use, mesh)
    model.zero_grad()
    # A rank whose peers wait for what it does not do learns of it at its next step, and may have to make it again.
    for name in ("next_error", "again_error"):
        with _told(got, name):
            case = case_of(use)
            got["next"] = model(**ody.shard_sequence(case.whole_batch(), mesh, use.strategy)).loss.item()
            break
    return got


def run(rank: int, world: int, uses: list[Order]) -> list[dict[str, Any]]:
    """For each use what this rank got, and its next right step; groups are made again after errors that last."""
    found: list[dict[str, Any]] = []
    for use in uses:
        found.append(_use(use, rank, world))
        # By the store: collectives may be what does not work any more.
        store, number = dist.distributed_c10d._get_default_store(), next(_numbers)
        store.set(f"use {number} {rank}", str(found[-1].get("lasting", False) or "next" not in found[-1]))
        if any(store.get(f"use {number} {other}") == b"True" for other in range(world)):
            _kept.clear()
            restart(rank, world)
    return found
