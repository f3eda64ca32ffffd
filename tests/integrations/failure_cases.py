"""What ranks run where one of them fails in a step of a parallelized model.  Results are (error, message, seconds)."""

from __future__ import annotations

import datetime
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from family_cases import DATA_PARALLEL
from llama_cases import Case
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import odysseus_kernels as ody

CASE = Case(kv_heads=4)
FAULTS = ("id", "label", "hook", "backward", "scaled", "user", "interrupt", "optimizer")


def attempt(function: Callable[[], object]) -> tuple[str, str, float]:
    """What a function raises, and after how many seconds."""
    start = time.perf_counter()
    try:
        function()
    except BaseException as error:  # noqa: BLE001 - which one it is, is the result
        return type(error).__name__, str(error), time.perf_counter() - start
    return "", "", time.perf_counter() - start


def make_mesh(sizes: dict[str, int]) -> DeviceMesh:
    """A mesh of all ranks."""
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def make_model(mesh: DeviceMesh, strategy: str, transport: str, timeout_s: float = 60) -> Any:
    """The parallelized model."""
    return ody.parallelize(CASE.model(), mesh, strategy, ody.OverlapConfig(transport=transport, timeout_s=timeout_s))


def fail(error: BaseException) -> Any:
    """Raises, as a hook."""
    raise error


def step(model: Any, mesh: DeviceMesh, strategy: str, fault: str = "") -> float:
    """A step, in which this rank fails with ``fault``; returns the loss."""
    batch = dict(ody.shard_sequence(CASE.whole_batch(), mesh, strategy))
    handle = None
    if fault == "id":
        batch["input_ids"] = batch["input_ids"] + 1000
    elif fault == "label":
        batch["labels"] = batch["shift_labels"] = batch["shift_labels"].clamp(min=0) + 1000
    elif fault in ("hook", "interrupt"):
        error = KeyboardInterrupt("stopped by hand") if fault == "interrupt" else ZeroDivisionError("of a hook")
        handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: fail(error))
    elif fault in ("backward", "scaled"):
        handle = model.model.layers[1].register_full_backward_hook(lambda *_: fail(ZeroDivisionError("of a hook")))
    try:
        with ody.step(model) if fault in ("user", "optimizer", "with") else torch.enable_grad():
            loss = model(**batch).loss
            if fault == "user":
                raise ZeroDivisionError("of the user")
            (loss / 2 if fault == "scaled" else loss).backward()
            if fault == "optimizer":
                raise ZeroDivisionError("of the user")
    finally:
        if handle is not None:
            handle.remove()
        model.zero_grad()
    return loss.item()


def failing_steps(rank: int, world: int, strategy: str, transport: str, sizes: dict[str, int], bad: int) -> Any:
    """Every fault on one rank, each followed by a step that is right; its loss, and what all faults were."""
    mesh = make_mesh(sizes)
    model = make_model(mesh, strategy, transport)
    results = {}
    for fault in FAULTS[:-1]:
        dist.barrier()  # so that seconds are those of the step
        error = attempt(lambda fault=fault: step(model, mesh, strategy, fault if rank == bad else ""))
        if fault == "id":  # twice in a row
            attempt(lambda fault=fault: step(model, mesh, strategy, fault if rank == bad else ""))
        results[fault] = (*error, step(model, mesh, strategy))
    return results


def late_failure(rank: int, world: int, transport: str, sizes: dict[str, int], bad: int) -> Any:
    """A rank fails when its peers need nothing of it any more: they learn at their next step, one batch further on."""
    mesh = make_mesh(sizes)
    model = make_model(mesh, "odysseus", transport)
    step(model, mesh, "odysseus")
    attempt(lambda: step(model, mesh, "odysseus", "optimizer" if rank == bad else ""))
    if rank != bad:
        attempt(lambda: step(model, mesh, "odysseus"))
    results = [attempt(lambda: step(model, mesh, "odysseus")) for _ in range(2)]
    return results, made_again(rank, world, sizes, transport)


