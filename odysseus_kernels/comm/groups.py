"""From a process group to its transports: which group is meant, what it has, and how every operator uses it."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm.announce import announcing
from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.group_transports import GroupTransports
from odysseus_kernels.comm.transport import CapacityExceededError, NotServedError, Transport
from odysseus_kernels.config import OverlapConfig

__all__ = [
    "between_hosts",
    "dispatch",
    "explain",
    "group_transports",
    "resolve_group",
    "synchronize",
    "use_transport",
]

_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def resolve_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    """The process group meant by ``group``: a group, a one-dimensional DeviceMesh, or None for the default group.

    Raises:
        ValueError: no process group was initialised, the mesh has several dimensions, or this rank is not a member.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "expected an initialised process group; call torch.distributed.init_process_group (torchrun sets it up)"
        )
    if group is None:
        resolved = dist.group.WORLD
    elif isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f'group: expected a one-dimensional DeviceMesh, got dimensions {group.mesh_dim_names}; pass mesh["seq"]'
            )
        resolved = group.get_group()
    else:
        resolved = group
    if not isinstance(resolved, dist.ProcessGroup):
        raise ValueError(
            f"group: expected a ProcessGroup that this rank is a member of, a DeviceMesh or None, got {group!r}"
        )
    return resolved


_registry: dict[str, GroupTransports] = {}
_registry_lock = threading.Lock()


@atexit.register
def _close_all() -> None:
    """Ranks that end normally say so: peers can then tell an end from a crash."""
    for transports in _registry.values():
        transports.close()


def group_transports(group: dist.ProcessGroup) -> GroupTransports:
    """The transports of ``group``.  A group that was destroyed and made again under its name gets new ones."""
    with _registry_lock:
        found = _registry.get(group.group_name)
        if found is None or not found.belongs_to(group):
            if found is not None:
                found.close()
            found = _registry[group.group_name] = GroupTransports(group)
        return found


def between_hosts(group: dist.ProcessGroup, config: OverlapConfig, device: torch.device) -> bool:
    """Whether ranks of ``group`` are on several hosts; every rank calls this together, as they may have to meet."""
    transports = group_transports(group)
    transports.choose(config, device)
    return transports._meeting.between_hosts


def explain(group: dist.ProcessGroup | DeviceMesh | None = None) -> str:
    """Which mode each operator runs in with ``group``, and why: what ``nn/explain.py`` shows of a group."""
    return group_transports(resolve_group(group)).explain()


def synchronize(group: dist.ProcessGroup | DeviceMesh | None = None) -> None:
    """Waits until everything that operators have enqueued for ``group`` on this rank's device has happened.

    Raises:
        CommunicationError: a peer was lost or silent.  Operators on a GPU return before their work is done, so such an
            error is raised here, or by the next operator, whichever comes first.

    Example:
        >>> y = ody.zero3_linear(torch.ones(2, 4), torch.ones(3, 4), group=group)
        >>> ody.synchronize(group)  # before a clock is read, for instance
    """
    group_transports(resolve_group(group)).synchronize()


@contextlib.contextmanager
def use_transport(group: dist.ProcessGroup, transport: Transport) -> Iterator[None]:
    """Every operator that is called with ``group`` uses ``transport`` meanwhile: for emulated ranks."""
    transports = group_transports(group)
    before, transports._fixed = transports._fixed, transport
    try:
        yield
    finally:
        transports._fixed = before


def dispatch(
    group: dist.ProcessGroup,
    config: OverlapConfig,
    device: torch.device,
    run: Callable[[Transport, OverlapConfig], None],
    phase: Phase | None = None,
) -> None:
    """Calls ``run`` with the transport that ``config`` asks for, and with ``config``, its mode settled.

    If the transport finds, on all ranks alike and before anything was sent, that its buffers do not fit or that it does
    not serve such a call, ``run`` is called again with the collective transport.  However often ``run`` is called (many
    times, where timing chooses the mode), it must leave the same behind.  Without a ``phase`` there is no choice.
    """
    transports = group_transports(group)
    transport = transports.choose(config, device, phase)
    # Products write where they are told (out=), which autocast leaves alone; the few that do not must not differ.
    autocast = torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else _NOTHING
    with autocast, announcing(group.group_name):
        try:
            settled = config if phase is None else transports.settle(transport, config, phase, device, run)
            if settled.transport != config.transport:  # NCCL was faster than everything else
                transport = transports.collective(config, device)
            run(transport, settled)
        except CapacityExceededError as error:
            if isinstance(error, NotServedError):
                transports.note_unserved(error, config, phase)
            collective = transports.collective(config, device)
            if phase is not None:
                settled = transports.settle(collective, config, phase, device, run)
            run(collective, settled)
