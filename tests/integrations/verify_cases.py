"""What ranks run to verify tiny models, as they are or with a fault that is put in on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from family_cases import Case, make_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.integrations import checkpoint_files, outputs
from odysseus_kernels.integrations.huggingface import parallelize
from odysseus_kernels.integrations.verify import verify
from odysseus_kernels.nn.attention import SequenceMask
from odysseus_kernels.nn.moe import load_balancing_loss
from odysseus_kernels.nn.sequence import shard_sequence


def sound(rank: int, world_size: int, case: Case, strategy: str, ring: int, settings: dict[str, Any]) -> str:
    """The report of a model that is right."""
    model = case.model()
    if settings.pop("checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return verify(model, case.whole_batch(), make_mesh(world_size, ring), strategy, **settings).to_json()


# ---- faults ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake, where it can be made, and what the report must say.

    Attributes:
        case: the model and batch.
        put_in: ``put_in(model, mesh, strategy) -> parallelized model`` with the mistake.
        cut: ``cut(batch, mesh, strategy) -> part`` with it.
        check: the check that must be the first to fail.
        says: what its finding must contain.
        ring: ring ranks, of two.
        checkpointing: whether layers are computed again.
    """

    case: Case
    check: str
    says: tuple[str, ...]
    put_in: Callable[[Any, DeviceMesh, str], Any] = parallelize
    cut: Callable[[dict[str, torch.Tensor], DeviceMesh, str], dict[str, torch.Tensor]] = shard_sequence
    strategy: str = "odysseus"
    ring: int = 1
    checkpointing: bool = False


def _window_dropped(model: Any, mesh: DeviceMesh, strategy: str) -> Any:
    model = parallelize(model, mesh, strategy)
    attention = model.model.layers[1].self_attn
    # Only what the attention is told: the model still makes the mask of a window for it.
    attention._attend = lambda q, k, v, mask, kwargs: type(attention)._attend(
        attention, q, k, v, dataclasses.replace(mask, masks=dict.fromkeys(mask.masks)), kwargs
    )
    return model


def _norm_averaged(model: Any, mesh: DeviceMesh, strategy: str) -> Any:
    model = parallelize(model, mesh, strategy)
    model.model.layers[0].post_attention_layernorm.weight.register_hook(lambda grad: grad / mesh.size())
    return model