def goes_on(rank: int, world: int, strategy: str, transport: str, sizes: dict[str, int], bad: int) -> Any:
    """A rank fails between forward and backward, catches that and goes on with the next batch."""
    mesh = make_mesh(sizes)
    model = make_model(mesh, strategy, transport)
    step(model, mesh, strategy)
    dist.barrier()
    if rank == bad:
        batch = ody.shard_sequence(CASE.whole_batch(), mesh, strategy)
        model(**batch)
    first = attempt(lambda: step(model, mesh, strategy))
    second = attempt(lambda: step(model, mesh, strategy))
    return first, second, made_again(rank, world, sizes, transport)


def made_again(rank: int, world: int, sizes: dict[str, int], transport: str) -> float:
    """The loss after everything was made again, as errors that last ask for."""
    restart(rank, world)
    mesh = make_mesh(sizes)
    return step(make_model(mesh, "odysseus", transport), mesh, "odysseus")


def restart(rank: int, world: int) -> None:
    """Another default process group instead of the one there is."""
    base = dist.get_process_group_ranks(dist.group.WORLD)
    assert len(base) == world
    restarts[0] += 1
    # A name that no other run has: ranks would look for the processes of a file left behind.
    store, key = dist.distributed_c10d._get_default_store(), f"again {restarts[0]}"
    if rank == 0:
        store.set(key, uuid.uuid4().hex)
    meeting = Path(tempfile.gettempdir()) / f"odysseus-again-{store.get(key).decode()}"
    dist.destroy_process_group()
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timeout)


restarts = [0]


def data_parallel(rank: int, world: int, transport: str, wrapper: str, bad: int, fault: str) -> Any:
    """A fault on one rank, with another replica beside it."""
    sizes = {"dp": 2, "seq": 2}
    mesh = make_mesh(sizes)
    model = make_model(mesh, "odysseus", transport)
    if wrapper:
        DATA_PARALLEL[wrapper](model, mesh)
    step(model, mesh, "odysseus")
    dist.barrier()
    errors, start = ("", "", 0.0), time.perf_counter()
    while not errors[0] and time.perf_counter() < start + 30:
        errors = attempt(lambda: step(model, mesh, "odysseus", fault if rank == bad else ""))
    seconds = time.perf_counter() - start
    later = attempt(lambda: step(model, mesh, "odysseus"))
    return errors[0], errors[1], seconds, later, made_again(rank, world, sizes, transport)


def odd_meshes(rank: int, world: int) -> Any:
    """Meshes whose ranks are in another order than those of their groups, and one that is not."""
    odd = [
        DeviceMesh("cpu", [1, 0, 3, 2], mesh_dim_names=("seq",)),
        DeviceMesh("cpu", [3, 1, 2, 0], mesh_dim_names=("seq",)),
        DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("ring", "seq")),
        DeviceMesh("cpu", [[2, 3], [0, 1]], mesh_dim_names=("dp", "seq")),
    ]
    errors = [attempt(lambda mesh=mesh: make_model(mesh, "odysseus", "auto"))[:2] for mesh in odd]
    strided = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("dp", "seq"))
    return errors, step(make_model(strided, "odysseus", "auto"), strided, "odysseus")


def two_models(rank: int, world: int, folder: str) -> Any:
    """Two models on interleaved ranks are saved at the same time, each by its own ranks, and loaded again."""
    meshes = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("which", "seq"))
    mesh, which = meshes["seq"], rank % 2
    model = CASE.model(seed=which)
    ody.parallelize(model, mesh, "odysseus", ody.OverlapConfig(timeout_s=30))
    for number in range(3):
        ody.save_checkpoint(f"{folder}/checkpoint-{which}-{number}", model)
        ody.save_pretrained(model, f"{folder}/pretrained-{which}-{number}")
    losses = [step(model, mesh, "odysseus")]
    for load, name in ((ody.load_checkpoint, "checkpoint"), (ody.load_pretrained, "pretrained")):
        other = ody.parallelize(CASE.model(seed=5), mesh, "tp", ody.OverlapConfig(timeout_s=30))
        load(
            *((f"{folder}/{name}-{which}-2", other) if name == "checkpoint" else (other, f"{folder}/{name}-{which}-2"))
        )
        losses.append(step(other, mesh, "tp"))
    return losses


