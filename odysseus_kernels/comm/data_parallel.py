"""FSDP's collectives on CPU ranks, waited for as ours are: a rank of another replica that left its step ends the wait.

Gloo cannot be interrupted, and FSDP waits for it without looking for lost peers.  It accepts collectives from outside
(``FSDPModule.set_custom_all_gather``); these are its own, issued in the same way and order, and waited for in slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.comm.meeting.backend import WaitTimeoutError, all_gather_single, reduce_scatter_single, wait
from odysseus_kernels.comm.meeting.lingering import keep_for_ever
from odysseus_kernels.errors import SignalTimeoutError

__all__ = ["watch_fsdp"]


class _Watched:
    """What all-gather and reduce-scatter share."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for what arrives."""
        return torch.empty(*size, dtype=dtype, device=device)

    def _finish(self, work: dist.Work, group: dist.ProcessGroup, *buffers: torch.Tensor) -> None:
        transports = group_transports(group)
        try:
            wait(work, self._timeout_s, transports.look)
        except BaseException as error:
            keep_for_ever(work, group, *buffers)
            if isinstance(error, WaitTimeoutError):
                ranks = dist.get_process_group_ranks(group)
                raise SignalTimeoutError(f"FSDP waited for ranks {ranks}: {error}", lasting=True) from error
            raise


class _WatchedAllGather(_Watched):
    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        work = all_gather_single(output_tensor, input_tensor, group=group, async_op=True)
        if async_op:
            return work  # type: ignore[no-any-return]
        self._finish(work, group, output_tensor, input_tensor)
        return None


class _WatchedReduceScatter(_Watched):
    """Also what comes before an all-reduce of FSDP, where weights are whole on several ranks (``replicate``, HSDP).

    FSDP lets no one replace that one, and a rank that is in it is there until Gloo's own timeout.  So ranks meet first,
    where FSDP asks for the memory of what it will reduce: then all of them are about to make it.
    """

    def __init__(self, timeout_s: float, replicas: dist.ProcessGroup | None) -> None:
        super().__init__(timeout_s)
        self._replicas = replicas

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for what is sent, and for what arrives."""
        if self._replicas is not None:
            arrived = torch.zeros(1)
            self._finish(dist.all_reduce(arrived, group=self._replicas, async_op=True), self._replicas, arrived)
        return super().allocate(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        if async_op:
            return reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=True)  # type: ignore[no-any-return]
        # What Gloo does itself for a reduce-scatter, whose own wait cannot be cut into slices.
        work = dist.all_reduce(input_tensor, op=op, group=group, async_op=True)
        self._finish(work, group, input_tensor)
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])
        return None


def watch_fsdp(model: nn.Module, timeout_s: float) -> None:
    """Gives the modules of ``model`` that FSDP wraps with its own collectives these; once is enough."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and _has_default_collectives(module):
            module.set_custom_all_gather(_WatchedAllGather(timeout_s))  # type: ignore[arg-type]
            scatter = _WatchedReduceScatter(timeout_s, _replicas(module))
            module.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]


def _has_default_collectives(module: FSDPModule) -> bool:
    if not hasattr(module, "set_custom_all_gather"):
        return False
    groups = getattr(module._get_fsdp_state(), "_fsdp_param_groups", [])
    used = [(one._all_gather_comm, one._reduce_scatter_comm) for one in groups]
    names = [(type(gather).__name__, type(scatter).__name__) for gather, scatter in used]
    return names == [("DefaultAllGather", "DefaultReduceScatter")]


def _replicas(module: FSDPModule) -> dist.ProcessGroup | None:
    """The ranks over which FSDP all-reduces gradients of ``module``, if it does."""
    groups = [one.mesh_info for one in getattr(module._get_fsdp_state(), "_fsdp_param_groups", [])]
    replicas = {getattr(one, "replicate_process_group", None) for one in groups} - {None}
    return replicas.pop() if len(replicas) == 1 else None
