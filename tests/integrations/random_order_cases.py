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
from random_cases import RIGHT, TIMEOUT_S
from random_order_programs import PROGRAMS, Order, Side
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import odysseus_kernels as ody

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
    return model, lambda: PROGRAMS.get(use.sort, PROGRAMS["right"])(side), mesh


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