def lonely_saves(rank: int, world: int, transport: str, folder: str) -> Any:
    """One rank saves, the other goes on training; then they save to different folders; then rightly."""
    sizes = {"seq": world}
    mesh = make_mesh(sizes)
    model = make_model(mesh, "odysseus", transport)
    results = []
    for save in (ody.save_checkpoint, lambda path, model: ody.save_pretrained(model, path)):
        dist.barrier()
        alone = (
            (lambda save=save: save(f"{folder}/alone", model)) if rank == 0 else lambda: step(model, mesh, "odysseus")
        )
        results.append(attempt(alone))
        results.append(attempt(lambda save=save: save(f"{folder}/{rank}", model)))
        save(f"{folder}/right", model)
    left = sorted(path.name for path in Path(folder).iterdir())
    return results, left, step(model, mesh, "odysseus")


def early_optimizer(rank: int, world: int) -> Any:
    """An optimizer and a list of parameters from before parallelize."""
    mesh, model = make_mesh({"seq": world}), CASE.model()
    before = list(model.parameters())
    optimizers = [torch.optim.AdamW(before), ody.MasterWeights(torch.optim.SGD, before, lr=0.1)]
    ody.parallelize(model, mesh)
    model(**ody.shard_sequence(CASE.whole_batch(), mesh)).loss.backward()
    uses = [*(one.step for one in optimizers), *(one.zero_grad for one in optimizers)]
    uses += [lambda clip=clip: clip(before, 1.0) for clip in (ody.clip_grad_norm_, torch.nn.utils.clip_grad_norm_)]
    errors = [attempt(use)[:2] for use in uses]
    torch.optim.AdamW(model.parameters()).step()
    return errors


ODD_WAYS = {
    "another loss": "of batch",
    "frozen": "1 parameters frozen",
    "without gradients": "without gradients",
    "checkpointed": "2 layers checkpointed",
    "autocast": "autocast to torch.bfloat16",
}


def odd_ways(rank: int, world: int, strategy: str, sizes: dict[str, int], bad: int) -> Any:
    """One rank computes the same batch in another way; each is followed by a step that is right."""
    mesh = make_mesh(sizes)
    model = make_model(mesh, strategy, "auto")
    batch = ody.shard_sequence(CASE.whole_batch(), mesh, strategy)
    other = ody.shard_sequence({"input_ids": batch_ids(), "labels": batch_ids()}, mesh, strategy)
    embedding = model.get_input_embeddings().weight
    results = {}

    def in_this(way: str) -> None:
        if way == "frozen":
            embedding.requires_grad_(False)
        if way == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        cast = torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast")
        with ody.step(model), torch.set_grad_enabled(way != "without gradients"), cast:
            losses = [model(**batch).loss] + ([model(**other).loss] if "another loss" in (way, wanted) else [])
            losses[-1 if way == "another loss" else 0].backward()

    for wanted in ODD_WAYS:
        dist.barrier()
        results[wanted] = attempt(lambda wanted=wanted: in_this(wanted if rank == bad else ""))
        embedding.requires_grad_(True)
        model.gradient_checkpointing_disable()
        model.zero_grad()
        results[wanted] = (*results[wanted], step(model, mesh, strategy))
    return results


def batch_ids() -> torch.Tensor:
    """Another batch's tokens."""
    return torch.arange(CASE.batch * CASE.length).view(CASE.batch, -1) % 100
