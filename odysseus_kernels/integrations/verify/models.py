"""The two models that are compared: copies of the user's, with fewer layers if wanted, and one forward of them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from odysseus_kernels.integrations.verify.observe import bare, observed

__all__ = [
    "Batch",
    "Pass",
    "Step",
    "copy_of",
    "dropout_of",
    "forward",
    "gradients_aside",
    "recomputes",
    "without_dropout",
    "without_labels",
]

Batch = Mapping[str, torch.Tensor]
Step = Callable[[nn.Module, Batch], torch.Tensor]

_LABELS = ("labels", "shift_labels")
_RANDOM = ("jitter_noise", "router_jitter_noise")


def copy_of(model: nn.Module, layers: int | None, dtype: torch.dtype | None) -> nn.Module:
    """A copy of ``model`` in ``dtype``, with its first ``layers`` decoder layers only; ``model`` is left as it was."""
    stack: Any = next((m for m in model.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList)), None)
    if layers is None or stack is None or len(stack.layers) <= layers:
        copied = copy.deepcopy(model)
        return copied if dtype is None else copied.to(dtype)
    if layers < 1:
        raise ValueError(f"layers: expected at least 1, got {layers}")
    all_layers = stack.layers
    try:
        # Layers that are not wanted are never copied: they may be most of the memory.
        stack.layers = all_layers[:layers]
        copied = copy.deepcopy(model)
    finally:
        stack.layers = all_layers
    config: Any = copied.config
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return copied if dtype is None else copied.to(dtype)


def dropout_of(model: nn.Module) -> dict[str, float]:
    """Every probability above zero with which the model drops or disturbs something, by name."""
    found = {}
    for name, module in model.named_modules():
        values = {"p": module.p} if isinstance(module, nn.Dropout) else vars(module)
        for attribute, value in values.items():
            random = attribute == "p" or attribute.endswith("dropout") or attribute in _RANDOM
            if random and isinstance(value, float) and value > 0:
                found[f"{bare(name)}.{attribute}"] = value
    return found


@contextlib.contextmanager
def without_dropout(*models: nn.Module) -> Iterator[None]:
    """Within it nothing is random, even in training mode."""
    changed: list[tuple[nn.Module, str, float]] = []
    try:
        for model in models:
            modules = {bare(name): module for name, module in model.named_modules()}
            for name in dropout_of(model):
                path, _, attribute = name.rpartition(".")
                module = modules[path]
                changed.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, 0.0)
        yield
    finally:
        for module, attribute, value in changed:
            setattr(module, attribute, value)


@contextlib.contextmanager
def recomputes(model: nn.Module, wanted: bool) -> Iterator[int]:
    """Within it, no layer is computed again in backward unless ``wanted``; gives the number of layers that would be."""
    flagged = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    try:
        for module in flagged:
            module.gradient_checkpointing = wanted  # type: ignore[assignment]
        yield len(flagged)
    finally:
        for module in flagged:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def without_labels(batch: Batch) -> dict[str, torch.Tensor]:
    """What a model takes for logits."""
    return {name: value for name, value in batch.items() if name not in _LABELS}


@dataclasses.dataclass
class Pass:
    """What one forward without labels gave: logits [B, L, V] and the parts' outputs [B, L, ...], by name in order."""

    logits: torch.Tensor
    parts: dict[str, torch.Tensor]


@torch.no_grad()
def forward(model: nn.Module, batch: Batch, names: list[str]) -> Pass:
    """One forward without labels, observed."""
    with observed(model, names) as seen:
        logits = model(**without_labels(batch), use_cache=False).logits
    return Pass(logits.detach().clone(), seen)


@contextlib.contextmanager
def gradients_aside(model: nn.Module) -> Iterator[None]:
    """Within it the model has no gradients; earlier ones come back afterwards."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
