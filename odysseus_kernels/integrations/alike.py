"""What of a model decides its numbers and is no tensor: compared between ranks at ``parallelize`` and at every forward.

A rank whose norms have another epsilon, whose experts are chosen otherwise or whose adapters are scaled otherwise would
compute its part of another model, and all ranks would get a number of none.  At ``parallelize`` everything is compared
once, by name.  Later a forward says what has changed since, in the signature of calls that are compared anyway; where
nothing has, nothing is said.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from odysseus_kernels.comm.mismatch import signature_hash
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.integrations.peft import lora_linears
from odysseus_kernels.nn.group import DATA_DIMENSION

__all__ = ["Facts", "Weights", "adapters", "note_loaded"]

# Attributes that stock modules read in their forward.  Others are not looked at: profilers and users leave notes.
_RANDOM = ("attention_dropout", "residual_dropout", "embedding_dropout", "jitter_noise")
_READ = frozenset(
    (
        *_RANDOM,
        *("variance_epsilon", "eps", "scaling", "attention_scaling", "rope_type", "is_causal", "layer_idx"),
        *("sliding_window", "layer_type", "attention_type"),
        *("top_k", "norm_topk_prob", "num_experts", "num_experts_per_tok", "router_aux_loss_coef"),
        *("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    )
)
_ACTIVATIONS = frozenset(("act_fn", "act"))
# Of the configuration: no forward of a parallelized model depends on them.
_IGNORED = frozenset(
    (
        *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "initializer_range"),
        *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id"),
    )
)
# Those that a forward reads again.
_READ_AGAIN = ("sliding_window", "layer_types", "rope_parameters", "output_router_logits")
# Of OverlapConfig: the others may differ, or are told by the calls that they change.
_CALLS = ("mode", "transport", "tune", "pipeline", "chunks_per_rank", "reduce_dtype", "reduce", "gather")
_MOST = 160  # characters of a text that calls are compared by
_MOST_VALUES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Facts:
    """A model as it was when it was parallelized.

    Attributes:
        modules: (path, module, values by name of what its forward reads).
        settings: of the configuration that a forward reads again.
    """

    modules: tuple[tuple[str, nn.Module, dict[str, Any]], ...]
    settings: dict[str, Any]

    @staticmethod
    def of(model: Any) -> Facts:
        """Of a stock model."""
        found = []
        for path, module in model.named_modules():
            names = [name for name in _READ.intersection(vars(module)) if _plain(vars(module)[name])]
            names += _ACTIVATIONS.intersection(module._modules)
            if names:
                found.append((path, module, {name: _value(module, name) for name in sorted(names)}))
        settings = {name: copy.deepcopy(getattr(model.config, name, None)) for name in _READ_AGAIN}
        return Facts(tuple(found), settings)

    def texts(self, model: Any, strategy: str, config: OverlapConfig) -> dict[str, str]:
        """All that ranks must have alike, by name."""
        found = {"strategy": repr(strategy), "the model's class": type(model).__name__}
        found |= {f"OverlapConfig.{name}": repr(getattr(config, name)) for name in _CALLS}
        known = _known(type(model.config))
        for name, value in model.config.to_dict().items():
            if name in known and name not in _IGNORED:
                found[f"config.{name}"] = json.dumps(value, sort_keys=True, default=str)
        for path, _, values in self.modules:
            found |= {f"{path}.{name}".lstrip("."): str(value) for name, value in values.items()}
        return found

    def changes(self, model: Any) -> str:
        """What of ``model`` has changed since, in words; empty if nothing."""
        said = [
            f"{path}.{name} {new}".lstrip(".")
            for path, module, values in self.modules
            for name, old in values.items()
            if (new := _value(module, name)) != old
        ]
        for name, old in self.settings.items():
            if (new := getattr(model.config, name, None)) != old:
                said.append(f"config.{name} {new}")
        return _short(said)

    def resting(self) -> str:
        """Which dropouts are off because their modules do not train, in words; empty where none or all are."""
        drawing = [
            module.training
            for _, module, values in self.modules
            for name in _RANDOM
            if name in values and vars(module).get(name)
        ]
        off = drawing.count(False)
        return f"{off} of {len(drawing)} modules without dropout" if 0 < off < len(drawing) else ""


def adapters(model: nn.Module) -> str:
    """How the adapters of ``model`` count, in words; empty where there are none."""
    found = Counter(text for module in lora_linears(model.modules()) for text in _adapters_of(module))
    return _short([f"{count} x {text}" for text, count in sorted(found.items())])


class Weights:
    """How often a rank's parameters were loaded, and had changed when a forward began.

    An optimizer's step that one rank alone takes, or leaves out, would leave copies of a parameter different.
    Optimizers that take tensors together do not count it in a distributed tensor's version, so values are looked at,
    too: those of the smallest trained parameter of which ranks have copies.  Forwards that fail on some ranks count on
    the others: nothing but a change adds to the number.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen = self._look(list(model.parameters()), -1, values=True)
        self._loads = self._changes = 0

    def said(self, parameters: list[nn.Parameter], *, values: bool) -> str:
        """In words, at the beginning of a forward; empty where nothing has happened.

        Without ``values``, which a device would have to be waited for, versions have to do.
        """
        before, now = self._seen, self._look(parameters, self._seen.index, values=values)
        changed = before.versions != now.versions
        if before.copy is not None and now.copy is not None and before.index == now.index:
            changed = changed or (before.copy.shape == now.copy.shape and not torch.equal(before.copy, now.copy))
        self._changes += changed
        self._seen = now if now.copy is not None else dataclasses.replace(before, versions=now.versions)
        said = [f"weights loaded {self._loads} times"] if self._loads else []
        said += [f"weights changed before {self._changes} forwards"] if self._changes else []
        return ", ".join(said)

    def loaded(self, parameters: list[nn.Parameter]) -> None:
        """They are those of files: what came before does not count any more."""
        self._seen = self._look(parameters, self._seen.index, values=True)
        self._loads, self._changes = self._loads + 1, 0

    @staticmethod
    def _look(parameters: list[nn.Parameter], index: int, *, values: bool) -> _Look:
        # What is done to a distributed tensor does not count on its local one, nor the other way round.
        versions = sum(_version(p) + _version(_local(p)) for p in parameters)
        if not values:
            return _Look(versions)
        if not (0 <= index < len(parameters) and parameters[index].requires_grad and _is_copied(parameters[index])):
            copied = [(p.numel(), at) for at, p in enumerate(parameters) if p.requires_grad and _is_copied(p)]
            if not copied:
                return _Look(versions)
            _, index = min(copied)
        return _Look(versions, index, _local(parameters[index]).detach().flatten()[:_MOST_VALUES].clone())


