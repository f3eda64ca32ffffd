"""A tiny Llama in several distributions, and optimizer steps on it with made-up gradients: what state tests run."""

from __future__ import annotations

from typing import Any

import torch
from family_cases import make_mesh
from llama_cases import Case
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from transformers import LlamaForCausalLM

import odysseus_kernels as ody
from odysseus_kernels.config import OverlapConfig


def by_hand(model: nn.Module, mesh: Any) -> None:
    """Placements on ("ring", "seq") that strategies with a ring use, all mixed in one model."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placements: list[Placement] = [Replicate(), Replicate()]
            if "proj" in _name(model, module):
                rows = [Shard(0), Shard(0)] if "mlp" in _name(model, module) else [Replicate(), Shard(0)]
                placements = rows
                if "o_proj" in _name(model, module):
                    placements = [Replicate(), Shard(1) if parameter.ndim == 2 else Replicate()]
            if id(parameter) not in done:
                local = whole_to_local(parameter.detach(), mesh, placements)
                done[id(parameter)] = nn.Parameter(local, requires_grad=parameter.requires_grad)
            setattr(module, name, done[id(parameter)])


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def whole_to_local(whole: torch.Tensor, mesh: Any, placements: Any) -> DTensor:
    """A DTensor of what every rank has; nothing is sent."""
    local = whole
    for placement, size, coordinate in zip(placements, mesh.shape, mesh.get_coordinate(), strict=True):
        if isinstance(placement, Shard):
            local = local.chunk(size, placement.dim)[coordinate]
    return DTensor.from_local(
        local.clone(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def build(distribution: str, world_size: int, case: Case, seed: int = 0) -> LlamaForCausalLM:
    """The case's model: "stock", a strategy on all ranks, "ring+" and a strategy across 2 ring ranks, "2x2" by hand."""
    model = case.model(seed)
    if distribution == "2x2":
        by_hand(model, make_mesh(world_size, 2))
    elif distribution != "stock":
        ring = 2 if distribution.startswith("ring+") else 1
        mesh = make_mesh(world_size, ring)
        ody.parallelize(model, mesh, distribution.removeprefix("ring+"), config=OverlapConfig(timeout_s=60))
    return model


def optimizer_of(model: nn.Module, **changes: Any) -> torch.optim.Optimizer:
    """AdamW with two groups: matrices, and the rest."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **{"lr": 1e-2, "foreach": True, **changes})


def give_gradients(model: nn.Module, seed: int, dtype: torch.dtype | None = None) -> None:
    """The same random gradients whatever the distribution."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        whole = torch.randn(parameter.shape, generator=generator).to(dtype or parameter.dtype)
        if parameter.requires_grad:
            distributed = isinstance(parameter, DTensor)
            parameter.grad = (
                whole_to_local(whole, parameter.device_mesh, parameter.placements) if distributed else whole
            )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """All tensors, whole, and settings; every rank calls it."""
    found = {name: whole(parameter) for name, parameter in model.named_parameters()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"{name}/{key}"] = whole(value) if isinstance(value, torch.Tensor) else value
        found["settings"] = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
    return found


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names whose values are not the same to the bit."""
    odd = set(one) ^ set(other)
    for name in set(one) & set(other):
        left, right = one[name], other[name]
        same = left == right
        if isinstance(left, torch.Tensor):
            same = left.dtype == right.dtype and torch.equal(left, right)
        odd |= set() if same else {name}
    return sorted(odd)


def narrow(distribution: str, world_size: int, seed: int) -> tuple[LlamaForCausalLM, ody.MasterWeights]:
    """A model in bf16 whose optimizer keeps master weights."""
    model = build(distribution, world_size, Case(kv_heads=4, dtype=torch.bfloat16), seed)
    return model, ody.MasterWeights(torch.optim.AdamW, model.parameters(), lr=1e-2, foreach=True)


def save_masters(rank: int, world_size: int, folder: str) -> dict[str, Any] | None:
    """Saves after two steps with fp32 gradients; returns the state after a third."""
    model, optimizer = narrow("odysseus", world_size, 0)
    for step in range(2):
        give_gradients(model, step, torch.float32)
        optimizer.step()
    ody.save_checkpoint(folder, model, optimizer)
    give_gradients(model, 2, torch.float32)
    optimizer.step()
    found = snapshot(model, optimizer)
    return found if rank == 0 else None


def load_masters(rank: int, world_size: int, folder: str, distribution: str) -> dict[str, Any] | None:
    """Loads and makes the third step."""
    model, optimizer = narrow(distribution, world_size, 3)
    ody.load_checkpoint(folder, model, optimizer)
    give_gradients(model, 2, torch.float32)
    optimizer.step()
    found = snapshot(model, optimizer)
    return found if rank == 0 else None


EXTRA = {"step": 7, "losses": {"1": 0.1}, "random": torch.arange(5, dtype=torch.uint8)}


def save(rank: int, world_size: int, folder: str, distribution: str, case: Case, steps: int) -> dict[str, Any] | None:
    """Saves after some steps; what was saved, from rank 0."""
    model = build(distribution, world_size, case)
    optimizer = optimizer_of(model)
    for step in range(steps):
        give_gradients(model, step)
        optimizer.step()
    ody.save_checkpoint(folder, model, optimizer, extra=EXTRA)
    found = snapshot(model, optimizer)
    return found if rank == 0 else None


def save_trained(rank: int, world_size: int, folder: str, distribution: str, case: Case) -> dict[str, Any] | None:
    """Saves after three steps of real training; what was saved, from rank 0."""
    model = build(distribution, world_size, case)
    optimizer = optimizer_of(model)
    mesh = make_mesh(world_size, 2 if distribution.startswith("ring+") else 1)
    batch = ody.shard_sequence(case.whole_batch(), mesh, distribution.removeprefix("ring+"))
    for _ in range(3):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ody.save_checkpoint(folder, model, optimizer, extra=EXTRA)
    found = snapshot(model, optimizer)
    return found if rank == 0 else None


def load(
    rank: int, world_size: int, folder: str, distribution: str, case: Case, resave: str | None = None
) -> dict[str, Any] | None:
    """Loads into another model, whose optimizer has made a step or not by rank count; what was loaded, from rank 0."""
    model = build(distribution, world_size, case, seed=5)
    placements = [p.placements for p in model.parameters() if isinstance(p, DTensor)]
    optimizer = optimizer_of(model, lr=0.5)
    extra = ody.load_checkpoint(folder, model, optimizer)
    assert extra.keys() == EXTRA.keys() and extra["losses"] == EXTRA["losses"]
    assert torch.equal(extra["random"], EXTRA["random"])
    assert placements == [p.placements for p in model.parameters() if isinstance(p, DTensor)]
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, DTensor):
            assert state["exp_avg"].placements == parameter.placements
    found = snapshot(model, optimizer)
    give_gradients(model, 0)
    optimizer.step()  # the state works
    if resave is not None:
        again = build(distribution, world_size, case, seed=6)
        second = optimizer_of(again)
        ody.load_checkpoint(folder, again, second)
        ody.save_checkpoint(resave, again, second, extra=extra)
    return found if rank == 0 else None
