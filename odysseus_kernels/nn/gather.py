"""Puts the ranks' parts of a sequence together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.attention import layout
from odysseus_kernels.comm.arguments import check_config
from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.nn.cut import KEY, RING_LAYOUT, SequenceCut, digest, natural_order, part_positions
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.step import sequence_group_of

__all__ = ["LastTokens", "gather_sequence"]


def gather_sequence(
    tensor: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    mesh: DeviceMesh | nn.Module,
    config: OverlapConfig | None = None,
) -> torch.Tensor:
    """Gathers what each rank has for its own tokens (logits, each of ``hidden_states``) as whole sequences, everywhere.

    Tokens come in the order of the sequence, without padding. It is differentiable as long as every rank computes the
    same from the result, a loss for instance: each rank's part gets its part of the gradient, and nothing is sent.

    Args:
        tensor: [B, s, ...], this rank's part, of any real dtype.
        batch: what :func:`shard_sequence` returned for the tokens that ``tensor`` was made of.
        mesh: the mesh that it was cut for; or the parallelized model itself, which knows its mesh.
        config: transport and time limit; None: those of the model.

    Returns:
        [B, L, ...], whole in memory; where that is too much, cut the batch into fewer rows.

    Raises:
        ValueError: if ``batch`` does not say how it was cut, ``tensor`` and ``mesh`` do not fit it, or the model is
            not parallelized.
        CommunicationError: ranks differ, or a peer is lost or silent.

    Example:
        >>> part = ody.shard_sequence({"input_ids": batch["input_ids"]}, mesh)
        >>> model = ody.parallelize(model, mesh)
        >>> logits = model(**part).logits
        >>> whole = ody.gather_sequence(logits, part, model)
        >>> logits.shape, whole.shape
        (torch.Size([2, 8, 120]), torch.Size([2, 16, 120]))
        >>> torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    """
    if KEY not in batch:
        raise ValueError(f"batch: expected what shard_sequence returned, with {KEY}, got the keys {sorted(batch)}")
    cut = SequenceCut.read(batch[KEY])
    if isinstance(mesh, nn.Module):
        group = sequence_group_of(mesh)
        group = group if config is None else dataclasses.replace(group, config=check_config(config))
    else:
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


@dataclasses.dataclass(frozen=True)
class LastTokens:
    """Where the last tokens of sequences lie among the ranks.

    Every rank computes as many rows, so that what is computed for them may communicate; some of them are not wanted.

    Attributes:
        own: int64 [m], which of this rank's tokens it computes.
        taken: int64 [k], where among all ranks' m rows, one rank after another, the last k tokens are, in their order.
        mine: int64 [j], which of the last k tokens are this rank's.
        rows: int64 [j], where these are among its m rows.
        group: the ranks.
    """

    own: torch.Tensor
    taken: torch.Tensor
    mine: torch.Tensor
    rows: torch.Tensor
    group: SequenceGroup

    @staticmethod
    def of(cut: SequenceCut, count: int, group: SequenceGroup, device: torch.device) -> LastTokens:
        """Of the last ``count`` tokens before padding, or of all where there are fewer."""
        first = max(0, cut.length - count)
        # On the CPU, where looking for them waits for nothing.
        parts = range(cut.ring * cut.slices)
        where = [part_positions(cut.ring, cut.slices, part, cut.padded, cut.pieces) for part in parts]
        wanted = [((p >= first) & (p < cut.length)).nonzero()[:, 0] for p in where]
        most = max(index.shape[0] for index in wanted)
        taken = torch.empty(cut.length - first, dtype=torch.int64)
        for part, index in enumerate(wanted):
            taken[where[part][index] - first] = part * most + torch.arange(index.shape[0])
        own = wanted[cut.part]
        mine, rows = where[cut.part][own] - first, torch.arange(own.shape[0])
        padded = F.pad(own, (0, most - own.shape[0]))
        return LastTokens(padded.to(device), taken.to(device), mine.to(device), rows.to(device), group)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, k, ...] of the last tokens, on every rank, from what each computed for its rows [B, m, ...].

        Differentiable as :func:`gather_sequence` is.
        """
        return GatheredLastTokens.apply(rows, self)  # type: ignore[no-any-return]


class GatheredLastTokens(torch.autograd.Function):
    """What all ranks computed for the last tokens, for what every rank then does alike.

    Shapes: rows [B, m, ...]; whole [B, k, ...] on every rank.

    forward: all_gather of the rows, those taken that are wanted, in the order of the sequence
    rows gradient: its part of the gradient, which every rank has; 0 for rows that are not wanted; nothing is sent
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, last: LastTokens) -> torch.Tensor:
        """Returns the last tokens'."""
        ctx.last, ctx.shape, group = last, rows.shape, last.group
        if group.token_group is not None:
            rows = all_gather(rows, group.token_group, operator="gather_sequence", dim=1, config=group.config)
        return rows[:, last.taken]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Returns the gradient of this rank's rows."""
        (grad,) = grad_outputs
        out = grad.new_zeros(ctx.shape)
        out[:, ctx.last.rows] = grad[:, ctx.last.mine]
        return out, None
