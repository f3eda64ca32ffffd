"""What torch's DTensor lacks, or does in a way that parameters of several placements cannot use."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from odysseus_kernels.nn.group import SEQUENCE_DIMENSION

__all__ = ["complete_dtensor"]

_UNSCALE = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default
_ANY_TRUE = torch.ops.aten._is_any_true.default
_ITEM = torch.ops.aten._local_scalar_dense.default
_DATA = cast(Any, torch.Tensor.data)


@functools.cache
def complete_dtensor() -> None:
    """Makes two tools of torch work on distributed gradients, and two that would not work say so.

    ``torch.amp.GradScaler`` looks for inf and NaN on all ranks of the gradients' meshes.  DTensor shares what was found
    by the placement of a list's *first* gradient: after a replicated one nothing is shared, ranks whose part is finite
    step while others skip, and scales drift apart.

    ``torch.autograd.set_detect_anomaly`` asks whether any element is NaN, which DTensor cannot answer.  Each rank looks
    at its own part.

    ``.item()``, ``float`` and ``if`` take a number from a tensor.  Of a sum, norm or ``all()`` that is still to be
    added over the ranks they take this rank's part: another number on each rank.  Not all ranks may ask (a logger on
    the first one does), so nothing can be added then: it is an error.

    ``parameter.data = tensor`` leaves a DTensor's part of the values as it is: it is an error, too.

    Only tensors of meshes with ``"seq"`` are concerned.
    """
    # There is no public way to say how DTensor runs an operator that it knows; it is a dictionary since torch 2.2.
    DTensor._op_dispatcher._custom_op_handlers[_UNSCALE] = _unscale
    DTensor._op_dispatcher._custom_op_handlers[_ITEM] = _item
    register_sharding(_ANY_TRUE)(_any_true)
    cast(Any, DTensor).data = property(lambda tensor: _DATA.__get__(tensor), _set_data)


def _unscale(op_call: torch._ops.OpOverload[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``op_call`` on this rank's parts, and then the largest ``found_inf`` of all ranks: a number for each mesh."""
    gradients, found_inf, inverse_scale = args
    op_call([g.to_local() if isinstance(g, DTensor) else g for g in gradients], found_inf, inverse_scale, **kwargs)
    meshes = {g.device_mesh for g in gradients if isinstance(g, DTensor)}
    # The largest last: it brings what smaller ones have found to everybody.
    for mesh in sorted(meshes, key=lambda mesh: (mesh.size(), mesh.mesh_dim_names or ())):
        partial = [Partial("max")] * mesh.ndim
        found_inf.copy_(DTensor.from_local(found_inf.clone(), mesh, partial, run_check=False).full_tensor())


def _any_true(x: Any) -> list[Any]:
    """Placements of the result for each placement that ``x`` may have; nothing moves.

    It is declared whole although it is of this rank's part: only anomaly mode asks, and takes the answer for that.
    """
    cuts = [([Replicate()], [Shard(dim)]) for dim in range(x.ndim)]
    return [([Replicate()], [Replicate()]), *cuts]


def _item(op_call: torch._ops.OpOverload[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``op_call`` on this rank's part, which is the whole value."""
    (tensor,) = args
    if _ours(tensor) and any(placement.is_partial() for placement in tensor.placements):
        raise RuntimeError(
            f"expected a number that this rank knows, got one that is still to be added over the ranks (placements "
            f"{tensor.placements}): this rank's part is another number on each of them. Call .full_tensor() on it on "
            f"every rank first, and for norms of gradients clip_grad_norm_"
        )
    return op_call(tensor.to_local(), **kwargs)


def _set_data(tensor: DTensor, value: torch.Tensor) -> None:
    if _ours(tensor):
        raise RuntimeError(
            "data: a distributed parameter keeps its values when this is assigned; within torch.no_grad() call "
            "parameter.copy_(value) with a DTensor (torch.distributed.tensor.distribute_tensor makes one), or load "
            "values by load_pretrained or load_checkpoint"
        )
    _DATA.__set__(tensor, value)


def _ours(tensor: DTensor) -> bool:
    return SEQUENCE_DIMENSION in (tensor.device_mesh.mesh_dim_names or ())