@dataclasses.dataclass(frozen=True)
class _Look:
    """Of a model's parameters: the sum of their versions, and values of one by its place among them."""

    versions: int
    index: int = -1
    copy: torch.Tensor | None = None


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_copied(parameter: torch.Tensor) -> bool:
    """Whether all ranks of a sequence have the same of it; plain ones are adapters' here."""
    if not isinstance(parameter, DTensor):
        return True
    names = parameter.device_mesh.mesh_dim_names or ()
    over = (place for name, place in zip(names, parameter.placements, strict=True) if name != DATA_DIMENSION)
    return all(place.is_replicate() for place in over)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def note_loaded(model: nn.Module) -> None:
    """All weights of ``model`` have been loaded from files, as on every rank."""
    for module in model.modules():
        weights = vars(module).get("sequence_weights")
        if isinstance(weights, Weights):
            weights.loaded(list(module.parameters()))


def _known(kind: Any) -> set[str]:
    """What a class of configurations has by itself: others are notes of the user's, a rank's number or a run's name."""
    return {*dir(kind), *inspect.signature(kind.__init__).parameters, *kind.attribute_map, "head_dim", *_READ_AGAIN}


def _plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _value(module: nn.Module, name: str) -> Any:
    child = module._modules.get(name)
    if child is not None:
        return f"{type(child).__name__}({child.extra_repr()})"
    return vars(module).get(name)


def _adapters_of(module: Any) -> Iterator[str]:
    if module.disable_adapters or module.merged:
        yield "off"
        return
    for name in module.active_adapters:
        if name in module.lora_A:
            dropout = module.lora_dropout[name]
            drops = f" dropout {dropout.p:g}" if dropout.training and getattr(dropout, "p", 0) else ""
            yield f"{name} scaling {module.scaling[name]:g}{drops}"


def _short(texts: list[str]) -> str:
    """All of ``texts``, or the first of them and what tells the others apart."""
    joined = ", ".join(texts)
    if len(joined) <= _MOST:
        return joined
    return f"{joined[:_MOST]}... ({len(texts)}, {signature_hash(joined):x})"
