"""Puts the ranks' parts of a sequence together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.attention import layout
from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.nn.cut import KEY, RING_LAYOUT, SequenceCut, digest, natural_order
from odysseus_kernels.nn.group import SequenceGroup

__all__ = ["gather_sequence"]


def gather_sequence(
    tensor: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    mesh: DeviceMesh,
    config: OverlapConfig | None = None,
) -> torch.Tensor:
    """Gathers what each rank has for its own tokens (logits, hidden states) as whole sequences, on every rank.

    Tokens come in the order of the sequence, without padding. It is differentiable as long as every rank computes the
    same from the result, a loss for instance: each rank's part gets its part of the gradient, and nothing is sent.

    Args:
        tensor: [B, s, ...], this rank's part, of any real dtype.
        batch: what :func:`shard_sequence` returned for the tokens that ``tensor`` was made of.
        mesh: the mesh that it was cut for.
        config: transport and time limit.

    Returns:
        [B, L, ...]; it is whole in memory: cut the batch into fewer rows where that is too much.

    Raises:
        ValueError: if ``batch`` does not say how it was cut, or ``tensor`` and ``mesh`` do not fit it.
        CommunicationError: ranks differ, or a peer is lost or silent.

    Example:
        >>> part = ody.shard_sequence({"input_ids": batch["input_ids"]}, mesh)
        >>> logits = ody.parallelize(model, mesh)(**part).logits
        >>> whole = ody.gather_sequence(logits, part, mesh)
        >>> logits.shape, whole.shape
        (torch.Size([2, 8, 120]), torch.Size([2, 16, 120]))
        >>> torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    """
    if KEY not in batch:
        raise ValueError(f"batch: expected what shard_sequence returned, with {KEY}, got the keys {sorted(batch)}")
    cut = SequenceCut.read(batch[KEY])
    group = SequenceGroup.of(mesh, config)
    folded = cut.sharded and (cut.ring, cut.size) == (group.every_size, 1)
    group = dataclasses.replace(group, tokens="sharded" if cut.sharded else "replicated", folded=folded)
    cut.check(group)
    rows, local = len(cut.sums), cut.padded // (cut.ring * cut.slices)
    if tensor.ndim < 2 or tensor.shape[:2] != (rows, local):
        raise ValueError(f"tensor: expected this rank's part [{rows}, {local}, ...], got {list(tensor.shape)}")
    return GatheredSequence.apply(tensor, cut, group)  # type: ignore[no-any-return]


class GatheredSequence(torch.autograd.Function):
    """All parts of a sequence, for what every rank then does alike.

    Shapes: part [B, s, ...]; whole [B, L, ...] on every rank.

    forward: all_gather of the parts, put into the order of the sequence, padding cut off
    part gradient: its part of the gradient, which every rank has; 0 for padding; nothing is sent
    """

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, cut: SequenceCut, group: SequenceGroup) -> torch.Tensor:
        """Returns the whole sequences."""
        ctx.cut = cut
        whole = part
        if group.token_group is not None and group.token_group.size() > 1:
            group.announce(f"of batch {digest(cut.sums)}", group.token_group)
            whole = all_gather(part, group.token_group, operator="gather_sequence", dim=1, config=group.config)
        whole = natural_order(whole, cut.ring, cut.slices, cut.pieces)
        if cut.ring > 1:
            whole = whole[:, layout.inverse(cut.ring, cut.padded, RING_LAYOUT, part.device)[: cut.length]]
        return whole[:, : cut.length].clone() if whole is part else whole[:, : cut.length].contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Returns the gradient of this rank's part."""
        (grad,) = grad_outputs
        cut = ctx.cut
        padded = F.pad(grad, (0, 0) * (grad.ndim - 2) + (0, cut.padding)) if cut.padding else grad
        return padded[:, cut.positions(grad.device)], None, None
