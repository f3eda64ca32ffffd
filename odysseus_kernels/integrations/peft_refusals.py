"""What PEFT can put into a model and a parallelized one does not do: refused by name, with what to do instead."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from odysseus_kernels.floors import require
from odysseus_kernels.integrations.calls import changed_call
from odysseus_kernels.integrations.peft import is_peft_model
from odysseus_kernels.nn.adapters import adapters_of
from odysseus_kernels.nn.group import SequenceGroup

__all__ = ["check_adapter", "check_peft_model", "refuse_others", "refuse_row_adapters"]

_UNMERGED = "merge it into the stock model (merge_and_unload), and parallelize that"


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
