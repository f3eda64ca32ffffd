"""Distributed tensors that are cut in another way, in place: what a change of strategy does to parameters."""

from __future__ import annotations

from typing import cast

import torch
from torch.distributed.tensor import DTensor, Shard

from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.parameters import Cut

__all__ = ["bytes_of_recut", "cut_of", "recut"]


def cut_of(tensor: DTensor, group: SequenceGroup) -> Cut:
    """How ``tensor`` is cut over the ranks of ``group``.

    Raises:
        ValueError: if it is distributed over other ranks, or in a way that no strategy has.
    """
    if tensor.device_mesh == group.mesh:
        inner = tensor.placements[-1]
        dim = cast(Shard, inner).dim if inner.is_shard() else None
        for cut in (Cut(dim, "everyone"), Cut(dim, "seq")):
            if tuple(cut.placements(group)) == tuple(tensor.placements):
                return cut
    raise ValueError(
        f"expected a tensor that is cut over the ranks of a sequence as parallelize does it, got one on the mesh "
        f"{tensor.device_mesh} with placements {tensor.placements}"
    )


def bytes_of_recut(tensor: DTensor, cut: Cut, group: SequenceGroup) -> int:
    """What :func:`recut` would return; nothing is sent."""
    old = cut_of(tensor, group)
    if old.dim is None or old.placements(group) == cut.placements(group):
        return 0
    return tensor._local_tensor.nbytes * (old.part(group)[1] - 1)


@torch.inference_mode(False)  # what is made here is trained
@torch.no_grad()
def recut(tensor: DTensor, cut: Cut, group: SequenceGroup) -> int:
    """Distributes ``tensor`` as ``cut`` says, to the bit.  All ranks of ``group`` call it; it stays the same object.

    Whatever holds the tensor (an optimizer, a hook) holds it still. Where it moves, it is whole on every rank for a
    moment.

    Returns:
        Bytes that this rank got from others; 0 if every rank had already what it needs.
    """
    old = cut_of(tensor, group)
    if old.placements(group) == cut.placements(group):
        return 0
    local = whole = tensor._local_tensor.detach()
    if old.dim is not None:
        over = group.everyone if old.over == "everyone" else group.group
        whole = all_gather(local, over, operator="set_strategy", dim=old.dim, config=group.config)
    part = whole
    if cut.dim is not None:
        index, count = cut.part(group)
        rows = whole.shape[cut.dim] // count
        part = whole.narrow(cut.dim, index * rows, rows).clone(memory_format=torch.contiguous_format)
    made = DTensor.from_local(
        part, group.mesh, cut.placements(group), run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    # Shape, dtype and place in autograd are the whole tensor's and stay; FSDP2 exchanges a parameter's part likewise.
    tensor._local_tensor, tensor._spec = made._local_tensor, made._spec
    return whole.nbytes - local.nbytes
