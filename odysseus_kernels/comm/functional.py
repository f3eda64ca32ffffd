"""Plain collectives over the transports: what models need beside the fused operators, counted by the same recorder.

None of these is differentiable; ``nn`` wraps them in the gradients it needs.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm.arguments import check_config
from odysseus_kernels.comm.bundles import as_bytes
from odysseus_kernels.comm.groups import dispatch, resolve_group
from odysseus_kernels.comm.transport import Call, Gather, Scatter, Transport
from odysseus_kernels.config import OverlapConfig

__all__ = ["all_gather", "all_reduce", "all_to_all", "reduce_scatter"]

Group = dist.ProcessGroup | DeviceMesh | None
Phase = Literal["forward", "backward"]


def _unused(*_: object) -> None:
    raise AssertionError("the transport's own copy replaces this callback")


def _collective_config(config: OverlapConfig | None) -> OverlapConfig:
    return dataclasses.replace(check_config(config), mode="unfused")


def all_gather(
    tensor: Tensor,
    group: Group = None,
    *,
    operator: str = "all_gather",
    dim: int = 0,
    phase: Phase = "forward",
    config: OverlapConfig | None = None,
    keeps_ahead: bool = False,
    shapes: str = "",
) -> Tensor:
    """All ranks' tensors concatenated along ``dim`` in rank order.

    Args:
        tensor: [..., s, ...], the same shape and dtype on every rank (any dtype but complex).
        group: the ranks; None is the default group.
        operator, phase: how the recorder counts it and errors name it.
        dim: dimension that grows from s to N * s.
        config: transport and timeout.
        keeps_ahead: leaves what an operator has sent ahead to the operator that comes next.
        shapes: what else must be equal on all ranks, in words.

    Raises:
        ValueError: see :func:`odysseus_kernels.comm.groups.resolve_group`.
        CommunicationError: ranks differ, or a peer is lost or silent.
    """
    resolved = resolve_group(group)
    dim %= max(tensor.ndim, 1)
    before, rows, after = tensor.shape[:dim], tensor.shape[dim], tensor.shape[dim + 1 :]
    shard = tensor.contiguous().view(before.numel(), rows, after.numel())
    # Bytes travel as they are: any dtype, bool and integers included.
    raw = as_bytes(shard).view(*shard.shape[:2], -1) if shard.numel() else shard
    world = resolved.size()
    out = raw.new_empty((world, *raw.shape))
    described = _collective_config(config)

    def run(transport: Transport, _: OverlapConfig) -> None:
        signature = _joined(f"tensor {list(tensor.shape)} {tensor.dtype}, dim {dim}", shapes)
        gather = Gather(raw, _unused)
        transport.all_gather(Call(operator, phase, described, gather, shapes=signature, keeps_ahead=keeps_ahead), out)

    dispatch(resolved, described, tensor.device, run)
    full = out.view(shard.dtype)
    return full.transpose(0, 1).reshape(*before, world * rows, *after)


def _joined(own: str, shapes: str) -> str:
    return f"{own}, {shapes}" if shapes else own


def reduce_scatter(
    tensor: Tensor,
    group: Group = None,
    *,
    operator: str = "reduce_scatter",
    dim: int = 0,
    phase: Phase = "forward",
    config: OverlapConfig | None = None,
    keeps_ahead: bool = False,
) -> Tensor:
    """This rank's slice along ``dim`` of the sum of all ranks' tensors, added in fp32 (fp64 for fp64).

    Args:
        tensor: [..., N * s, ...], the same shape and dtype on every rank.
        group, operator, dim, phase, config, keeps_ahead: as in :func:`all_gather`; ``dim`` shrinks from N * s to s.

    Raises:
        ValueError: ``dim`` does not divide by the number of ranks.
    """
    resolved = resolve_group(group)
    world = resolved.size()
    dim %= max(tensor.ndim, 1)
    before, rows, after = tensor.shape[:dim], tensor.shape[dim], tensor.shape[dim + 1 :]
    if rows % world:
        raise ValueError(f"reduce_scatter: expected dimension {dim} to divide by {world} ranks, got {rows}")
    full = tensor.reshape(before.numel(), world, rows // world, after.numel()).transpose(0, 1).contiguous()
    out = full.new_empty(full.shape[1:])
    described = _collective_config(config)

    def run(transport: Transport, _: OverlapConfig) -> None:
        shapes = f"tensor {list(tensor.shape)} {tensor.dtype}, dim {dim}"
        scatter = Scatter(out, _unused)
        transport.reduce_scatter(Call(operator, phase, described, None, scatter, shapes, keeps_ahead=keeps_ahead), full)

    dispatch(resolved, described, tensor.device, run)
    return out.view(*before, rows // world, *after)


def all_to_all(
    tensor: Tensor,
    group: Group = None,
    *,
    operator: str = "all_to_all",
    phase: Phase = "forward",
    config: OverlapConfig | None = None,
    keeps_ahead: bool = False,
) -> Tensor:
    """Part r of the result is what rank r's part for this rank was, a new tensor.

    Args:
        tensor: [N, ...], part r is for rank r; the same shape and dtype on every rank (any dtype but complex).
        group, operator, phase, config, keeps_ahead: as in :func:`all_gather`.

    Raises:
        ValueError: the first dimension is not the number of ranks.
    """
    resolved = resolve_group(group)
    world = resolved.size()
    if tensor.ndim == 0 or tensor.shape[0] != world:
        raise ValueError(f"all_to_all: expected a part for each of {world} ranks, got shape {list(tensor.shape)}")
    raw = as_bytes(tensor.contiguous()).view(world, -1)
    out = torch.empty_like(raw)
    described = _collective_config(config)

    def run(transport: Transport, _: OverlapConfig) -> None:
        shapes = f"tensor {list(tensor.shape)} {tensor.dtype}"
        transport.all_to_all(Call(operator, phase, described, shapes=shapes, keeps_ahead=keeps_ahead), raw, out)

    dispatch(resolved, described, tensor.device, run)
    return out.view(-1).view(tensor.dtype).view(tensor.shape)


def all_reduce(
    tensor: Tensor,
    group: Group = None,
    *,
    operator: str = "all_reduce",
    phase: Phase = "forward",
    config: OverlapConfig | None = None,
    keeps_ahead: bool = False,
    shapes: str = "",
) -> Tensor:
    """The sum of all ranks' tensors, a new tensor, bitwise equal on every rank.

    Added in fp32 (fp64 for fp64) and rounded once.  It travels as reduce-scatter and all-gather over the flattened
    tensor, padded to a multiple of the number of ranks.

    Args:
        tensor: any shape and floating dtype, the same on every rank.
        group, operator, phase, config, keeps_ahead, shapes: as in :func:`all_gather`.
    """
    resolved = resolve_group(group)
    world = resolved.size()
    if world == 1:
        return tensor.clone()
    described = _collective_config(config)
    rows = max(1, -(-tensor.numel() // world))
    full = tensor.new_zeros(world * rows)
    full[: tensor.numel()].copy_(tensor.reshape(-1))
    mine = tensor.new_empty((1, 1, rows))
    everyone = tensor.new_empty((world, 1, 1, rows))

    shapes = _joined(f"tensor {list(tensor.shape)} {tensor.dtype}", shapes)
    call = Call(operator, phase, described, shapes=shapes, collective="all_reduce", keeps_ahead=keeps_ahead)
    scatter = dataclasses.replace(call, scatter=Scatter(mine, _unused))
    gather = dataclasses.replace(call, gather=Gather(mine, _unused), continued=True)

    def run_scatter(transport: Transport, _: OverlapConfig) -> None:
        transport.reduce_scatter(scatter, full.view(world, 1, 1, rows))

    def run_gather(transport: Transport, _: OverlapConfig) -> None:
        transport.all_gather(gather, everyone)

    dispatch(resolved, described, tensor.device, run_scatter)
    dispatch(resolved, described, tensor.device, run_gather)
    return everyone.view(-1)[: tensor.numel()].view(tensor.shape)
