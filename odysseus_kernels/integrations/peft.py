"""PEFT's low-rank adapters (LoRA) in parallelized models; this package's only home of peft, which stays optional.

The wrappers stay where PEFT put them, under its names, and their adapters stay plain parameters, whole and alike on
every rank: PEFT's own tools (switching, adding and saving adapters) find what they expect.  ``nn/adapters.py`` says how
they are multiplied; their gradients are complete, as all are.  What PEFT can wrap otherwise is refused by name here.
"""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.nn.utils.parametrize import is_parametrized

from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.floors import require
from odysseus_kernels.integrations.calls import changed_call
from odysseus_kernels.integrations.saving import SavingRanks
from odysseus_kernels.nn.adapters import adapters_of, base_of
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.swap import swap_class

__all__ = [
    "base_layer",
    "check_adapter",
    "check_peft_model",
    "give_whole_sizes",
    "has_adapters",
    "is_peft_model",
    "load_adapter",
    "lora_linears",
    "refuse_others",
    "refuse_row_adapters",
    "save_adapters",
    "stock_model",
    "take_in",
]

_WEIGHTS = "adapter_model.safetensors"
# PEFT's ways to begin an adapter with parts of the weight, most of which are taken out of it.
_FROM_WEIGHT = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_UNMERGED = "merge it into the stock model (merge_and_unload), and parallelize that"


class SequenceLora(nn.Module):
    """A low-rank adapter around a distributed layer: what is merged into its weight is cut as the weight is.

    The stock methods assign ``weight.data``, which leaves a distributed weight as it is.
    """

    base_layer: Any
    merged_adapters: list[str]
    active_adapters: list[str]
    lora_A: Any  # noqa: N815
    lora_B: Any  # noqa: N815
    lora_bias: dict[str, bool]
    lora_variant: dict[str, Any]
    scaling: dict[str, float]
    get_delta_weight: Any

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to this rank's part of the weight; every rank calls it, and only ``safe_merge`` sends anything.

        Args:
            safe_merge: raise ValueError, on all ranks, if a number would not be finite.
            adapter_names: which; the active ones if None.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        for name in wanted:
            if name in self.merged_adapters or name not in self.lora_A:
                continue
            if name in self.lora_variant:
                raise ValueError(f"merge: expected plain LoRA, got a variant as adapter {name!r}")
            parts = self._parts(name)
            if safe_merge and not all(_finite(parameter, part) for parameter, part in parts):
                raise ValueError(f"merge: adapter {name!r} makes numbers that are not finite; nothing was merged of it")
            for parameter, part in parts:
                parameter.add_(part)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes all merged adapters out of this rank's part of the weight again."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            for parameter, part in self._parts(name) if name in self.lora_A else ():
                parameter.sub_(part)

    def _parts(self, name: str) -> list[tuple[Any, torch.Tensor]]:
        """Parameters of the layer and what an adapter adds to them, cut alike."""
        whole = [(self.base_layer.weight, self.get_delta_weight(name))]
        if self.lora_bias.get(name):
            if self.base_layer.bias is None:
                raise ValueError(f"merge: expected a layer with a bias, into which that of adapter {name!r} goes")
            whole.append((self.base_layer.bias, self.lora_B[name].bias * self.scaling[name]))
        return [(parameter, _like(parameter, _whole(added))) for parameter, added in whole]


def _like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """``whole``, which every rank has, distributed as ``parameter``; nothing is sent."""
    whole = whole.detach().to(parameter.dtype)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _finite(parameter: torch.Tensor, added: torch.Tensor) -> bool:
    """Whether a sum is finite, on all ranks."""
    total = parameter + added
    if not isinstance(total, DTensor):
        return bool(torch.isfinite(total).all())
    mesh, bad = total.device_mesh, (~torch.isfinite(total.to_local())).any().float()
    return not bool(DTensor.from_local(bad, mesh, [Partial("max")] * mesh.ndim, run_check=False).full_tensor())


