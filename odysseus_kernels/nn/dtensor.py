"""What torch's DTensor lacks, or does in a way that parameters of several placements cannot use."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

__all__ = ["complete_dtensor"]

_UNSCALE = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default
_ANY_TRUE = torch.ops.aten._is_any_true.default


@functools.cache
def complete_dtensor() -> None:
    """Makes two tools of torch work on distributed gradients.

    ``torch.amp.GradScaler`` looks for inf and NaN on all ranks of the gradients' meshes.  DTensor shares what was found
    by the placement of a list's *first* gradient: after a replicated one nothing is shared, ranks whose part is finite
    step while others skip, and scales drift apart.

    ``torch.autograd.set_detect_anomaly`` asks whether any element is NaN, which DTensor cannot answer.  Each rank looks
    at its own part.
    """
    # There is no public way to say how DTensor runs an operator that it knows; it is a dictionary since torch 2.2.
    DTensor._op_dispatcher._custom_op_handlers[_UNSCALE] = _unscale
    register_sharding(_ANY_TRUE)(_any_true)


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
    """Placements of the result for each placement that ``x`` may have; nothing moves."""
    cuts = [([Partial("sum")], [Shard(dim)]) for dim in range(x.ndim)]
    return [([Replicate()], [Replicate()]), *cuts]
