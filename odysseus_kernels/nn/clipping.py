"""The norm of gradients that are distributed in different ways, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scales gradients so that their norm is at most ``max_norm``; the same norm on every rank.

    ``torch.nn.utils.clip_grad_norm_`` does that for DTensors of one mesh; this also takes parameters of different
    meshes and plain parameters among them. Every element counts once, however often it is replicated. Norms are added
    in fp32 (fp64 for fp64 gradients).  Every rank of the meshes calls it; each mesh sends one or two numbers.  A
    gradient that is not finite makes the norm so on all ranks, and is clipped as torch does it.

    Args:
        parameters: one or several; plain ones have the same gradient on every rank.
        max_norm: the largest norm that is left as it is.
        norm_type: order of the norm, at least 1; may be ``math.inf`` or ``"inf"``.
        error_if_nonfinite: whether a norm that is not finite is an error.

    Returns:
        The norm before clipping, a plain scalar.

    Raises:
        ValueError: for an order below 1, or for gradients that still have to be added over ranks.
        RuntimeError: on all ranks, for a norm that is not finite with ``error_if_nonfinite``; no gradient is changed.

    Example:
        >>> model = ody.parallelize(model, mesh)
        >>> model(**ody.shard_sequence(batch, mesh)).loss.backward()
        >>> norm = ody.clip_grad_norm_(model.parameters(), max_norm=0.5)  # as it was before
        >>> round(ody.clip_grad_norm_(model.parameters(), max_norm=0.5).item(), 3)
        0.5
    """
    norm_type, max_norm = float(norm_type), float(max_norm)
    if not norm_type >= 1:
        raise ValueError(f"norm_type: expected at least 1, got {norm_type}")
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    gradients = [parameter.grad for parameter in given if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    counted: dict[DeviceMesh | None, list[torch.Tensor]] = {}
    for gradient in gradients:
        if not isinstance(gradient, DTensor):
            counted.setdefault(None, []).append(gradient)
            continue
        if any(placement.is_partial() for placement in gradient.placements):
            raise ValueError(f"expected complete gradients, got one with placements {gradient.placements}")
        tensors = counted.setdefault(gradient.device_mesh, [])
        coordinate: Sequence[int] = gradient.device_mesh.get_coordinate() or ()
        # Of replicas, the first one's counts.
        if not any(
            isinstance(placement, Replicate) and position
            for placement, position in zip(gradient.placements, coordinate, strict=True)
        ):
            tensors.append(gradient.to_local())
    wide = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
    device = (gradients[0].to_local() if isinstance(gradients[0], DTensor) else gradients[0]).device
    norms = [_norm(tensors, mesh, norm_type, wide, device) for mesh, tensors in counted.items()]
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"expected gradients with a finite norm of order {norm_type}, got {total.item()}: they cannot be clipped; "
            f"error_if_nonfinite=False scales them all the same"
        )
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(scale.to(local.device, local.dtype))
    return total


def _norm(
    tensors: list[torch.Tensor], mesh: DeviceMesh | None, order: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The norm of all elements of a mesh."""
    total = torch.zeros((), dtype=dtype, device=device)
    tensors = [tensor for tensor in tensors if tensor.numel()]  # an empty tensor has no largest element
    if tensors:
        each = torch.stack([norm.to(device) for norm in torch._foreach_norm(tensors, order, dtype=dtype)])
        total = each.max() if math.isinf(order) else (each**order).sum()
    if math.isinf(order):
        # Backends drop NaN from a maximum, so it is sent beside it.
        total = torch.stack((total.nan_to_num(0.0, posinf=math.inf), total.isnan().to(dtype)))
    if mesh is not None:
        partial = Partial("max" if math.isinf(order) else "sum")
        total = DTensor.from_local(total, mesh, [partial] * mesh.ndim, run_check=False).full_tensor()
    return total[0].masked_fill(total[1] > 0, math.nan) if math.isinf(order) else total ** (1.0 / order)
