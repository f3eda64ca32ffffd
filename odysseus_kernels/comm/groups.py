"""From a process group to its transports: made on first use, chosen by all ranks alike.

What ranks tell one another when they meet (hosts, processes, paths) is JSON in tensors of a fixed size; nothing is
unpickled.
"""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import json
import logging
import secrets
import threading
import warnings
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .. import _ext
from ..config import OverlapConfig, shared_memory_directory
from ..errors import FallbackWarning
from .backend import all_gather_single
from .collective import CollectiveTransport
from .membership import Member, this_member
from .symmetric_host import SymmetricHostTransport
from .transport import CapacityExceededError, LocalTransport, Transport

__all__ = ["GroupTransports", "dispatch", "group_transports", "resolve_group"]

logger = logging.getLogger("odysseus_kernels")

_TEXT_BYTES = 4096
_REASON_CHARACTERS = 1000


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


class GroupTransports:
    """The transports of one process group on this rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self._lock = threading.Lock()
        self._local = LocalTransport() if group.size() == 1 else None
        self._members: list[Member] | None = None
        self._symmetric: SymmetricHostTransport | None = None
        self._collective: CollectiveTransport | None = None
        self._no_symmetric: str | None = None

    def belongs_to(self, group: dist.ProcessGroup) -> bool:
        return self._group() is group

    def choose(self, config: OverlapConfig, device: torch.device) -> Transport:
        """The transport that ``config`` asks for, connected; every rank of the group calls this together.

        Raises:
            ValueError: ``"symmetric"`` was asked for and cannot be had, with the reason; or no transport serves
                ``device`` in this build.
        """
        if self._local is not None:
            return self._local
        if device.type != "cpu":
            raise ValueError(
                f"expected CPU tensors, got {device}: this build of odysseus_kernels has transports for CPU ranks only"
            )
        with self._lock:
            if config.transport != "collective":
                symmetric = self._connect(config)
                if symmetric is not None:
                    return symmetric
                if config.transport == "symmetric":
                    raise ValueError(f'transport="symmetric" is not available: {self._no_symmetric}')
            return self.collective(config)

    def collective(self, config: OverlapConfig) -> CollectiveTransport:
        """The collective transport, a new one if the last one broke."""
        if self._collective is None or self._collective.broken:
            group = self._alive()
            self._members = self._members or self._meet(config)
            self._collective = CollectiveTransport(group, self._members)
        return self._collective

    def connected(self) -> Transport | None:
        """The transport that ``"auto"`` has settled on, if any call has been made."""
        return self._local or self._symmetric or self._collective

    def close(self) -> None:
        for transport in (self._symmetric, self._collective):
            if transport is not None:
                transport.close()

    def _alive(self) -> dist.ProcessGroup:
        group = self._group()
        assert group is not None, "transports outlived their process group"
        return group

    def _connect(self, config: OverlapConfig) -> SymmetricHostTransport | None:
        if self._symmetric is not None and self._symmetric.broken:
            # An error between ranks ends a transport on all of them; the next call starts with fresh segments.
            self._symmetric.close()
            self._symmetric = None
        if self._symmetric is not None or self._no_symmetric is not None:
            return self._symmetric
        group = self._alive()
        nonce = secrets.randbits(63)
        own = {
            **dataclasses.asdict(this_member()),
            "nonce": nonce,
            "extension": _ext.why_unavailable()[:_REASON_CHARACTERS],
        }
        everyone = [json.loads(text) for text in self._exchange(json.dumps(own), config)]
        nonce = everyone[0]["nonce"]
        missing = [(rank, other.pop("extension")) for rank, other in enumerate(everyone)]
        for other in everyone:
            del other["nonce"]
        self._members = [Member(**other) for other in everyone]
        without = [(rank, why) for rank, why in missing if why]
        hosts = sorted({member.host for member in self._members})
        if len({(member.machine, member.namespace) for member in self._members}) > 1:
            self._no_symmetric = (
                f"it needs all ranks on one host (and in one container), they are on {', '.join(hosts)}"
            )
        elif without:
            self._no_symmetric = f"rank {without[0][0]}: {without[0][1]}"
        else:
            directory = shared_memory_directory()
            try:
                self._symmetric = SymmetricHostTransport.connect(
                    group.rank(), group.size(), directory, nonce, lambda text: self._exchange(text, config)
                )
                logger.info("group %s: symmetric transport, %d ranks on %s", group.group_name, group.size(), hosts[0])
                return self._symmetric
            except OSError as error:
                self._no_symmetric = f"shared memory in {directory}: {error}"
        if config.transport == "auto":
            warnings.warn(
                f"the symmetric transport is not available, operators use the process group's collectives: "
                f"{self._no_symmetric}",
                FallbackWarning,
                stacklevel=2,
            )
        return None

    def _meet(self, config: OverlapConfig) -> list[Member]:
        own = json.dumps(dataclasses.asdict(this_member()))
        return [Member(**json.loads(text)) for text in self._exchange(own, config)]

    def _exchange(self, text: str, config: OverlapConfig) -> list[str]:
        group = self._alive()
        data = text.encode()
        assert len(data) <= _TEXT_BYTES, f"a text of {len(data)} bytes, at most {_TEXT_BYTES} can be exchanged"
        own = torch.frombuffer(bytearray(data.ljust(_TEXT_BYTES)), dtype=torch.uint8)
        everyone = own.new_empty((group.size(), _TEXT_BYTES))
        work = all_gather_single(everyone.view(-1), own, group, async_op=True)
        work.wait(datetime.timedelta(seconds=config.timeout_s))
        return [bytes(row.tolist()).decode(errors="replace").rstrip() for row in everyone]


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


def dispatch(
    group: dist.ProcessGroup, config: OverlapConfig, device: torch.device, run: Callable[[Transport], None]
) -> None:
    """Calls ``run`` with the transport that ``config`` asks for.

    If the transport finds, on all ranks alike and before anything was sent, that its buffers do not fit, ``run`` is
    called again with the collective transport.
    """
    transports = group_transports(group)
    transport = transports.choose(config, device)
    try:
        run(transport)
    except CapacityExceededError:
        run(transports.collective(config))
