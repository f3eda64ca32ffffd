"""Parallelizes stock transformers models in place."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.integrations.alike import Facts, Weights
from odysseus_kernels.integrations.choosing import AUTO, Wanted, check_wanted, choose
from odysseus_kernels.integrations.families import FAMILIES, Family
from odysseus_kernels.integrations.model import SequenceCausalLM, SequenceModel
from odysseus_kernels.integrations.peft import base_layer, give_whole_sizes, lora_linears, stock_model, take_in
from odysseus_kernels.integrations.peft_refusals import check_adapter, check_peft_model, refuse_others
from odysseus_kernels.integrations.pipelining import why_whole_only
from odysseus_kernels.integrations.switching import Parallelized, SwitchableCausalLM, check_strategy, why_not_strategy
from odysseus_kernels.integrations.wrappers import refuse_replicating_wrappers
from odysseus_kernels.nn.attention import AttentionSpec
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.identity import check_alike, check_identical
from odysseus_kernels.nn.moe import ExpertsSpec
from odysseus_kernels.nn.replaced import retire_parameter
from odysseus_kernels.nn.swap import swap_class
from odysseus_kernels.strategies import get_strategy
from odysseus_kernels.strategies.base import ModelShape, Part, Strategy, apply_strategy

__all__ = ["parallelize"]


def parallelize(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    strategy: str = "odysseus",
    config: OverlapConfig | None = None,
    *,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    hardware: str | None = None,
) -> PreTrainedModel:
    """Distributes a stock causal language model over the ranks that share a sequence, in place.

    Every rank passes the same full model: built from the same seed, or loaded from the same checkpoint. Its weights
    are kept to the bit. Afterwards its parameters are DTensors under their stock names, each rank runs its own part
    of the sequence (see :func:`shard_sequence`), and every parameter's gradient is that of the whole batch.
    Make optimizers afterwards: one made before holds the full parameters, and its first step is a ValueError.

    Low-rank adapters (PEFT's LoRA) around projections are kept, with PEFT's names, as plain parameters that are the
    same on every rank; ``get_peft_model`` may also come afterwards, and its adapters then get the first rank's values
    at the next forward.  Weights that are frozen send nothing for their gradients.

    Args:
        model: a stock transformers model of one of the supported families (``integrations/families.py``) on the device
            of ``mesh``, or a PEFT model with LoRA adapters around one.
        mesh: device mesh with the dimension ``"seq"``, optionally ``"ring"`` outside of it (Ring attention between
            ranks that the strategy serves within) and ``"dp"`` outside of both (see the note).
        strategy: ``"tp"``, ``"tp_sp"``, ``"ulysses"``, ``"odysseus"`` or ``"tsp"``; or ``"auto"``: of those that the
            model can have on this mesh the one that :func:`plan`'s model of costs predicts to be the fastest for
            ``sequence_length``, all weights trained. Ranks agree on it, by the slowest one's predictions;
            ``ody.explain(model)`` shows them. :func:`set_strategy` chooses again for other lengths.
        config: how operators communicate.
        sequence_length: for ``"auto"``: tokens of each sequence.
        batch_size: for ``"auto"``: sequences of a step on each rank of ``"dp"``; 1 if None.
        hardware: for ``"auto"``: the machine, as :func:`plan` takes it; if None the one that has this kind of device.

    Returns:
        ``model``.

    Raises:
        ValueError: for an unknown strategy or mesh, an unsupported model, or sizes that the ranks do not divide; for
            ``"auto"`` without a length, or a device of no machine that is known.
        RankMismatchError: if the model, its configuration, ``strategy`` or ``config`` is not the same on every rank;
            names the rank that differs.
        PeerLostError: if another rank cannot go on; has that rank's number and error.

    Note:
        Ranks that differ in ``"dp"`` alone hold copies and other sequences. Their gradients are not touched here: wrap
        the layers with ``torch.distributed.fsdp.fully_shard(layer, mesh=mesh["dp"])`` afterwards, or the model with
        ``replicate`` of ``torch.distributed._composable.replicate_with_fsdp``.

    Example:
        >>> model = ody.parallelize(model, mesh, strategy="odysseus")
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> loss = model(**ody.shard_sequence(batch, mesh)).loss  # of all tokens of both ranks
        >>> loss.backward()
        >>> optimizer.step()
        >>> weight = model.model.layers[0].mlp.up_proj.weight
        >>> weight.shape, weight.to_local().shape
        (torch.Size([144, 96]), torch.Size([72, 96]))
    """
    try:
        everyone = SequenceGroup.of(mesh, config)
    except ValueError:
        _named(strategy)  # an unknown one is said before anything else
        raise
    found, error, texts = None, None, {}
    try:
        found = _look(model, strategy, everyone, sequence_length, batch_size, hardware)
        texts = found.facts.texts(found.model, strategy, everyone.config)
    except Exception as raised:  # noqa: BLE001 - whatever it is, ranks that wait here are told of it
        error = raised
    check_alike(texts, everyone, error)
    assert found is not None, "an error was raised"
    outer, model, family, shape, choice = model, found.model, found.family, found.shape, None
    chosen = found.chosen
    if found.wanted is not None:
        choice = choose(
            model, found.wanted, everyone, why_not=lambda name: _why_not(model, family, shape, name, everyone)
        )
        chosen = get_strategy(choice.strategy)
    assert chosen is not None, "it is named or chosen"
    group, parts = chosen.group(everyone), found.parts
    check_identical([*model.named_parameters(), *model.named_buffers()], group)

    # Each once: a head may be tied to the embedding.
    full = {id(p): p for part in parts for layer in part.layers.values() for p in _own(layer)}
    apply_strategy(chosen, shape, parts, group)
    for parameter in full.values():
        retire_parameter(parameter)
    # These two keep their class names: transformers looks up by name what outputs a model can record, and writes the
    # name into configurations that it saves.
    for module, mixin in ((model.base_model, SequenceModel), (model, SwitchableCausalLM)):
        swap_class(module, mixin, keep_name=True)
        module.sequence_group = group
    model.parallelized = Parallelized(chosen, shape, tuple(parts), choice)
    model.sequence_facts, model.sequence_weights = found.facts, Weights(model)
    take_in(model, found.adapted, group, alike=True)
    return outer


@dataclasses.dataclass(frozen=True)
class _Found:
    """What this rank finds of a model by itself: nothing is sent, and nothing is changed."""

    model: Any
    family: Family
    shape: ModelShape
    wanted: Wanted | None
    chosen: Strategy | None
    parts: list[Part]
    adapted: list[Any]
    facts: Facts


def _look(
    model: PreTrainedModel,
    strategy: str,
    everyone: SequenceGroup,
    sequence_length: int | None,
    batch_size: int | None,
    hardware: str | None,
) -> _Found:
    """Checks what :func:`parallelize` was given; ValueError for what cannot be."""
    refuse_replicating_wrappers()
    chosen, device = _named(strategy), torch.device(everyone.mesh.device_type)
    wanted = check_wanted(strategy, sequence_length, batch_size, hardware, device)
    give_whole_sizes()
    check_peft_model(model)
    stock = stock_model(model)
    family = _family(stock)
    shape = _shape(stock, family)
    group = everyone if chosen is None else chosen.group(everyone)
    if chosen is not None:
        check_strategy(stock, shape, chosen, group)
    adapted = _adapted(stock, family, group)
    parts = _parts(stock, family, shape)
    _check_parameters(stock, parts, adapted, group)
    return _Found(stock, family, shape, wanted, chosen, parts, adapted, Facts.of(stock))


def _named(strategy: str) -> Strategy | None:
    """The strategy of that name, None where it is to be chosen; ValueError for an unknown one."""
    return None if strategy == AUTO else get_strategy(strategy)


def _own(layer: nn.Module) -> list[nn.Parameter]:
    return list(layer.parameters(recurse=False))


def _why_not(model: PreTrainedModel, family: Family, shape: ModelShape, strategy: str, group: SequenceGroup) -> str:
    """Why a strategy cannot have the model, adapters included; empty if it can."""
    reason = why_not_strategy(model, shape, strategy, group)
    if reason:
        return reason
    try:
        _adapted(model, family, get_strategy(strategy).group(group))
    except ValueError as error:
        return str(error)
    return ""


def _adapted(model: PreTrainedModel, family: Family, group: SequenceGroup) -> list[Any]:
    """LoRA layers around projections; a ValueError for all else that PEFT may have wrapped."""
    found = {}
    for path, module in model.named_modules():
        around = path.rpartition(".")[0].rpartition(".")[2]
        if around in (family.attention, family.mlp) and next(lora_linears([module]), None) is not None:
            found[path] = module
    for path, module in found.items():
        check_adapter(path, module, group)
    refuse_others(model, found.values())
    return list(found.values())


def _family(model: nn.Module) -> Family:
    for family in FAMILIES:
        if isinstance(model, SequenceCausalLM):
            raise ValueError("model: expected a stock model, got one that is parallelized already")
        if isinstance(model, getattr(importlib.import_module(family.modeling), family.causal_model)):
            return family
    supported = ", ".join(family.causal_model for family in FAMILIES)
    raise ValueError(f"model: expected one of the supported classes ({supported}), got {type(model).__name__}")


def _shape(model: PreTrainedModel, family: Family) -> ModelShape:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        experts=getattr(config, family.expert_names.count) if family.expert_names is not None else 0,
    )


def _parts(model: PreTrainedModel, family: Family, shape: ModelShape) -> list[Part]:
    """Every module of the model that has parameters, with its role."""
    base, names = model.base_model, family.attention_names
    modeling = importlib.import_module(family.modeling)
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
        query_norm=names.query_norm,
        key_norm=names.key_norm,
        window=names.window,
        output_dropout=names.output_dropout,
    )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    _expect(embedding, nn.Embedding)
    _expect(head, nn.Linear)
    parts = [_plain("embedding", embedding)]
    for layer in getattr(base, family.layers):
        parts += _attention_parts(getattr(layer, family.attention), family, modeling, spec)
        parts += _mlp_parts(getattr(layer, family.mlp), family, modeling, model.config.hidden_act)
        parts += [_plain("norm", getattr(layer, name)) for name in family.norms]
    return [*parts, _plain("norm", getattr(base, family.final_norm)), _plain("head", head)]


def _plain(role: Any, module: nn.Module) -> Part:
    """A module whose own parameters have the module's role."""
    return Part(role, module, {role: module})


def _attention_parts(attention: nn.Module, family: Family, modeling: Any, spec: AttentionSpec) -> list[Part]:
    _expect(attention, getattr(modeling, family.attention_class))
    spec = dataclasses.replace(spec, whole_only=why_whole_only(spec, attention))
    projections: dict[Any, nn.Module] = {
        role: base_layer(getattr(attention, getattr(spec, role))) for role in ("query", "key", "value", "output")
    }
    for projection in projections.values():
        _expect(projection, nn.Linear)
    norms = [name for name in (spec.query_norm, spec.key_norm) if name is not None]
    return [
        Part("attention", attention, projections, spec),
        *(_plain("head_norm", getattr(attention, name)) for name in norms),
    ]


def _mlp_parts(mlp: nn.Module, family: Family, modeling: Any, activation: str) -> list[Part]:
    names, experts = family.mlp_names, family.expert_names
    if experts is not None and isinstance(mlp, getattr(modeling, experts.block_class)):
        _expect(mlp, getattr(modeling, experts.block_class))
        _expect(getattr(mlp, experts.router), getattr(modeling, experts.router_class))
        _expect(getattr(mlp, experts.experts), getattr(modeling, experts.experts_class))
        module = getattr(mlp, experts.experts)
        return [
            _plain("router", getattr(mlp, experts.router)),
            Part("experts", module, {"experts": module}, ExpertsSpec(activation=activation)),
        ]
    assert family.mlp_class is not None, "a family without experts has a feed-forward class"
    _expect(mlp, getattr(modeling, family.mlp_class))
    weights: dict[Any, nn.Module] = {"up": base_layer(getattr(mlp, names.up))}
    weights["down"] = base_layer(getattr(mlp, names.down))
    if names.gate is not None:
        weights["gate"] = base_layer(getattr(mlp, names.gate))
    for projection in weights.values():
        _expect(projection, nn.Linear)
    return [Part("mlp", mlp, weights, names)]


def _expect(module: nn.Module, cls: type) -> None:
    if type(module) is not cls:
        raise ValueError(
            f"model: expected a stock {cls.__name__}, got {type(module).__module__}.{type(module).__name__}: "
            f"adapters other than PEFT's LoRA, quantized layers and changed classes are not supported"
        )


def _check_parameters(model: nn.Module, parts: list[Part], adapted: list[Any], group: SequenceGroup) -> None:
    """Refuses parameters that no part accounts for, that are distributed already, or that are on another device."""
    known = {id(p) for part in parts for layer in part.layers.values() for p in _own(layer)}
    known |= {id(p) for module in adapted for kind in (module.lora_A, module.lora_B) for p in kind.parameters()}
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
