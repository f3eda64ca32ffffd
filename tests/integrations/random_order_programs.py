"""What random uses do with a model, with a stock one in a single process or with a parallelized one on ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from random_cases import Use

PARTS = ("lm_head", "model.norm", "mlp", "embed_tokens", "self_attn")


@dataclasses.dataclass(frozen=True)
class Order(Use):
    """A use of a sort of its own, ``variant`` of it, with the step in ``ody.step`` or without."""

    variant: int = 0
    stepped: bool = True

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        """The first and further batches of this use, all whole."""
        return dataclasses.replace(self, seed=self.seed + number).whole()


@dataclasses.dataclass
class Side:
    """The model of one process or of ranks, and how it takes a whole batch; ``odd`` is the rank that does otherwise."""

    use: Order
    model: Any
    give: Callable[[dict[str, torch.Tensor]], dict[str, Any]]
    odd: bool = False

    def loss(self, number: int = 0, change: Callable[[dict[str, Any]], Any] | None = None, **settings: Any) -> Any:
        """Of the batch of this number, which ``change`` has changed before it is cut."""
        batch = self.use.batch(number)
        if change is not None:
            change(batch)
        return self.model(**self.give(batch), **{**self.use.settings(), **settings}).loss


def _two_forwards(side: Side) -> Any:
    first, second = side.loss(0), side.loss(1)
    if side.use.variant % 5 == 4:
        (first + second).backward()
    for loss in ((first,), (second,), (first, second), (second, first), ())[side.use.variant % 5]:
        loss.backward()
    return first + second


def _backward_twice(side: Side) -> Any:
    loss = side.loss()
    loss.backward(retain_graph=True)
    loss.backward()
    return loss


def _evaluation_between(side: Side) -> Any:
    loss = side.loss()
    with torch.inference_mode() if side.use.variant % 2 else torch.no_grad():
        other = side.loss(1)
    loss.backward()
    return loss + other


def _accumulates(side: Side) -> Any:
    losses = []
    for number in range(2):
        losses.append(side.loss(number))
        losses[-1].backward()
    return sum(losses)


def _eval(side: Side) -> Any:
    side.model.eval()
    try:
        loss = side.loss()
        loss.backward()
    finally:
        side.model.train()
    return loss


def _eval_one(side: Side) -> Any:
    return _eval(side) if side.odd else _right(side)


def _right(side: Side, **settings: Any) -> Any:
    loss = side.loss(**settings)
    loss.backward()
    return loss


def _no_grad_one(side: Side) -> Any:
    with torch.no_grad() if side.odd else contextlib.nullcontext():
        loss = side.loss()
    if loss.requires_grad or side.use.variant % 2:
        loss.backward()
    return loss


def _skips_backward(side: Side) -> Any:
    loss = side.loss()
    if not side.odd:
        loss.backward()
    return loss


def _backward_alone(side: Side) -> Any:
    """One rank takes the loss of the other of two forwards."""
    first, second = side.loss(0), side.loss(1)
    (second if side.odd else first).backward()
    return first + second


def _evaluates_alone(side: Side) -> Any:
    if side.odd:
        with torch.no_grad():
            side.loss(side.use.variant % 2)
    return _right(side)


def _late_backward(side: Side) -> Any:
    loss = side.loss()
    if side.odd:
        time.sleep(0.2)
    loss.backward()
    return loss


def _checkpoints(side: Side) -> Any:
    side.model.gradient_checkpointing_enable({"use_reentrant": bool(side.use.variant % 2)})
    try:
        return _right(side)
    finally:
        side.model.gradient_checkpointing_disable()


def _checkpoints_one(side: Side) -> Any:
    return _checkpoints(side) if side.odd else _right(side)


def _scaled(side: Side) -> Any:
    loss = side.loss()
    (loss * 2).backward()
    return loss


def _scaled_one(side: Side) -> Any:
    return _scaled(side) if side.odd else _right(side)


def _autograd_grad(side: Side) -> Any:
    loss, parameters = side.loss(), list(side.model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    return loss


def _part(side: Side) -> str:
    return PARTS[side.use.variant % len(PARTS)]


def _frozen(side: Side) -> Any:
    chosen = [p for name, p in side.model.named_parameters() if _part(side) in name]
    for parameter in chosen:
        parameter.requires_grad_(False)
    try:
        return _right(side)
    finally:
        for parameter in chosen:
            parameter.requires_grad_(True)


def _frozen_one(side: Side) -> Any:
    return _frozen(side) if side.odd else _right(side)


def _autocast(side: Side) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        loss = side.loss()
    loss.backward()
    return loss


def _autocast_one(side: Side) -> Any:
    return _autocast(side) if side.odd else _right(side)


def _model_cast_one(side: Side) -> Any:
    if side.odd:
        side.model.to((torch.bfloat16, torch.float64)[side.use.variant % 2])
    return _right(side)


def _part_cast(side: Side) -> Any:
    for name, module in side.model.named_modules():
        if name.endswith(_part(side)):
            module.to(torch.float64)
    return _right(side)


def _part_cast_one(side: Side) -> Any:
    return _part_cast(side) if side.odd else _right(side)


def _types(side: Side) -> Any:
    """Other types of what a batch holds, which are no other values; the single process has the usual ones."""
    name, dtype = (
        ("input_ids", torch.int32),
        ("labels", torch.int32),
        ("attention_mask", torch.bool),
        ("attention_mask", torch.float32),
        ("position_ids", torch.int32),
    )[side.use.variant % 5]

    def change(batch: dict[str, Any]) -> None:
        if name in batch and hasattr(side.model, "sequence_group"):
            batch[name] = batch[name].to(dtype)

    return _right(side, change=change)


def _types_one(side: Side) -> Any:
    return _types(side) if side.odd else _right(side)


def _items_types(side: Side) -> Any:
    made = (13.0, torch.tensor(13.0), torch.tensor([13.0], dtype=torch.float64), torch.tensor(13, dtype=torch.int32))
    return _right(side, num_items_in_batch=made[side.use.variant % 4])


PROGRAMS: dict[str, Callable[[Side], Any]] = {
    "right": _right,
    "two_forwards": _two_forwards,
    "backward_twice": _backward_twice,
    "evaluation_between": _evaluation_between,
    "accumulates": _accumulates,
    "eval": _eval,
    "eval_one": _eval_one,
    "no_grad_one": _no_grad_one,
    "skips_backward": _skips_backward,
    "backward_alone": _backward_alone,
    "evaluates_alone": _evaluates_alone,
    "late_backward": _late_backward,
    "checkpoints": _checkpoints,
    "checkpoints_one": _checkpoints_one,
    "scaled": _scaled,
    "scaled_one": _scaled_one,
    "autograd_grad": _autograd_grad,
    "frozen": _frozen,
    "frozen_one": _frozen_one,
    "autocast": _autocast,
    "autocast_one": _autocast_one,
    "double": _right,
    "model_cast_one": _model_cast_one,
    "part_cast": _part_cast,
    "part_cast_one": _part_cast_one,
    "types": _types,
    "types_one": _types_one,
    "items_types": _items_types,
}
"""What is done with a model, by its sort; the single process does it with a stock one."""
