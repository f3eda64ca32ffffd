"""How many tokens a step of all data-parallel ranks predicts, for losses that are means over tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm.functional import all_reduce
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.nn.cut import KEY
from odysseus_kernels.nn.group import DATA_DIMENSION, SequenceGroup
from odysseus_kernels.nn.loss import IGNORE_INDEX

__all__ = ["num_items_in_batch"]


def num_items_in_batch(
    batches: Mapping[str, torch.Tensor] | Iterable[Mapping[str, torch.Tensor]],
    mesh: DeviceMesh,
    *,
    ignore_index: int = IGNORE_INDEX,
    config: OverlapConfig | None = None,
) -> float:
    """What to divide losses by so that a step's gradients are those of the mean over all tokens of all its batches.

    A step's batches are those that gradients are accumulated over, on every rank of ``"dp"``.  FSDP2 and ``replicate``
    take the *mean* of the gradients over the D ranks of ``"dp"``, so each rank's loss is divided by the tokens of all
    of them over D.  (Without a divisor each batch's loss is the mean over its own tokens: batches with few tokens count
    as much as batches with many.)  The mean over tokens is then the mean over ``"dp"`` of the sum of these losses.

    Args:
        batches: this rank's whole batches of the step, before they are cut; one, or all that are accumulated.
        mesh: device mesh with ``"seq"``, optionally ``"ring"`` and ``"dp"``; every rank of ``"dp"`` calls this.
        ignore_index: label of tokens that do not count.
        config: transport and time limit of the sum over ``"dp"``.

    Returns:
        (sum over all ranks of ``"dp"`` and all batches of the labels that count, shifted by one) / D.

    Raises:
        ValueError: for batches without labels, or that are cut already.
        CommunicationError: a rank of ``"dp"`` is lost or silent.

    Example:
        >>> model = ody.parallelize(model, mesh)
        >>> batches = [batch, batch]  # whose gradients are added
        >>> items = ody.num_items_in_batch(batches, mesh)
        >>> items  # 2 sequences of 16 tokens in each, the first of which nothing predicts
        60.0
        >>> for one in batches:
        ...     model(**ody.shard_sequence(one, mesh), num_items_in_batch=items).loss.backward()
    """
    several = [batches] if isinstance(batches, Mapping) else list(batches)
    SequenceGroup.of(mesh)
    count = 0
    for batch in several:
        if KEY in batch or "shift_labels" in batch or not isinstance(batch.get("labels"), torch.Tensor):
            raise ValueError(
                f"batches: expected whole batches with labels, before shard_sequence, got the keys {sorted(batch)}"
            )
        count += int((batch["labels"][:, 1:] != ignore_index).sum())
    if DATA_DIMENSION not in (mesh.mesh_dim_names or ()):
        return float(count)
    group = mesh.get_group(DATA_DIMENSION)
    total = torch.tensor([count], dtype=torch.float64, device=torch.device(mesh.device_type))
    return float(all_reduce(total, group, operator="num_items_in_batch", config=config)) / group.size()
