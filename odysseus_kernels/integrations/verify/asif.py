"""What would explain a part that differs: the single process's model run as if something had been left out.

Each explanation is tried, not guessed: it is named only if the single process, changed in that way alone, gives what
the ranks gave.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import create_causal_mask

from odysseus_kernels.integrations.verify.models import Batch, Step, forward, gradients_aside
from odysseus_kernels.integrations.verify.observe import bare, closeness

__all__ = ["explain_gradient", "explain_loss", "explain_part", "scale_hint"]

_MOST_SHIFTS = 8
_IGNORED = -100
_PADDING_ROUTED = "as if padding counted in the loss of the router"


@dataclasses.dataclass(frozen=True)
class _AsIf:
    """One explanation: a changed batch, or a change of the model for as long as a context lasts."""

    text: str
    batch: dict[str, torch.Tensor]
    change: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def explain_part(
    stock: nn.Module, batch: Batch, name: str, found: torch.Tensor, bound: float, counts: torch.Tensor, ranks: int
) -> str:
    """What would make the single process's part ``name`` give ``found`` [B, L, ...]; empty where nothing tried does.

    Args:
        stock: the single process's model.
        batch: the whole batch.
        name: of the part.
        found: what the ranks gave.
        bound: error up to which two results are the same.
        counts: bool [B, L]: tokens that are compared.
        ranks: how many share the sequence.
    """
    for one in _part_explanations(stock, batch, name, ranks):
        with one.change():
            part = forward(stock, one.batch, [name]).parts.get(name)
        if part is not None and closeness(found[counts], part[counts])[0] <= bound:
            return one.text
    return ""


def _part_explanations(stock: nn.Module, batch: Batch, name: str, ranks: int) -> Iterator[_AsIf]:
    given, config = dict(batch), cast(Any, stock.config)
    rows, length = given["input_ids"].shape
    if "attention_mask" in given:
        yield _AsIf("as if there were no attention_mask", {k: v for k, v in given.items() if k != "attention_mask"})
    counted = torch.arange(length, device=given["input_ids"].device).expand(rows, length)
    positions = given.get("position_ids", counted)
    if bool((positions != counted).any()):
        yield _AsIf("as if position_ids counted from 0 to the end", {**given, "position_ids": counted})
    own = -(-length // ranks)
    yield _AsIf(f"as if position_ids began from 0 on each of {ranks} ranks", {**given, "position_ids": counted % own})
    modules = {bare(path): module for path, module in stock.named_modules()}
    within = {path: module for path, module in modules.items() if path == name or path.startswith(f"{name}.")}
    for path, module in within.items():
        if getattr(module, "k_proj", None) is None:
            continue
        window = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
        if window is not None:
            yield _AsIf(
                f"as if {path} had no sliding window of {window}",
                given,
                functools.partial(_unwindowed, stock, module, given.get("attention_mask"), positions),
            )
        heads: int = config.num_key_value_heads
        for shift in range(1, min(heads, _MOST_SHIFTS)):
            yield _AsIf(
                f"as if the {heads} key/value heads of {path} were rotated by {shift}",
                given,
                functools.partial(_rotated_heads, module, heads, shift),
            )


@contextlib.contextmanager
def _unwindowed(stock: nn.Module, attention: Any, mask: torch.Tensor | None, positions: torch.Tensor) -> Iterator[None]:
    def replace(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        full = create_causal_mask(
            config=stock.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            past_key_values=None,
            position_ids=positions,
        )
        return arguments, {**keywords, "attention_mask": full}

    before = vars(attention).get("sliding_window")
    handle = attention.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        if before is not None:
            attention.sliding_window = None
        yield
    finally:
        handle.remove()
        if before is not None:
            attention.sliding_window = before


@contextlib.contextmanager
def _rotated_heads(attention: Any, heads: int, shift: int) -> Iterator[None]:
    tensors = [t for layer in (attention.k_proj, attention.v_proj) for t in (layer.weight, layer.bias) if t is not None]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            for tensor, kept in zip(tensors, before, strict=True):
                tensor.copy_(kept.unflatten(0, (heads, -1)).roll(shift, 0).flatten(0, 1))
        yield
    finally:
        with torch.no_grad():
            for tensor, kept in zip(tensors, before, strict=True):
                tensor.copy_(kept)


def scale_hint(scale: float, ranks: dict[str, int], what: str) -> str:
    """Words for a result that is a multiple of the right one."""
    for name, size in ranks.items():
        if size > 1:
            if abs(scale * size - 1) < 1e-3:
                return (
                    f"{what} is 1/{size} of the single process's: divided by the {size} ranks of {name} once too often"
                )
            if abs(scale / size - 1) < 1e-3:
                return (
                    f"{what} is {size} times the single process's: added over the {size} ranks of {name} once too often"
                )
    return f"{what} is {scale:.4g} times the single process's"


def explain_loss(
    stock: nn.Module,
    batch: Batch,
    logits: torch.Tensor,
    found: float,
    truth: float,
    bound: float,
    ranks: dict[str, int],
) -> str:
    """What would make the single process's loss ``found`` though its logits [B, L, V] are right."""
    labels = batch.get("labels")

    def same(value: float) -> bool:
        return abs(found - value) <= bound * max(abs(value), 1e-12)

    if labels is not None:
        for shift, text in ((2, "as if labels were shifted twice"), (0, "as if labels were not shifted")):
            rows, targets = logits[:, : logits.shape[1] - shift], labels[:, shift:]
            if same(F.cross_entropy(rows.flatten(0, 1).float(), targets.flatten(), ignore_index=_IGNORED).item()):
                return text
    padded = _padded(stock, batch, ranks["seq and ring"])
    if padded is not None:
        with torch.no_grad():
            if same(stock(**padded, use_cache=False).loss.item()):
                return _PADDING_ROUTED
    return scale_hint(found / truth, ranks, "the loss") if truth else ""


def explain_gradient(
    stock: nn.Module, batch: Batch, step: Step, name: str, found: torch.Tensor, bound: float, ranks: int
) -> str:
    """What would make the single process's gradient of the parameter ``name`` ``found``, though the loss is right."""
    padded = _padded(stock, batch, ranks)
    if padded is None:
        return ""
    with gradients_aside(stock):
        step(stock, padded).backward()
        gradient = next((p.grad for path, p in stock.named_parameters() if bare(path) == name), None)
    same = gradient is not None and closeness(found, gradient)[0] <= bound
    return _PADDING_ROUTED if same else ""


def _padded(stock: nn.Module, batch: Batch, ranks: int) -> dict[str, torch.Tensor] | None:
    """The batch of a mixture of experts with the padding that cutting adds, taken for tokens; None without either."""
    missing = -batch["input_ids"].shape[1] % ranks
    if not missing or not hasattr(stock.config, "router_aux_loss_coef"):
        return None
    names = ("input_ids", "labels")
    return {
        name: F.pad(batch[name], (0, missing), value=_IGNORED if name == "labels" else 0)
        for name in names
        if name in batch
    }
