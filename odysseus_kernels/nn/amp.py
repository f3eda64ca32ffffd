"""Loss scaling of distributed gradients: one rank's overflow is every rank's."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial

__all__ = ["share_found_inf"]

_UNSCALE = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default


def share_found_inf() -> None:
    """Makes ``torch.amp.GradScaler`` look for inf and NaN on all ranks of the gradients' meshes; may be called often.

    DTensor has its own way to run the operator with which GradScaler does that, and shares what was found as the
    *first* gradient of the list is sharded: behind a replicated one nothing is shared, ranks whose part is finite step
    while others skip, and scales drift apart.  What is put in its place does the same for every list.
    """
    # There is no public way to say how DTensor runs an operator that it knows; it is a dictionary since torch 2.2.
    DTensor._op_dispatcher._custom_op_handlers[_UNSCALE] = _unscale


def _unscale(op_call: torch._ops.OpOverload[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``op_call`` on this rank's parts, and then the largest ``found_inf`` of all ranks: a number for each mesh."""
    gradients, found_inf, inverse_scale = args
    op_call([g.to_local() if isinstance(g, DTensor) else g for g in gradients], found_inf, inverse_scale, **kwargs)
    meshes = {g.device_mesh for g in gradients if isinstance(g, DTensor)}
    # The largest last: it brings what smaller ones have found to everybody.
    for mesh in sorted(meshes, key=lambda mesh: (mesh.size(), mesh.mesh_dim_names or ())):
        partial = [Partial("max")] * mesh.ndim
        found_inf.copy_(DTensor.from_local(found_inf.clone(), mesh, partial, run_check=False).full_tensor())
