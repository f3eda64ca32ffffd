"""One sum for the gradients of all adapters that a forward pass uses, in place of one for each of them.

An adapter's A and B are whole on every rank, and their gradients are added over the ranks.  They are small and many: a
call for each costs a round of messages.  So a forward pass takes all of them through one node of the graph at its
beginning.  Autograd runs that node when the last of their gradients is there, at the end of the backward pass, and it
sends them together: one all-reduce for each type and each group of ranks.  Gradients reach parameters as always, so
that accumulation, hooks and ``torch.autograd.grad`` see nothing of it.

Where there is no such node, :mod:`~odysseus_kernels.nn.parameters` adds each gradient by itself: in layers that are
computed again with the reentrant kind of checkpointing, and in those that ``fully_shard`` is around, which has their
parameters' values within them alone and takes gradients when they are through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from odysseus_kernels.nn.group import SequenceGroup

__all__ = ["VALUES", "AdapterValues", "summed_together"]

VALUES = "adapter_values"
"""Attribute of an adapted projection while a forward pass runs: :class:`AdapterValues` by (kind, adapter, name)."""


class AdapterValues(NamedTuple):
    """A parameter as a forward pass uses it.

    Attributes:
        tokens: for this rank's own tokens.
        heads: for its own heads or features.
    """

    tokens: Tensor
    heads: Tensor


@contextlib.contextmanager
def summed_together(layers: Iterable[Any], group: SequenceGroup) -> Iterator[None]:
    """A forward pass, in which the gradients of all parameters of adapters are added in one call.

    Args:
        layers: projections with adapters around them.
        group: the ranks.
    """
    found: dict[tuple[Any, tuple[str, str, str]], nn.Parameter] = {}
    together = torch.is_grad_enabled() and group.every_size > 1 and not torch.compiler.is_compiling()
    for layer in layers if together else ():
        for kind in ("lora_A", "lora_B"):
            for adapter, linear in getattr(layer, kind).items():
                for name, parameter in linear.named_parameters(recurse=False):
                    if parameter.requires_grad and not isinstance(parameter, DTensor):
                        found[layer, (kind, adapter, name)] = parameter
    if not found:
        yield
        return
    over = [_name(group.token_group), _name(group.everyone)]
    values = _SummedTogether.apply(tuple(over), group.config.key(), *found.values())
    holders = list(dict.fromkeys(layer for layer, _ in found))
    for layer in holders:
        vars(layer)[VALUES] = {}
    for number, (layer, key) in enumerate(found):
        vars(layer)[VALUES][key] = AdapterValues(*values[2 * number : 2 * number + 2])
    try:
        yield
    finally:
        for layer in holders:
            del vars(layer)[VALUES]


def _name(group: dist.ProcessGroup | None) -> str | None:
    return None if group is None or group.size() == 1 else group.group_name


class _SummedTogether(torch.autograd.Function):
    """Parameters that all ranks hold whole.

    forward: each parameter twice, as it is used for own tokens and for own heads
    gradients: of each parameter the sum over the ranks of the one use's group, and of the other's
    """

    @staticmethod
    def forward(ctx: Any, over: tuple[str | None, ...], config_key: str, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Returns views: the parameters are not copied."""
        ctx.over, ctx.config_key, ctx.like = over, config_key, [(one.shape, one.dtype) for one in parameters]
        ctx.set_materialize_grads(False)  # a use that there is not sends nothing
        return tuple(one.view_as(one) for one in parameters for _ in over)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns complete gradients."""
        uses = len(ctx.over)
        bundles: dict[tuple[str | None, torch.dtype], list[tuple[int, Tensor]]] = {}
        for place, grad in enumerate(grads):
            if grad is not None:
                bundles.setdefault((ctx.over[place % uses], grad.dtype), []).append((place // uses, grad))
        totals: list[Tensor | None] = [None] * len(ctx.like)
        for (group_name, _), bundle in bundles.items():
            summed = [grad for _, grad in bundle]
            if group_name is not None:
                flat = torch.cat([grad.reshape(-1) for grad in summed])
                flat = torch.ops.odysseus.replicated_parameter_backward(flat, group_name, ctx.config_key)
                parts = flat.split([grad.numel() for grad in summed])
                # Copies: an optimizer that keeps one gradient would else keep all of them.
                summed = [part.view(grad.shape).clone() for part, grad in zip(parts, summed, strict=True)]
            for (place, _), grad in zip(bundle, summed, strict=True):
                before = totals[place]
                totals[place] = grad if before is None else before + grad
        return (None, None, *totals)
