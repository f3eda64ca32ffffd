"""From a process group to its transports: made on first use, chosen by all ranks alike.

What ranks tell one another when they meet (hosts, processes, paths) is JSON in tensors of a fixed size; nothing is
unpickled.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import logging
import multiprocessing.util
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
from ..errors import CommunicationError, FallbackWarning, PeerLostError, RankMismatchError, SignalTimeoutError
from .backend import WaitTimeoutError, all_gather_single, wait
from .collective import CollectiveTransport
from .membership import Member, lost_members, lost_members_soon, this_member
from .symmetric_host import SymmetricHostTransport
from .transport import CapacityExceededError, LocalTransport, Transport, describe_mismatch, short_text

__all__ = ["GroupTransports", "dispatch", "group_transports", "resolve_group"]

logger = logging.getLogger("odysseus_kernels")

_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

_TEXT_BYTES = 4096
_REASON_CHARACTERS = 600


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


@dataclasses.dataclass(frozen=True)
class _Introduction:
    """What a rank tells the others when they meet: who it is, and what it has and wants."""

    member: Member
    transport: str
    completed: int  # calls on symmetric transports of this group, before an error made the ranks meet again
    extension: str  # why the compiled extension cannot be used, or ""
    nonce: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> _Introduction:
        fields = json.loads(text)
        return _Introduction(Member(**fields.pop("member")), **fields)


class GroupTransports:
    """The transports of one process group on this rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self._name = group.group_name
        self._lock = threading.Lock()
        self._local = LocalTransport() if group.size() == 1 else None
        self._members: list[Member] | None = None
        self._symmetric: SymmetricHostTransport | None = None
        self._collective: CollectiveTransport | None = None
        self._no_symmetric: str | None = None
        self._completed = 0
        self._unusable: str | None = None
        # Memory and descriptors go with the group.  Processes that multiprocessing forked run no atexit functions.
        weakref.finalize(group, self.close)
        multiprocessing.util.Finalize(self, self.close, exitpriority=10)

    def belongs_to(self, group: dist.ProcessGroup) -> bool:
        return self._group() is group

    def choose(self, config: OverlapConfig, device: torch.device) -> Transport:
        """The transport that ``config`` asks for, connected; every rank of the group calls this together.

        Raises:
            ValueError: ``"symmetric"`` was asked for and cannot be had, with the reason; or no transport serves
                ``device`` in this build.
            CommunicationError: the ranks could not meet, or an earlier error left the process group out of step.
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
        """The collective transport.

        Raises:
            CommunicationError: an earlier call failed in the middle.  Its collectives and those of later calls could
                meet, so the process group has to be made again.
        """
        self._check_usable()
        if self._collective is None:
            if self._members is None:
                self._members = [one.member for one in self._meet(config)]
            self._collective = CollectiveTransport(self._alive(), self._members)
        return self._collective

    def close(self) -> None:
        """Gives back memory and descriptors; peers learn that this rank left in order."""
        for transport in (self._symmetric, self._collective):
            if transport is not None:
                transport.close()

    def _alive(self) -> dist.ProcessGroup:
        group = self._group()
        assert group is not None, "transports outlived their process group"
        return group

    def _check_usable(self) -> None:
        if self._collective is not None and self._collective.broken:
            self._unusable = self._unusable or self._collective.broken
        if self._unusable:
            raise CommunicationError(
                f"process group {self._name} is out of step since an earlier error ({self._unusable}); "
                f"destroy it and make it again"
            )

    def _connect(self, config: OverlapConfig) -> SymmetricHostTransport | None:
        if self._symmetric is not None and self._symmetric.broken:
            # An error between ranks ends a transport on all of them; the next call starts with fresh segments.
            self._completed += self._symmetric.completed
            self._symmetric.close()
            self._symmetric = None
        if self._symmetric is not None or self._no_symmetric is not None:
            return self._symmetric
        group = self._alive()
        everyone = self._meet(config)
        self._members = [one.member for one in everyone]
        lacking = [f"rank {rank}: {one.extension}" for rank, one in enumerate(everyone) if one.extension]
        hosts = sorted({member.host for member in self._members})
        if len({(member.machine, member.namespace) for member in self._members}) > 1:
            self._no_symmetric = f"it needs all ranks on one host and in one container, they are on {', '.join(hosts)}"
        elif lacking:
            self._no_symmetric = lacking[0]
        else:
            directory = shared_memory_directory()
            try:
                self._symmetric = SymmetricHostTransport.connect(
                    group.rank(), group.size(), directory, everyone[0].nonce, lambda text: self._exchange(text, config)
                )
                logger.info("group %s: symmetric transport, %d ranks on %s", self._name, group.size(), hosts[0])
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

    def _meet(self, config: OverlapConfig) -> list[_Introduction]:
        """All ranks' introductions, checked for what must be equal."""
        extension = _ext.why_unavailable().encode("ascii", "replace").decode()[:_REASON_CHARACTERS]
        own = _Introduction(this_member(), config.transport, self._completed, extension, secrets.randbits(63))
        everyone = [_Introduction.from_json(text) for text in self._exchange(own.to_json(), config)]
        wanted = {rank: (hash(one.transport), f"transport={one.transport!r}") for rank, one in enumerate(everyone)}
        if len({one.transport for one in everyone}) > 1:
            raise RankMismatchError(f"first call of process group {self._name}: {describe_mismatch(wanted, 1)}")
        completed = [one.completed for one in everyone]
        if len(set(completed)) > 1:
            self._unusable = f"ranks had completed {completed} calls when it happened"
            self._check_usable()
        return everyone

    def _exchange(self, text: str, config: OverlapConfig) -> list[str]:
        self._check_usable()
        group = self._alive()
        data = text.encode()
        assert len(data) <= _TEXT_BYTES, f"a text of {len(data)} bytes, at most {_TEXT_BYTES} can be exchanged"
        own = torch.frombuffer(bytearray(data.ljust(_TEXT_BYTES)), dtype=torch.uint8)
        everyone = own.new_empty((group.size(), _TEXT_BYTES))
        where = f"rank {group.rank()} of process group {self._name} waited for all ranks to meet"
        try:
            work = all_gather_single(everyone.view(-1), own, group, async_op=True)
            wait(work, config.timeout_s, lambda: self._look(where))
        except BaseException as error:
            self._unusable = self._unusable or short_text(error)
            if isinstance(error, WaitTimeoutError):
                raise SignalTimeoutError(
                    f"{where}: {error}; a rank did not make its first call (or, after an error, its next one)"
                ) from error
            if isinstance(error, RuntimeError) and not isinstance(error, CommunicationError):
                gone = lost_members_soon(self._members or [])
                ranks = ", ".join(f"rank {rank}" for rank in gone) or "a rank"
                raise PeerLostError(f"{where}: {ranks} left ({str(error).splitlines()[0][:200]})") from error
            raise
        return [bytes(row.tolist()).decode(errors="replace").rstrip() for row in everyone]

    def _look(self, where: str) -> None:
        gone = lost_members(self._members or [])
        if gone:
            raise PeerLostError(f"{where}: the process of {', '.join(f'rank {rank}' for rank in gone)} is gone")


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
    # Products write where they are told (out=), which autocast leaves alone; the few that do not must not differ.
    with torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else _NOTHING:
        try:
            run(transport)
        except CapacityExceededError:
            run(transports.collective(config))
