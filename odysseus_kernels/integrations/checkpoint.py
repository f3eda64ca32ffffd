"""Checkpoints of a model and its optimizer that any strategy, mesh and number of ranks can resume from.

What is saved is the whole model's state by the stock names of its parameters, each rank writing its part; what is
loaded is whatever part a rank holds, to the bit. :mod:`~odysseus_kernels.integrations.checkpoint_files` says what the
folder is made of. Everything that can be wrong with a checkpoint is found from its description, before the first tensor
is changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from odysseus_kernels.integrations import checkpoint_files as files
from odysseus_kernels.integrations.alike import note_loaded
from odysseus_kernels.integrations.saving import SavingRanks
from odysseus_kernels.nn.master import MasterWeights

__all__ = ["join_names", "load_checkpoint", "model_tensors", "save_checkpoint"]

# What wrappers of modules put into the names of parameters; a wrapped model has the checkpoint of the bare one.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
_STEP = "step"
# How an optimizer computes, not what: the loading one's own choice, which may be on another device.
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
_NO_SETTINGS = ("params", "param_names", *_IMPLEMENTATION)


@torch.inference_mode(False)
@torch.no_grad()
def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Saves a parallelized or a stock model, and its optimizer.  Every rank of the model's mesh calls it.

    For a stock model every rank of the default process group does.

    The folder appears only when it is complete: until then it is called ``<folder>.unfinished``. A checkpoint of the
    same name is replaced, and nothing else ever is. All ranks must see the same file system.

    A parameter that has several names is saved once. Beside DCP's files, which PyTorch's tools can read, the folder has
    ``checkpoint.json``, which :func:`load_checkpoint` reads instead of DCP's pickle. While saving, DCP's own
    collectives carry plans between the ranks of the job.

    Args:
        folder: made with its parents.
        model: parameters and buffers are plain tensors, the same on every rank, or DTensors of any placement.
        optimizer: any that keeps its state by parameter; parameters without state yet are saved as such.
        extra: what else belongs to the run: numbers, strings, lists and dictionaries of them, and plain tensors at the
            top level; the same on every rank.

    Raises:
        ValueError: for state that cannot be saved, or a folder that exists and is not a checkpoint or holds other
            things as well; names it, before anything is written.
        CommunicationError: if ranks make other calls, save other tensors or elsewhere, or do not come within the
            ``timeout_s`` that the model was parallelized with.
        RuntimeError: on every rank, if one could not write; an earlier checkpoint of this name is kept.

    Example:
        >>> model = ody.parallelize(model, mesh)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> ody.save_checkpoint(folder / "step-10", model, optimizer, extra={"step": 10})
        >>> (folder / "step-10" / "checkpoint.json").exists()
        True
    """
    named = model_tensors(model)
    tensors = {f"model.{name}": tensor for name, tensor in named.items()}
    contents: dict[str, Any] = {"optimizer": None}
    if optimizer is not None:
        contents["optimizer"] = _describe_optimizer(optimizer, _parameter_names(model), tensors)
    plain = {}
    for name, value in (extra or {}).items():
        if isinstance(value, DTensor):
            raise ValueError(f"extra: expected plain tensors, the same on every rank, got a DTensor as {name}")
        if isinstance(value, torch.Tensor):
            tensors[f"extra.{name}"] = value
        else:
            plain[name] = value
    contents["extra"] = plain
    try:
        json.dumps(contents)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected extra and settings of the optimizer that JSON can hold: {error}") from None
    target, ranks = Path(folder).absolute(), SavingRanks(model)
    ranks.come_together("save_checkpoint", target, tensors)
    files.write(target, {name: tensor.detach() for name, tensor in tensors.items()}, contents, ranks.process_group)


