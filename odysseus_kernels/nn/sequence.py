"""Cuts a batch into this rank's part of the sequence, and says how."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.config import MOST_PIECES
from odysseus_kernels.nn.cut import KEY, SequenceCut, checksums
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.loss import IGNORE_INDEX
from odysseus_kernels.nn.step import stepped
from odysseus_kernels.planner.formulas import PIPELINED

__all__ = ["NOBODY", "SHARED_PREFIX", "declare_cut", "shard_sequence"]

SHARED_PREFIX = "shared_prefix"
"""Key of the numbers of completions that share their prompt, whose number is 0 (``data/shared_prefix.py``)."""
NOBODY = -1
"""Number of what rows are filled up with."""

_PAD_TOKEN = 0  # any valid id: no token attends to the padding, which is at the end, and no label counts there
# Whether ranks of seq hold slices of the tokens, or all of them, under each strategy.
_TOKENS: dict[str, Literal["sharded", "replicated"]] = {
    "tp": "replicated",
    "tp_sp": "sharded",
    "ulysses": "sharded",
    "odysseus": "sharded",
    "tsp": "sharded",
}
# Strategies under which seq goes on with the ring: the sequence is cut in zigzag order over the ranks of both.
_FOLDED = frozenset({"tsp"})
_KEYS = ("input_ids", "labels", "attention_mask", "position_ids", "counted_tokens", SHARED_PREFIX)


def shard_sequence(
    batch: Mapping[str, torch.Tensor],
    mesh: DeviceMesh | nn.Module,
    strategy: str | None = None,
    *,
    pieces: int | None = None,
) -> dict[str, torch.Tensor]:
    """This rank's part of a batch that every rank has, ready for ``model(**batch)`` of a parallelized model.

    The sequence is padded at its end. With a ring it is cut into two blocks for each ring rank: ring rank i gets the
    i-th from the front and the i-th from the end. What a ring rank has is cut into N slices, and rank r of seq gets the
    r-th; under ``"tp"``, whose ranks of seq hold the same tokens, there is no such second cut, and under ``"tsp"``,
    where all ranks are one ring, neither. With ``pieces`` above 1 what a ring rank has is cut into these first and each
    piece into N slices: every rank then holds a part of each piece, and :func:`pipelined_attention` gathers piece after
    piece. Labels are shifted by one *before* cutting, so that they stay beside the tokens that predict them.

    Args:
        batch: ``input_ids`` [B, L] and, if wanted, ``labels`` [B, L] (not shifted, as a stock model takes them),
            ``attention_mask`` [B, L] (1 for tokens, 0 for padding), ``position_ids`` [B, L] or [1, L] and
            ``counted_tokens`` [B, L] (0 for padding that no mask shows, between or behind packed documents) and
            ``shared_prefix`` [B, L] (:func:`pack_shared_prefix`); identical on every rank that shares the sequence.
        mesh: device mesh with the dimension ``"seq"``, optionally ``"ring"`` and ``"dp"``; or the parallelized model
            itself, which knows its mesh, its strategy and, by ``config.pipeline``, the number of pieces.
        strategy: the strategy that the model was parallelized with; None: ``"odysseus"``, or the model's.
        pieces: see above; None: 1, or what the model's configuration says; 1 beside ``shared_prefix``.

    Returns:
        ``input_ids``, ``position_ids`` and, where they were given, ``attention_mask``, ``shared_prefix``, ``labels``,
        ``shift_labels``, all [B, s]. ``labels`` is the same tensor as ``shift_labels``: shifted already, and required
        by stock models for computing a loss at all. Where the sequence was padded, or they were given, also
        ``counted_tokens``, 0 for padding, which losses over all tokens leave out (that of a mixture's router).
        ``sequence_cut`` [B, 9] says how the batch was cut, and how long it was before padding; the model compares it
        with how it is parallelized, and ranks compare what they cut (see ``nn/cut.py``). All have a row for each
        sequence, so that a selection of rows, the same from each, is a batch, too.

    Raises:
        ValueError: for missing or unknown keys, wrong shapes or dtypes, or pieces that the model cannot have.

    Example:
        >>> part = ody.shard_sequence(batch, mesh)
        >>> batch["input_ids"].shape, part["input_ids"].shape
        (torch.Size([2, 16]), torch.Size([2, 8]))
        >>> torch.equal(part["shift_labels"][:, :7], batch["labels"][:, 8 * rank + 1 : 8 * rank + 8])
        True
    """
    batch_size, length = _check(batch)
    if pieces is None and SHARED_PREFIX in batch:
        pieces = 1  # pipelined attention knows documents of their own only
    group, count = _group_and_pieces(mesh, strategy, pieces, length)
    ring, parts = group.zigzag_size, group.slices * count
    multiple = parts if ring == 1 else math.lcm(2 * ring, ring * parts)
    padding = -length % multiple
    description = SequenceCut.of(group, length, length + padding, pieces=count)
    own = description.positions().to(batch["input_ids"].device)

    def cut(tensor: torch.Tensor, fill: int) -> torch.Tensor:
        return F.pad(tensor, (0, padding), value=fill)[:, own].contiguous()

    out = {"input_ids": cut(batch["input_ids"], _PAD_TOKEN)}
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=batch["input_ids"].device)[None]
    positions = positions.expand(batch_size, length)
    # Positions go on through the padding: a jump would look like the start of another document.
    further = positions[:, -1:] + torch.arange(1, padding + 1, device=positions.device)
    out["position_ids"] = torch.cat((positions, further), dim=1)[:, own].contiguous()
    if "attention_mask" in batch:
        out["attention_mask"] = cut(batch["attention_mask"], 0)
    if padding or "counted_tokens" in batch:
        given = batch.get("counted_tokens", batch.get("attention_mask"))
        out["counted_tokens"] = cut(torch.ones_like(batch["input_ids"]) if given is None else given, 0)
    if SHARED_PREFIX in batch:
        out[SHARED_PREFIX] = cut(batch[SHARED_PREFIX], NOBODY)
    if "labels" in batch:
        shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        out["labels"] = out["shift_labels"] = cut(shifted, IGNORE_INDEX)
    out[KEY] = description.tensor(checksums(batch, batch_size))
    return out


def declare_cut(
    batch: Mapping[str, torch.Tensor], mesh: DeviceMesh, strategy: str = "odysseus", *, length: int | None = None
) -> dict[str, torch.Tensor]:
    """Declares that a batch cut by hand is this rank's part, as :func:`shard_sequence` would have cut it.

    Without this a model takes a part only if its ``position_ids`` are those of the part, counted through the whole
    sequence. Either way nothing is known of what other ranks have cut: it is up to the caller that all cut the same
    sequences.

    Args:
        batch: this rank's part: ``input_ids`` [B, s] or ``inputs_embeds`` [B, s, d], and what else the model takes
            [B, s]; labels as ``shift_labels``, shifted before they were cut, and ``labels`` beside them.
        mesh: device mesh with the dimension ``"seq"``, optionally ``"ring"`` and ``"dp"``.
        strategy: the strategy that the model was parallelized with.
        length: tokens of the whole sequence before it was padded at its end; None: it was not padded.

    Returns:
        The same tensors, ``sequence_cut`` and, if they were missing, ``position_ids`` [B, s].

    Raises:
        ValueError: for a part that cannot be one of this mesh, or a length that does not fit.

    Example:
        >>> ids = batch["input_ids"].chunk(2, dim=1)[rank]  # cut by hand: 8 tokens each
        >>> part = ody.declare_cut({"input_ids": ids}, mesh)
        >>> part["position_ids"][0, 0].item() == 8 * rank
        True
        >>> ody.parallelize(model, mesh)(**part).logits.shape
        torch.Size([2, 8, 120])
    """
    group = _group(mesh, strategy)
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(tokens, torch.Tensor) or tokens.ndim < 2 or 0 in tokens.shape[:2]:
        raise ValueError(f"batch: expected input_ids [B, s] or inputs_embeds [B, s, d], got the keys {sorted(batch)}")
    rows, local = tokens.shape[:2]
    part_of_ring = local * group.slices
    if group.zigzag_size > 1 and part_of_ring % 2:
        raise ValueError(f"batch: expected an even number of tokens on each ring rank, got {part_of_ring}")
    padded = part_of_ring * group.zigzag_size
    length = padded if length is None else length
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= padded:
        raise ValueError(f"length: expected 1 to {padded}, the tokens of all parts, got {length!r}")
    description = SequenceCut.of(group, length, padded, declared=True)
    out = dict(batch)
    if out.get("position_ids") is None:
        out["position_ids"] = description.positions(tokens.device).expand(rows, -1).contiguous()
    out[KEY] = description.tensor(torch.zeros(rows, dtype=torch.int64, device=tokens.device))
    return out


def _group(mesh: DeviceMesh, strategy: str) -> SequenceGroup:
    if strategy not in _TOKENS:
        raise ValueError(f"strategy: expected one of {sorted(_TOKENS)}, got {strategy!r}")
    return dataclasses.replace(SequenceGroup.of(mesh), tokens=_TOKENS[strategy], folded=strategy in _FOLDED)


def _group_and_pieces(
    mesh: DeviceMesh | nn.Module, strategy: str | None, pieces: int | None, length: int
) -> tuple[SequenceGroup, int]:
    if pieces is not None and (
        isinstance(pieces, bool) or not isinstance(pieces, int) or not 1 <= pieces <= MOST_PIECES
    ):
        raise ValueError(f"pieces: expected a whole number from 1 to {MOST_PIECES}, got {pieces!r}")
    if not isinstance(mesh, nn.Module):
        group = _group(mesh, "odysseus" if strategy is None else strategy)
        if pieces not in (None, 1) and strategy not in (None, *PIPELINED):
            raise ValueError(
                f"pieces: expected 1 with strategy {strategy!r}, which gathers no tokens for attention, got {pieces}"
            )
        return group, pieces or 1
    model = stepped(mesh)
    cut_alike = (_TOKENS.get(strategy or ""), strategy in _FOLDED)
    if strategy is not None and cut_alike != (model.sequence_group.tokens, model.sequence_group.folded):
        raise ValueError(f"strategy: expected that of the model or None, got {strategy!r}")
    return model.sequence_group, model.pieces_for(length) if pieces is None else pieces


def _check(batch: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Batch size and length of a valid batch."""
    unknown = sorted(set(batch) - set(_KEYS))
    if unknown or "input_ids" not in batch:
        raise ValueError(f"batch: expected input_ids and, if wanted, {_KEYS[1:]}, got the keys {sorted(batch)}")
    for name, tensor in batch.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        integers = not (tensor.is_floating_point() or tensor.is_complex())
        if not integers or (tensor.dtype == torch.bool and name != "attention_mask"):
            raise ValueError(f"{name}: expected an integer dtype, got {tensor.dtype}")
    shape = batch["input_ids"].shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"input_ids: expected shape [batch, length] without empty dimensions, got {tuple(shape)}")
    for name, tensor in batch.items():
        one_row = name == "position_ids" and tensor.shape == (1, shape[1])
        if tensor.shape != shape and not one_row:
            raise ValueError(f"{name}: expected shape {tuple(shape)} as input_ids have, got {tuple(tensor.shape)}")
    return shape[0], shape[1]
