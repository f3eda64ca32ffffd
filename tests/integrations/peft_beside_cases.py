"""Adapters beside FSDP2, autocast and torch.compile, and what adding their gradients up in one call sends."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from family_cases import data_mesh, make_mesh, replicated, whole
from peft_cases import LONG, Adapted, step
from torch.distributed.fsdp import fully_shard

import odysseus_kernels as ody
from odysseus_kernels.comm.recorder import CommRecorder

Step = tuple[float, dict[str, torch.Tensor]]


def fully_sharded(model: Any, mesh: Any) -> Any:
    """FSDP2 around the layers, and around the PEFT model."""
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


WRAPPERS = {"fully_shard": fully_sharded, "replicate": replicated}


def of_replicas(rank: int, world: int, adapted: Adapted, strategy: str, wrapper: str) -> tuple[Step, Step]:
    """A step of two replicas of two ranks, and another that is accumulated to it."""
    mesh = data_mesh((2, 1, 2))
    model = WRAPPERS[wrapper](adapted.before(strategy, mesh), mesh)
    rows = {name: t.chunk(2)[mesh.get_local_rank("dp")] for name, t in adapted.case.whole_batch().items()}
    batch = ody.shard_sequence(rows, mesh, strategy)
    first = step(model, batch, adapted.case)
    first = first[0], {name: gradient.clone() for name, gradient in first[1].items()}
    return first, step(model, batch, adapted.case)


def stock_replicas(adapted: Adapted) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Each row's loss in one process, and the gradients of their mean."""
    model, batch = adapted.stock(), adapted.case.whole_batch()
    with adapted.case.autocast():
        losses = [model(**{name: t[row : row + 1] for name, t in batch.items()}).loss for row in range(2)]
    (sum(losses) / 2).backward()
    return [loss.item() for loss in losses], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def on_two(rank: int, world: int, adapted: Adapted, strategy: str, compiled: bool) -> Step:
    """A step, with compiled layers or without."""
    model = adapted.before(strategy, make_mesh(world, 1))
    if compiled:
        for layer in model.get_base_model().model.layers:
            layer.compile(backend="aot_eager")
    return step(model, ody.shard_sequence(adapted.case.whole_batch(), model), adapted.case)


def sums(
    rank: int, world: int, strategy: str, ring: int, adapted: Adapted, settings: dict[str, Any]
) -> list[tuple[int, int]]:
    """(calls, bytes) by which gradients of adapters are added, for models of one and of three layers."""
    found = []
    for layers in (1, 3):
        case = dataclasses.replace(LONG, changes=(("num_hidden_layers", layers),))
        model = dataclasses.replace(adapted, case=case).before(strategy, make_mesh(world, ring), **settings)
        batch = ody.shard_sequence(case.whole_batch(), model)
        with CommRecorder() as record:
            model(**batch).loss.backward()
        rows = [row for row in record.rows() if row["operator"] == "replicated_parameter"]
        found.append((sum(int(row["calls"]) for row in rows), sum(int(row["bytes"]) for row in rows)))
    return found


def mixed_types(rank: int, world: int) -> tuple[int, Step]:
    """Calls and a step of adapters of two types: those of the second layer in fp64."""
    model = Adapted().before("odysseus", make_mesh(world, 1))
    _second_layer_in_fp64(model)
    batch = ody.shard_sequence(Adapted().case.whole_batch(), model)
    with CommRecorder() as record:
        made = step(model, batch)
    rows = [row for row in record.rows() if row["operator"] == "replicated_parameter"]
    return sum(int(row["calls"]) for row in rows), made


def mixed_types_stock() -> Step:
    model = Adapted().stock()
    _second_layer_in_fp64(model)
    return step(model, Adapted().case.whole_batch())


def _second_layer_in_fp64(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name and "layers.1.mlp.down_proj" in name:
            parameter.data = parameter.data.double()


def partly(rank: int, world: int) -> dict[str, Any]:
    """Uses of the graph that leave gradients out, or take them in other ways."""
    model = Adapted().before("odysseus", make_mesh(world, 1))
    batch = ody.shard_sequence(Adapted().case.whole_batch(), model)
    _, once = step(model, batch)
    once = {name: gradient.clone() for name, gradient in once.items()}
    _, twice = step(model, batch)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    last = [name for name in named if "layers.1" in name]
    asked = torch.autograd.grad(model(**batch).loss, [named[name] for name in last])
    for name, parameter in named.items():
        parameter.requires_grad_("layers.1" in name)
        parameter.grad = None
    _, some = step(model, batch)
    left = [name for name, module in model.named_modules() if "adapter_values" in vars(module)]
    return {
        "once": once,
        "twice": {name: whole(gradient) for name, gradient in twice.items()},
        "asked": dict(zip(last, asked, strict=True)),
        "some": some,
        "left behind": left,
    }