def _kv_heads_permuted(model: Any, mesh: DeviceMesh, strategy: str) -> Any:
    model = parallelize(model, mesh, strategy)
    attention = model.model.layers[0].self_attn
    project = attention._project

    def permuted(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, *others = project(hidden)
        # The heads of the other rank of two, which is what a wrong order of ranks gives.
        swapped = []
        for one in others:
            everyone = all_gather(one.contiguous(), mesh.get_group("seq"), dim=0).chunk(2)
            swapped.append(everyone[1 - mesh.get_local_rank("seq")])
        return query, *swapped

    attention._project = permuted
    return model


def _loss_divided_twice(model: Any, mesh: DeviceMesh, strategy: str) -> Any:
    model = parallelize(model, mesh, strategy)
    outputs_of = model._outputs

    def divided(*arguments: Any, **settings: Any) -> Any:
        made = outputs_of(*arguments, **settings)
        if made.loss is not None:
            made["loss"] = made.loss / mesh.size()
        return made

    model._outputs = divided
    return model


def _stale_weight(model: Any, mesh: DeviceMesh, strategy: str) -> Any:
    model = parallelize(model, mesh, strategy)
    mlp = model.model.layers[1].mlp
    kept = {name: layer.weight.detach().clone() for name, layer in mlp.named_children() if hasattr(layer, "weight")}
    forward = mlp.forward

    def stale(hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            now = {name: getattr(mlp, name).weight.detach().clone() for name in kept}
            for name, weight in kept.items():
                getattr(mlp, name).weight.copy_(weight)
        try:
            return forward(hidden)
        finally:
            with torch.no_grad():
                for name, weight in now.items():
                    getattr(mlp, name).weight.data.copy_(weight)

    mlp.forward = stale
    return model


def _other_dropout_again(model: Any, mesh: DeviceMesh, strategy: str) -> Any:
    model = parallelize(model, mesh, strategy)
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model


def _swapped_shards(model: Any, mesh: DeviceMesh, strategy: str) -> Any:
    model = parallelize(model, mesh, strategy)
    weight = model.model.layers[1].mlp.up_proj.weight
    write = checkpoint_files.write

    def swapped(folder: Any, tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        checkpoint_files.write = write
        name = "model.model.layers.1.mlp.up_proj.weight"
        other = all_gather(weight.to_local().detach(), mesh.get_group("seq")).chunk(2)[1 - mesh.get_local_rank("seq")]
        placed = DTensor.from_local(other.clone(), weight.device_mesh, weight.placements, run_check=False)
        write(folder, {**tensors, name: placed}, *rest)

    checkpoint_files.write = swapped
    return model


def _documents_forgotten(model: Any, mesh: DeviceMesh, strategy: str) -> Any:
    model = parallelize(model, mesh, strategy)
    model.model._ring_mask = lambda *a, **k: SequenceMask({})
    return model


def _gradient_of_one_rank(model: Any, mesh: DeviceMesh, strategy: str) -> Any:
    """A replicated parameter whose gradient is this rank's own."""
    model = parallelize(model, mesh, strategy)
    norm = model.model.norm
    norm.sequence_group = dataclasses.replace(norm.sequence_group, tokens="replicated")
    return model


def _padding_routed(model: Any, mesh: DeviceMesh, strategy: str) -> Any:
    model = parallelize(model, mesh, strategy)
    forward = model.forward

    def routed(*arguments: Any, **keywords: Any) -> Any:
        with mock.patch.object(outputs, "load_balancing_loss", _loss_of_all_tokens):
            return forward(*arguments, **keywords)

    model.forward = routed
    return model


def _loss_of_all_tokens(*arguments: Any, attention_mask: Any, **keywords: Any) -> Any:
    return load_balancing_loss(*arguments, attention_mask=None, **keywords)


def _shifted_twice(batch: dict[str, torch.Tensor], mesh: DeviceMesh, strategy: str) -> dict[str, torch.Tensor]:
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return shard_sequence({**batch, "labels": shifted}, mesh, strategy)


def _mask_lost(batch: dict[str, torch.Tensor], mesh: DeviceMesh, strategy: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in shard_sequence(batch, mesh, strategy).items() if name != "attention_mask"}


def _from_zero(batch: dict[str, torch.Tensor], mesh: DeviceMesh, strategy: str) -> dict[str, torch.Tensor]:
    part = shard_sequence(batch, mesh, strategy)
    return {**part, "position_ids": torch.arange(part["input_ids"].shape[1]).expand_as(part["input_ids"])}


def _other_samples(batch: dict[str, torch.Tensor], mesh: DeviceMesh, strategy: str) -> dict[str, torch.Tensor]:
    return shard_sequence({name: t.roll(mesh.get_local_rank("seq"), 0) for name, t in batch.items()}, mesh, strategy)


_DROPOUT = (("attention_dropout", 0.3),)
FAULTS: dict[str, Fault] = {
    "a window dropped in one layer": Fault(
        Case(family="mistral", kv_heads=4),
        "layers",
        ("model.layers.1.self_attn", "no sliding window of 7"),
        _window_dropped,
    ),
    "labels shifted twice": Fault(Case(), "batch: shift_labels", ("shifted twice",), cut=_shifted_twice),
    "a norm's gradient averaged": Fault(
        Case(), "gradients", ("model.layers.0.post_attention_layernorm.weight", "1/2"), _norm_averaged
    ),
    "a norm's gradient of one rank": Fault(Case(), "gradients", ("model.norm.weight",), _gradient_of_one_rank),
    "a mask lost": Fault(Case(padding_mask=True), "batch: attention_mask", ("lost attention_mask",), cut=_mask_lost),
    "positions from 0 on each rank": Fault(Case(), "batch: position_ids", ("each rank counts from 0",), cut=_from_zero),
    "other samples on each rank": Fault(Case(), "batch: input_ids", ("same whole batch",), cut=_other_samples),
    "padding routed": Fault(
        Case(family="mixtral", length=23),
        "gradients",
        ("padding counted in the loss of the router",),
        put_in=_padding_routed,
    ),
    "kv heads permuted": Fault(
        Case(kv_heads=4), "layers", ("model.layers.0.self_attn", "rotated by 2"), _kv_heads_permuted
    ),
    "loss divided twice": Fault(Case(), "loss", ("1/2", "divided by the 2 ranks"), _loss_divided_twice),
    "a stale weight": Fault(Case(), "layers after a step", ("model.layers.1.mlp", "before the step"), _stale_weight),
    "a layer recomputed with other dropout": Fault(
        Case(changes=_DROPOUT), "recomputation", ("computed again",), _other_dropout_again, checkpointing=True
    ),
    "a checkpoint with swapped shards": Fault(
        Case(),
        "checkpoint in one process",
        ("model.layers.1.mlp.up_proj.weight", "order [1, 0]"),
        _swapped_shards,
    ),
    "documents forgotten on a ring": Fault(
        Case(packed=True),
        "layers",
        ("model.layers.0.self_attn",),
        _documents_forgotten,
        ring=2,
    ),
}


def seeded(rank: int, world_size: int, names: list[str]) -> list[str]:
    """Reports with one fault each."""
    reports = []
    for name in names:
        fault = FAULTS[name]
        mesh, model = make_mesh(world_size, fault.ring), fault.case.model()
        if fault.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        report = verify(
            model,
            fault.case.whole_batch(),
            mesh,
            fault.strategy,
            prepare=fault.put_in,
            cut=fault.cut,
        )
        reports.append(report.to_json())
    return reports
