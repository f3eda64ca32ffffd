"""Cuts a batch into this rank's part of the sequence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.attention import layout
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.loss import IGNORE_INDEX

__all__ = ["RING_LAYOUT", "shard_sequence"]

# Balanced causal work: every ring rank has an early and a late block.
RING_LAYOUT: layout.Layout = "zigzag"
_PAD_TOKEN = 0  # any valid id: no token attends to the padding, which is at the end, and no label counts there
# Whether ranks of seq hold slices of the tokens, or all of them, under each strategy.
_TOKENS: dict[str, Literal["sharded", "replicated"]] = {
    "tp": "replicated",
    "tp_sp": "sharded",
    "ulysses": "sharded",
    "odysseus": "sharded",
}
_KEYS = ("input_ids", "labels", "attention_mask", "position_ids")


def shard_sequence(
    batch: Mapping[str, torch.Tensor], mesh: DeviceMesh, strategy: str = "odysseus"
) -> dict[str, torch.Tensor]:
    """This rank's part of a batch that every rank has, ready for ``model(**batch)`` of a parallelized model.

    The sequence is padded at its end, cut into two blocks for each ring rank, of which ring rank i gets the i-th from
    the front and the i-th from the end (with a ring only), and what a ring rank got is cut into N slices, of which rank
    r of seq gets the r-th. Under ``"tp"``, whose ranks of seq hold the same tokens, there is no such second cut. Labels
    are shifted by one *before* cutting, so that the last token of a slice predicts the first of the next one.

    Args:
        batch: ``input_ids`` [B, L] and, if wanted, ``labels`` [B, L] (not shifted, as a stock model takes them),
            ``attention_mask`` [B, L] (1 for tokens, 0 for padding) and ``position_ids`` [B, L] or [1, L]; identical on
            every rank that shares the sequence.
        mesh: device mesh with the dimension ``"seq"``, optionally ``"ring"`` and ``"dp"``.
        strategy: the strategy that the model was parallelized with.

    Returns:
        ``input_ids``, ``position_ids`` and, where they were given, ``attention_mask``, ``labels``, ``shift_labels``,
        all [B, s]. ``labels`` is the same tensor as ``shift_labels``: shifted already, and required by stock models
        for computing a loss at all. Where the sequence was padded, also ``counted_tokens``, 0 for padding, which losses
        over all tokens leave out (that of a mixture's router), and ``unpadded_length`` [B, 1], which holds L: what
        depends on the length of the sequence (dynamic rotary embeddings) must not see the padding.

    Raises:
        ValueError: for missing or unknown keys, wrong shapes or dtypes.
    """
    if strategy not in _TOKENS:
        raise ValueError(f"strategy: expected one of {sorted(_TOKENS)}, got {strategy!r}")
    group = dataclasses.replace(SequenceGroup.of(mesh), tokens=_TOKENS[strategy])
    batch_size, length = _check(batch)
    parts = group.size if group.tokens == "sharded" else 1
    multiple = parts if group.ring_size == 1 else math.lcm(2 * group.ring_size, group.ring_size * parts)
    padding = -length % multiple
    own = layout.positions(group.ring_rank, group.ring_size, length + padding, RING_LAYOUT)
    if parts > 1:
        own = own.chunk(parts)[group.rank]
    own = own.to(batch["input_ids"].device)

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
    if padding:
        given = batch.get("attention_mask")
        out["counted_tokens"] = cut(torch.ones_like(batch["input_ids"]) if given is None else given, 0)
        # A row for each sequence: batches are moved, split and joined as dictionaries of tensors [B, ...].
        out["unpadded_length"] = torch.full_like(batch["input_ids"][:, :1], length, dtype=torch.int64)
    if "labels" in batch:
        shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        out["labels"] = out["shift_labels"] = cut(shifted, IGNORE_INDEX)
    return out


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