def give_whole_sizes() -> None:
    """From now on PEFT makes adapters for the whole features of a distributed layer, not for this rank's part of them.

    It takes a DTensor for a layer that computes with its part of the weight.  Adapters that begin with parts of the
    weight are refused for such layers.  Does nothing until peft is imported.
    """
    layer = sys.modules.get("peft.tuners.lora.layer")
    if layer is None or hasattr(layer.LoraLayer, "_sizes_of_parts"):
        return
    stock = layer.LoraLayer._get_in_out_features

    def sizes(self: Any, module: Any) -> tuple[int, int] | tuple[None, None]:
        if "sequence_placements" in vars(module) and isinstance(module, nn.Linear):
            return module.in_features, module.out_features
        found: tuple[int, int] | tuple[None, None] = stock(self, module)
        return found

    layer.LoraLayer._sizes_of_parts = stock
    layer.LoraLayer._get_in_out_features = sizes
    for kind in _FROM_WEIGHT:
        begin = getattr(layer.LoraLayer, f"{kind}_init", None)
        if begin is not None:
            setattr(layer.LoraLayer, f"{kind}_init", _of_stock_layers(kind, begin))


def _of_stock_layers(kind: str, begin: Any) -> Any:
    """``begin``, a way in which adapters of ``kind`` begin, refused for a distributed layer.

    PEFT takes the weight apart and assigns what is left to ``weight.data``, which no distributed weight takes.
    """

    @functools.wraps(begin)
    def checked(self: Any, *given: Any, **named: Any) -> Any:
        if "sequence_placements" in vars(self.get_base_layer()):
            raise ValueError(
                f"init_lora_weights: expected values that do not come from the weight for a model that is parallelized "
                f"already, got {kind}: put the adapters on the stock model, and parallelize it then"
            )
        return begin(self, *given, **named)

    return checked


def _lora_class() -> type | None:
    layer = sys.modules.get("peft.tuners.lora.layer")
    return None if layer is None else layer.Linear


def _is_lora_linear(module: nn.Module) -> bool:
    """PEFT's own LoRA layer around a linear one, or that layer in a parallelized model; no other class of its kind."""
    cls, found = _lora_class(), type(module)
    return cls is not None and (found is cls or found.__mro__[1:3] == (SequenceLora, cls))


