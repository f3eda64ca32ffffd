"""PEFT's low-rank adapters (LoRA) in parallelized models; this package's only home of peft, which stays optional.

The wrappers stay where PEFT put them, under its names, and their adapters stay plain parameters, whole and alike on
every rank: PEFT's own tools (switching, adding and saving adapters) find what they expect.  ``nn/adapters.py`` says how
they are multiplied; their gradients are complete, as all are.  What PEFT can wrap otherwise is refused by
name (``integrations/peft_refusals.py``).
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

from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.integrations.saving import SavingRanks
from odysseus_kernels.nn.adapters import base_of
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.swap import swap_class

__all__ = [
    "base_layer",
    "give_whole_sizes",
    "has_adapters",
    "is_peft_model",
    "load_adapter",
    "lora_linears",
    "save_adapters",
    "stock_model",
    "take_in",
]

_WEIGHTS = "adapter_model.safetensors"
# PEFT's ways to begin an adapter with parts of the weight, most of which are taken out of it.
_FROM_WEIGHT = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


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


def lora_linears(modules: Iterable[Any]) -> Iterator[Any]:
    """Those of ``modules`` that are LoRA layers around linear ones."""
    if _lora_class() is None:
        return iter(())
    return (module for module in modules if _is_lora_linear(module))


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
