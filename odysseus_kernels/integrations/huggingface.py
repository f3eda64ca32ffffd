"""Parallelizes stock transformers models in place."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.integrations.families import FAMILIES, Family
from odysseus_kernels.integrations.model import SequenceCausalLM, SequenceLoss, SequenceModel
from odysseus_kernels.nn.attention import AttentionSpec
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.identity import check_identical
from odysseus_kernels.nn.swap import swap_class
from odysseus_kernels.strategies import get_strategy
from odysseus_kernels.strategies.base import ModelShape, Part, apply_strategy

__all__ = ["parallelize"]


def parallelize(
    model: PreTrainedModel, mesh: DeviceMesh, strategy: str = "odysseus", config: OverlapConfig | None = None
) -> PreTrainedModel:
    """Distributes a stock causal language model over the ranks that share a sequence, in place.

    Every rank passes the same full model: built from the same seed, or loaded from the same checkpoint. Its weights
    are kept to the bit. Afterwards its parameters are DTensors under their stock names, each rank runs its own part
    of the sequence (see :func:`shard_sequence`), and every parameter's gradient is that of the whole batch.
    Make optimizers afterwards: one made before holds the full parameters.

    Args:
        model: a transformers ``LlamaForCausalLM`` on the device of ``mesh``.
        mesh: device mesh with the single dimension ``"seq"``.
        strategy: ``"odysseus"``.
        config: how operators communicate.

    Returns:
        ``model``.

    Raises:
        ValueError: for an unknown strategy or mesh, an unsupported model, or sizes that the ranks do not divide.
        RankMismatchError: if the model is not the same on every rank; names the rank that differs.
    """
    chosen = get_strategy(strategy)
    group = SequenceGroup.of(mesh, config)
    family = _family(model)
    shape = _shape(model)
    try:
        chosen.check(shape, group.size)
    except ValueError as error:
        raise ValueError(f"{type(model).__name__}, strategy {strategy!r}: {error}") from None
    parts = _parts(model, family, shape)
    _check_parameters(model, parts, group)
    check_identical([*model.named_parameters(), *model.named_buffers()], group)

    apply_strategy(chosen, shape, parts, group)
    # These two keep their class names: transformers looks up by name what outputs a model can record, and writes the
    # name into configurations that it saves.
    for module, mixin in ((model.base_model, SequenceModel), (model, SequenceCausalLM)):
        swap_class(module, mixin, keep_name=True)
        module.sequence_group = group
    model.loss_function = SequenceLoss(group)
    return model


def _family(model: nn.Module) -> Family:
    for family in FAMILIES:
        if isinstance(model, SequenceCausalLM):
            raise ValueError("model: expected a stock model, got one that is parallelized already")
        if isinstance(model, getattr(importlib.import_module(family.modeling), family.causal_model)):
            return family
    supported = ", ".join(family.causal_model for family in FAMILIES)
    raise ValueError(f"model: expected one of the supported classes ({supported}), got {type(model).__name__}")


def _shape(model: PreTrainedModel) -> ModelShape:
    config = model.config
    return ModelShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    )


def _parts(model: PreTrainedModel, family: Family, shape: ModelShape) -> list[Part]:
    """Every module of the model that has parameters, with its role."""
    modeling = importlib.import_module(family.modeling)
    base, names, mlp_names = model.base_model, family.attention_names, family.mlp_names
    spec = AttentionSpec(
        names.query,
        names.key,
        names.value,
        names.output,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        rotary=getattr(modeling, names.rotary),
        attend=_Attend(family.modeling, names.eager),
    )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norm = getattr(base, family.final_norm)
    parts = [Part("embedding", embedding, {"embedding": embedding})]
    for layer in getattr(base, family.layers):
        attention, mlp = getattr(layer, family.attention), getattr(layer, family.mlp)
        _expect(attention, getattr(modeling, family.attention_class))
        _expect(mlp, getattr(modeling, family.mlp_class))
        projections: dict[Any, nn.Module] = {
            "query": getattr(attention, names.query),
            "key": getattr(attention, names.key),
            "value": getattr(attention, names.value),
            "output": getattr(attention, names.output),
        }
        parts.append(Part("attention", attention, projections, spec))
        weights: dict[Any, nn.Module] = {"up": getattr(mlp, mlp_names.up), "down": getattr(mlp, mlp_names.down)}
        if mlp_names.gate is not None:
            weights["gate"] = getattr(mlp, mlp_names.gate)
        parts.append(Part("mlp", mlp, weights, mlp_names))
        for name in family.norms:
            parts.append(Part("norm", getattr(layer, name), {"norm": getattr(layer, name)}))
        for projection in (*projections.values(), *weights.values()):
            _expect(projection, nn.Linear)
    _expect(embedding, nn.Embedding)
    _expect(head, nn.Linear)
    return [*parts, Part("norm", norm, {"norm": norm}), Part("head", head, {"head": head})]


def _expect(module: nn.Module, cls: type) -> None:
    if type(module) is not cls:
        raise ValueError(
            f"model: expected a stock {cls.__name__}, got {type(module).__module__}.{type(module).__name__}: "
            f"adapters, quantized layers and changed classes are not supported"
        )


def _check_parameters(model: nn.Module, parts: list[Part], group: SequenceGroup) -> None:
    """Refuses parameters that no part accounts for, that are distributed already, or that are elsewhere."""
    known = {id(p) for part in parts for layer in part.layers.values() for p in layer.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise ValueError(f"model: expected the stock model's parameters only, got {name} as well")
        if isinstance(parameter, DTensor):
            raise ValueError(f"{name}: expected a plain parameter, got a DTensor: parallelize before other wrappers")
        if parameter.device.type != group.mesh.device_type:
            raise ValueError(
                f"{name}: expected a parameter on the mesh's device type {group.mesh.device_type!r}, got "
                f"{parameter.device}: move or load the model there first"
            )


class _Attend:
    """The attention function that the model's configuration names at the time of the call."""

    def __init__(self, modeling: str, eager: str) -> None:
        self._eager = getattr(importlib.import_module(modeling), eager)

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, self._eager)
        return attend(module, query, key, value, mask, **kwargs)