def is_peft_model(model: nn.Module) -> bool:
    """Whether ``model`` is a PEFT model around another one."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def stock_model(model: Any) -> Any:
    """The model that PEFT was put around; ``model`` itself if it was not."""
    return model.get_base_model() if is_peft_model(model) else model


def check_peft_model(model: Any) -> None:
    """Raises ValueError, naming the kind, for a PEFT model that does more than wrap linear layers by LoRA."""
    if not is_peft_model(model):
        return
    for name, config in model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise ValueError(
                f"model: expected LoRA adapters, got {kind} as adapter {name!r}: other kinds of PEFT are not supported "
                f"in a parallelized model"
            )


def refuse_others(model: nn.Module, served: Iterable[nn.Module]) -> None:
    """Raises ValueError, naming the module, if PEFT wraps anything but the projections ``served``."""
    if "peft" not in sys.modules:
        return
    known = {id(module) for module in served}
    for path, module in model.named_modules():
        if id(module) in known or not any(cls.__module__.startswith("peft.") for cls in type(module).__mro__):
            continue
        if type(module).__name__ == "ModulesToSaveWrapper":
            raise ValueError(
                f"{path}: expected a stock module, got one that modules_to_save copied: in a parallelized model PEFT "
                f"trains adapters of attention and feed-forward projections only; leave it out of modules_to_save"
            )
        raise ValueError(
            f"{path}: expected LoRA adapters of attention and feed-forward projections only, got "
            f"{type(module).__module__}.{type(module).__name__}: leave it out of target_modules, or {_UNMERGED}"
        )


def refuse_row_adapters(layers: Iterable[Any]) -> None:
    """Raises ValueError in a call with ``adapter_names``, of which PEFT tells its layers by hooks."""
    hooks = [
        (layer, number)
        for layer in layers
        for number, hook in layer._forward_pre_hooks.items()
        if "adapter_names" in getattr(hook, "keywords", ())
    ]
    for layer, number in hooks:  # PEFT leaves them where they are if a call ends with an error
        del layer._forward_pre_hooks[number]
        layer._forward_pre_hooks_with_kwargs.pop(number, None)
    if hooks:
        raise ValueError(
            "adapter_names: expected none, got one for each row: a parallelized model multiplies all rows by the "
            "active adapters. Call it for each adapter with its rows, after set_adapter(name) or in disable_adapter()"
        )


def lora_linears(modules: Iterable[Any]) -> Iterator[Any]:
    """Those of ``modules`` that are LoRA layers around linear ones."""
    return (module for module in modules if _is_lora_linear(module))


@functools.cache
def _require_peft() -> None:
    require("peft")  # once: layers are looked at in every forward


def check_adapter(name: str, module: Any, group: SequenceGroup) -> None:
    """Raises ValueError unless all that the LoRA layer ``module`` does now is what ``nn/adapters.py`` computes.

    And ImportError for a PEFT that is too old: here, where adapters made after ``parallelize`` come by, too.
    """
    _require_peft()
    base = module.base_layer
    if type(base) is not nn.Linear and not (isinstance(base, nn.Linear) and is_parametrized(base)):
        raise ValueError(
            f"{name}: expected an adapter of a stock Linear, got one of {type(base).__module__}.{type(base).__name__}: "
            f"quantized layers are not supported"
        )
    if module.disable_adapters and module.merged:
        raise ValueError(
            f"{name}: expected adapters that are disabled or merged, got both: call unmerge_adapter() before disabling"
        )
    if module.fan_in_fan_out:
        raise ValueError(f"{name}: expected fan_in_fan_out=False, as linear layers have it, got True")
    if module.disable_adapters or module.merged:
        return
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        if adapter in module.lora_variant or adapter in module.lora_magnitude_vector:
            variant = type(module.lora_variant.get(adapter)).__name__.removesuffix("LinearVariant")
            raise ValueError(
                f"{name}: expected plain LoRA, got the variant {variant} as adapter {adapter!r}: it needs the norm, "
                f"the input or the output of the whole layer; {_UNMERGED}"
            )
        dropout = module.lora_dropout[adapter]
        for what, part, classes in (
            ("lora_A", module.lora_A[adapter], (nn.Linear,)),
            ("lora_B", module.lora_B[adapter], (nn.Linear,)),
            ("lora_dropout", dropout, (nn.Identity, nn.Dropout)),
        ):
            if type(part) not in classes:
                raise ValueError(
                    f"{name}.{what}.{adapter}: expected a stock {classes[-1].__name__}, got "
                    f"{type(part).__module__}.{type(part).__name__}"
                )
            if what != "lora_dropout" and (changed := changed_call(part)):
                raise ValueError(
                    f"{name}.{what}.{adapter}: expected a layer without hooks, got one with {changed}: it is not called"
                )
        expected = [(rank := module.r[adapter], base.in_features), (base.out_features, rank)]
        got = [tuple(part[adapter].weight.shape) for part in (module.lora_A, module.lora_B)]
        if got != expected:
            raise ValueError(
                f"{name}: expected lora_A and lora_B of adapter {adapter!r} of the shapes {expected}, got {got}: "
                f"import peft before parallelize, which lets it make adapters for whole layers"
            )
    if group.tokens == "replicated" and any(adapter.drops for adapter in adapters_of(module)):
        raise ValueError(
            f"{name}.lora_dropout: expected 0 where ranks compute the same tokens, whose random numbers would differ: "
            f"use another strategy than 'tp', or lora_dropout=0"
        )


def take_in(model: nn.Module, projections: Iterable[Any], group: SequenceGroup, *, alike: bool = False) -> None:
    """Takes adapters of ``projections`` that came since into the parallelized model, with the first rank's values.

    PEFT draws an adapter's values from each rank's generator.  Their objects stay: optimizers may hold them already.

    Args:
        model: the parallelized model.
        projections: its LoRA layers.
        group: its ranks; all of them call this.
        alike: the values are known to be the same on all ranks; nothing is sent.
    """
    if torch.compiler.is_compiling():
        return
    fresh: list[torch.Tensor] = []
    for module in projections:
        if not isinstance(module, SequenceLora):
            swap_class(module, SequenceLora, keep_name=True)
        # By reference: the address of a parameter that is gone may be a new one's, on some ranks only.
        known: dict[str, list[weakref.ref[torch.Tensor]]] = vars(module).setdefault("sequence_adapters", {})
        for kind in ("lora_A", "lora_B"):
            for adapter, layer in getattr(module, kind).items():
                for which, parameter in layer.named_parameters(recurse=False):
                    before = [one for one in known.get(f"{kind}.{adapter}.{which}", []) if one() is not None]
                    if not any(one() is parameter for one in before):
                        before.append(weakref.ref(parameter))
                        fresh.append(parameter)
                    known[f"{kind}.{adapter}.{which}"] = before
    if not fresh or alike:
        return
    with torch.no_grad():
        for ranks in group.dimensions():
            for parameter in fresh:
                if not isinstance(parameter, DTensor):
                    mine = parameter.detach()[None].contiguous()
                    parameter.copy_(all_gather(mine, ranks, operator="share_adapters", config=group.config)[0])


def save_adapters(model: Any, folder: str | os.PathLike[str]) -> None:
    """Writes PEFT's directory of a PEFT model's adapters.  Every rank of the model's mesh calls it."""
    target, ranks = Path(folder), SavingRanks(model)
    names = [name for name in model.state_dict() if _saved(name)]
    ranks.come_together("save_pretrained", target.absolute(), names)
    failure = None
    state = {name: _whole(tensor) for name, tensor in model.state_dict().items() if _saved(name)}
    if ranks.first:
        try:
            model.save_pretrained(str(target), state_dict=state, save_embedding_layers=False)
        except Exception as error:  # noqa: BLE001
            failure = error
    failed = ranks.anywhere(failure is not None, "save_pretrained")
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"save_pretrained: the first rank could not write {target}; its error says why")


