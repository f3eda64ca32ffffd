"""What an operator sends ahead while it computes, in the form that custom operators take: tensors, and a text.

An operator's caller knows what its group gathers next; the operator passes it on to its transport
(:class:`~odysseus_kernels.comm.prefetch.Prefetch`).  One tensor stands for the weight shard of a gather, several for
all that an exchange shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from odysseus_kernels.comm.arguments import autocasts, check_tensors
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.sent_ahead import in_backward_pass

__all__ = ["Shards", "choose_ahead", "recomputed_flag", "take_ahead", "tell_ahead"]

Shards = Tensor | Sequence[Tensor] | None
Role = Literal["forward", "backward", "recomputed"]
_ROLES: tuple[Role, ...] = ("forward", "backward", "recomputed")
_ARGUMENTS = {"forward": "prefetch", "backward": "prefetch_backward", "recomputed": "prefetch_recomputed"}


def tell_ahead(
    operator: str, like: Tensor, forward: Shards = None, backward: Shards = None, recomputed: Shards = None
) -> tuple[list[Tensor], str]:
    """Arguments of a custom operator that say what is sent ahead in forward, in backward, and in a backward whose
    forward was computed again.

    Under autocast that is nothing: what travels is made in each call.

    Raises:
        ValueError: a tensor is not like ``like``, a tensor that the operator sends itself.
    """
    if autocasts(like.device):
        return [], ""
    tensors: list[Tensor] = []
    words = []
    for role, shards in zip(_ROLES, (forward, backward, recomputed), strict=True):
        if not (shards is None or isinstance(shards, Tensor | list | tuple)):
            raise ValueError(
                f"{operator}: expected {_ARGUMENTS[role]} to be a tensor, several of them, or None, got "
                f"{type(shards).__name__}"
            )
        parts = [] if shards is None else [shards] if isinstance(shards, Tensor) else list(shards)
        for part in parts:
            _check(operator, _ARGUMENTS[role], like, part, gathered=isinstance(shards, Tensor))
        words.append(f"{'gather' if isinstance(shards, Tensor) else 'shared'}:{len(parts)}")
        tensors += [part.detach() if part.requires_grad else part for part in parts]
    return tensors, " ".join(words)


def _check(operator: str, name: str, like: Tensor, shard: Tensor, *, gathered: bool) -> None:
    check_tensors(operator, **{name: shard})
    if shard.device != like.device or (gathered and (shard.ndim != 2 or shard.dtype != like.dtype)):
        raise ValueError(
            f"{operator}: expected {name} to be a weight shard [n/N, K] of dtype {like.dtype} on {like.device}, got "
            f"{list(shard.shape)}, {shard.dtype} on {shard.device}"
        )


def take_ahead(tensors: Sequence[Tensor], text: str, role: Role) -> Prefetch | None:
    """What :func:`tell_ahead` was told for ``role``."""
    return dict(_parts(tensors, text)).get(role)


def _parts(tensors: Sequence[Tensor], text: str) -> Iterator[tuple[Role, Prefetch | None]]:
    first = 0
    for role, word in zip(_ROLES, text.split(), strict=False):
        kind, _, count = word.partition(":")
        own = tensors[first : first + int(count)]
        first += int(count)
        if own:
            yield role, Prefetch.of_gather(own[0].unsqueeze(0)) if kind == "gather" else Prefetch.of_shared(own)


def recomputed_flag() -> Tensor:
    """Whether an operator's forward runs within a backward pass: bool [], on the CPU, returned beside its results.

    A result, because a checkpoint that computes forward again takes what it saves for backward from there; one that
    keeps the operator's results keeps this one, too.
    """
    return torch.tensor(in_backward_pass())


def choose_ahead(tensors: Sequence[Tensor], text: str, recomputed: Tensor) -> Prefetch | None:
    """What backward sends ahead: where its own forward was computed again, that of the layer before will be."""
    return take_ahead(tensors, text, "recomputed" if bool(recomputed) else "backward")