@torch.inference_mode(False)
@torch.no_grad()
def load_checkpoint(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Restores what :func:`save_checkpoint` saved, into a model of any strategy and number of ranks.

    Nothing is sent, and nothing is unpickled: the description is JSON, and tensors are read with
    ``torch.load(weights_only=True)``.

    Args:
        folder: a complete checkpoint.
        model: filled in place; its names, shapes and dtypes are the saved model's, its placements are its own.
        optimizer: of the same class and with the same groups of parameters as the saved one. Its state and its
            settings (learning rates and so on) become the saved ones. None leaves saved state unread.

    Returns:
        ``extra`` as it was saved.

    Raises:
        ValueError: if there is no complete checkpoint, or names, shapes or dtypes are not those of the model or the
            optimizer. The message lists them; nothing was loaded.
        RuntimeError: if a file of the checkpoint cannot be read; the model is then partly loaded.

    Example:
        >>> ody.save_checkpoint(folder / "step-10", model, extra={"step": 10})  # a stock model
        >>> model = ody.parallelize(model, mesh, "ulysses")
        >>> ody.load_checkpoint(folder / "step-10", model)
        {'step': 10}
    """
    description = files.read_description(Path(folder).absolute())
    targets = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
    saved = {name for name in description.tensors if name.startswith("model.")}
    problems = _differences("the model", targets.keys(), saved)
    problems += _unlike(description, {name: tensor for name, tensor in targets.items() if name in saved})
    state: dict[torch.Tensor, dict[str, Any]] = {}
    if optimizer is not None:
        described = description.contents["optimizer"]
        if described is None:
            raise ValueError(f"{folder}: expected a checkpoint with an optimizer, got one of a model only")
        names = _parameter_names(model)
        problems += _optimizer_problems(optimizer, names, described, description)
        if not problems:
            state, moments = _new_state(optimizer, names, described, description)
            targets |= moments
    if problems:
        raise ValueError(f"{folder} does not fit, nothing was loaded:\n" + "\n".join(problems))
    extra = dict(description.contents["extra"])
    for name, (dtype, shape) in description.tensors.items():
        if name.startswith("extra."):
            extra[name.removeprefix("extra.")] = targets[name] = torch.empty(shape, dtype=dtype)
    with torch.no_grad():
        files.read_tensors(description, {name: tensor.detach() for name, tensor in targets.items()})
    if optimizer is not None:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, saved_group in zip(optimizer.param_groups, description.contents["optimizer"]["groups"], strict=True):
            _restore_settings(group, saved_group["settings"])
    note_loaded(model)
    return extra


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by stock name, each once, under the first of its names.

    Raises:
        ValueError: for state that is no tensor.
    """
    found: dict[str, torch.Tensor] = {_stock_name(name): p for name, p in model.named_parameters()}
    known = {id(parameter) for parameter in found.values()}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in known:
            continue
        if name not in buffers:
            raise ValueError(f"model: expected parameters and buffers only, but its state has {name} as well")
        known.add(id(value))
        found[_stock_name(name)] = value
    return found


def join_names(names: Iterable[str]) -> str:
    """Names for a message, at most the first twenty."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - 20} more" if len(ordered) > 20 else ""
    return ", ".join(ordered[:20]) + rest


def _stock_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): _stock_name(name) for name, parameter in model.named_parameters()}


def _differences(what: str, expected: Iterable[str], saved: Iterable[str]) -> list[str]:
    expected, saved = set(expected), set(saved)
    lines = []
    if expected - saved:
        lines.append(f"missing in the checkpoint, expected by {what}: {join_names(expected - saved)}")
    if saved - expected:
        lines.append(f"in the checkpoint, unknown to {what}: {join_names(saved - expected)}")
    return lines


def _unlike(description: files.Description, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Tensors whose shape or dtype is not the saved one's."""
    lines = []
    for name, tensor in sorted(tensors.items()):
        dtype, shape = description.tensors[name]
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            expected, got = f"{list(tensor.shape)} {tensor.dtype}", f"{list(shape)} {dtype}"
            lines.append(f"{name}: expected {expected}, got {got}")
    return lines


def _named_groups(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """The groups of an optimizer, each with its parameters by name."""
    for group in optimizer.param_groups:
        unknown = [list(p.shape) for p in group["params"] if id(p) not in names]
        if unknown:
            raise ValueError(
                f"optimizer: expected parameters of the model, got {len(unknown)} others, the first of shape "
                f"{unknown[0]}: make the optimizer after parallelize, from model.parameters()"
            )
        yield group, {names[id(p)]: p for p in group["params"]}


def _describe_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Settings and state as JSON; tensors of the state are added to ``tensors``."""
    groups, states = [], {}
    for group, parameters in _named_groups(optimizer, names):
        settings = {key: _number(value) for key, value in group.items() if key not in _NO_SETTINGS}
        groups.append({"settings": settings, "parameters": list(parameters)})
        for name, parameter in parameters.items():
            values: dict[str, Any] = {}
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, torch.Tensor):
                    values[key] = {"value": value}
                    continue
                if isinstance(value, DTensor) and value.shape != parameter.shape:
                    raise ValueError(
                        f"optimizer: expected state of the parameter's shape {list(parameter.shape)} or the same on "
                        f"every rank, got a DTensor {list(value.shape)} as {key} of {name}"
                    )
                values[key] = {"tensor": True}
                tensors[_state_name(name, key)] = value
            states[name] = values
    return {"class": _kind(optimizer), "groups": groups, "state": states}


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """What must be the same for state and settings to mean the same."""
    return optimizer.kind if isinstance(optimizer, MasterWeights) else type(optimizer).__name__


def _state_name(parameter: str, key: str) -> str:
    return f"optimizer.{parameter}.{key}"


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value


def _optimizer_problems(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    described: Mapping[str, Any],
    description: files.Description,
) -> list[str]:
    if _kind(optimizer) != described["class"]:
        return [f"optimizer: expected {_kind(optimizer)}, got {described['class']}"]
    own, saved = list(_named_groups(optimizer, names)), described["groups"]
    if len(own) != len(saved):
        return [f"optimizer: expected {len(own)} groups of parameters, got {len(saved)}"]
    lines = []
    for index, ((_, parameters), group) in enumerate(zip(own, saved, strict=True)):
        lines += _differences(f"group {index} of the optimizer", parameters, group["parameters"])
        for name, parameter in parameters.items():
            keys = set(described["state"].get(name, ()))
            state = optimizer.state.get(parameter, {})
            held = {_state_name(name, key): state[key] for key in keys & set(state)}
            lines += _unlike(description, {key: value for key, value in held.items() if key in description.tensors})
    return lines


def _new_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    described: Mapping[str, Any],
    description: files.Description,
) -> tuple[dict[torch.Tensor, dict[str, Any]], dict[str, torch.Tensor]]:
    """The state to restore, and by name the tensors in it that are to be read."""
    state: dict[torch.Tensor, dict[str, Any]] = {}
    targets: dict[str, torch.Tensor] = {}
    for group, parameters in _named_groups(optimizer, names):
        for name, parameter in parameters.items():
            values: dict[str, Any] = {}
            for key, entry in described["state"][name].items():
                if "value" in entry:
                    values[key] = entry["value"]
                    continue
                dtype, shape = description.tensors[_state_name(name, key)]
                values[key] = targets[_state_name(name, key)] = _like(parameter, group, key, dtype, shape)
            if values:
                state[parameter] = values
    return state, targets


def _like(
    parameter: torch.Tensor, group: Mapping[str, Any], key: str, dtype: torch.dtype, shape: torch.Size
) -> torch.Tensor:
    """State of the parameter's shape is distributed as the parameter is; anything else is the same on every rank."""
    if shape == parameter.shape and key != _STEP:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    # torch's optimizers count steps on the CPU unless the count is part of a kernel.
    on_device = key != _STEP or group.get("fused") or group.get("capturable")
    return torch.empty(shape, dtype=dtype, device=parameter.device if on_device else "cpu")


def _restore_settings(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        present = group.get(key)
        if isinstance(present, torch.Tensor):
            present.fill_(value)
        else:
            group[key] = tuple(value) if isinstance(present, tuple) else value