def load_adapter(model: Any, folder: str | os.PathLike[str]) -> None:
    """Loads PEFT's directory of one adapter into the active one of a PEFT model; nothing is sent."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    source = Path(folder) / _WEIGHTS
    if not source.is_file():
        raise ValueError(f"folder: expected a PEFT directory with {_WEIGHTS}, got {folder}")
    adapter, found = model.active_adapter, load_file(source)
    expected = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    problems = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unknown: {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name}: expected {list(expected[name].shape)}, got {list(found[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name].shape != found[name].shape
    ]
    held = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
    problems += [f"{name}: PEFT gave a copy of it" for name in expected if _address(expected[name]) not in held]
    if problems:
        raise ValueError(f"{source} does not fit adapter {adapter!r}, nothing was loaded:\n" + "\n".join(problems[:20]))
    with torch.no_grad():  # into the model's own: PEFT's way in knows nothing of DTensors
        for name, value in expected.items():
            whole = found[name].to(value.device, value.dtype)
            value.copy_(_like(value, whole))


def has_adapters(model: nn.Module) -> bool:
    """Whether a module of ``model`` is a LoRA layer."""
    return next(lora_linears(model.modules()), None) is not None


def _address(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr()


def _saved(name: str) -> bool:
    return "lora_" in name or name.endswith(".bias")


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def base_layer(module: nn.Module) -> Any:
    """The linear layer in a projection that LoRA is put around; other wrappers stay what they are."""
    return base_of(module) if _is_lora_linear(module) else module
