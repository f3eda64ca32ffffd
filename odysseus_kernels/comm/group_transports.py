"""The transports of a process group: made on first use, chosen by all ranks alike, and left together."""

from __future__ import annotations

import dataclasses
import functools
import logging
import multiprocessing.util
import threading
import warnings
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist

from odysseus_kernels import _ext
from odysseus_kernels.comm.choice.decision import explain as explain_decisions
from odysseus_kernels.comm.choice.selection import Phase, Selection
from odysseus_kernels.comm.collective.transport import CollectiveTransport
from odysseus_kernels.comm.device import cuda
from odysseus_kernels.comm.device.transport import SymmetricDeviceTransport
from odysseus_kernels.comm.host.transport import SymmetricHostTransport
from odysseus_kernels.comm.local import LocalTransport
from odysseus_kernels.comm.meeting.backend import nccl_of
from odysseus_kernels.comm.meeting.texts import Introduction, Meeting
from odysseus_kernels.comm.transport import NotServedError, Transport
from odysseus_kernels.config import OverlapConfig, shared_memory_directory
from odysseus_kernels.errors import ExtensionNotBuiltError, FallbackWarning

__all__ = ["GroupTransports"]

logger = logging.getLogger("odysseus_kernels")

Symmetric = SymmetricHostTransport | SymmetricDeviceTransport


def _kind(phase: Phase) -> tuple[str, str]:
    return phase.operator, phase.phase


class GroupTransports:
    """The transports of one process group on this rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._meeting = Meeting(group)
        self._lock = threading.Lock()
        self._local = LocalTransport() if group.size() == 1 else None
        self._symmetric: Symmetric | None = None
        self._collective: CollectiveTransport | None = None
        self._fixed: Transport | None = None
        self._no_symmetric: str | None = None
        self._compares_nccl = False
        self._selection: Selection | None = None
        self._completed = 0
        self._step = 0
        self._in_step = self._met = False
        self._unserved: set[tuple[str, str]] = set()
        self._warned_unserved = False
        self._device_type: str | None = None
        # Memory and descriptors go with the group.  Processes that multiprocessing forked run no atexit functions.
        weakref.finalize(group, self.close)
        multiprocessing.util.Finalize(self, self.close, exitpriority=10)

    def belongs_to(self, group: dist.ProcessGroup) -> bool:
        return self._meeting.belongs_to(group)

    def choose(self, config: OverlapConfig, device: torch.device, phase: Phase | None = None) -> Transport:
        """The transport that ``config`` asks for, connected; every rank of the group calls this together.

        For a ``phase`` that the symmetric transport was found not to serve it is the collective one.

        Raises:
            ValueError: ``"symmetric"`` was asked for and cannot be had, with the reason; or no transport serves
                ``device``.
            ExtensionNotBuiltError: ``device`` is a GPU and this build has no CUDA part.
            CommunicationError: the ranks could not meet, or an earlier error left the process group out of step.
        """
        if self._fixed is not None:
            return self._fixed
        if self._local is not None:
            return self._local
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"expected CPU or CUDA tensors, got {device}: odysseus_kernels has no transport for it")
        with self._lock:
            self._device_type = self._device_type or device.type
            if self._device_type != device.type:
                raise ValueError(
                    f"expected {self._device_type} tensors as in earlier calls with process group "
                    f"{self._meeting.name}, got {device}; use a group of its own for each kind of device"
                )
            if config.transport != "collective" and (phase is None or _kind(phase) not in self._unserved):
                symmetric = self._connect(config, device)
                if symmetric is not None:
                    return symmetric
                if config.transport == "symmetric":
                    raise ValueError(f'transport="symmetric" is not available: {self._no_symmetric}')
            return self.collective(config, device)

    def note_unserved(self, error: NotServedError, config: OverlapConfig, phase: Phase | None) -> None:
        """Later calls of ``phase`` go to the collective transport at once; warns if another one was asked for.

        Raises:
            ValueError: the transport was given by :func:`use_transport`, so there is no other.
        """
        if self._fixed is not None:
            raise ValueError(str(error)) from error
        if phase is not None:
            self._unserved.add(_kind(phase))
        if config.transport == "symmetric" and not self._warned_unserved:
            self._warned_unserved = True
            warnings.warn(f"{error}; such operators use the process group's collectives", FallbackWarning, stacklevel=3)

    def collective(self, config: OverlapConfig, device: torch.device) -> CollectiveTransport:
        """The collective transport.

        Raises:
            CommunicationError: an earlier call failed in the middle.  Its collectives and those of later calls could
                meet, so the process group has to be made again.
        """
        self._check_usable()
        if self._collective is None:
            if self._meeting.members is None:
                self._meeting.introduce(config, device, self._completed, self._step)
            self._collective = CollectiveTransport.connect(self._meeting, config, device)
        self._collective.stands_in = self._symmetric is not None and config.transport != "collective"
        return self._collective

    def settle(
        self,
        transport: Transport,
        config: OverlapConfig,
        phase: Phase,
        device: torch.device,
        run: Callable[[Transport, OverlapConfig], None],
    ) -> OverlapConfig:
        """``config`` with its mode settled for ``phase``; all ranks alike."""
        if transport.name == "local":
            return dataclasses.replace(config, mode="fused") if config.mode == "auto" else config
        with self._lock:
            if self._selection is None:
                self._selection = Selection(device, lambda text: self._meeting.exchange(text, config))
        compared = self._compares_nccl and self._fixed is None and config.transport == config.mode == "auto"
        library = None
        if compared and isinstance(transport, SymmetricDeviceTransport) and not phase.switched:
            library = functools.partial(self.collective, config, device)
        return self._selection.settle(transport, config, phase, run, library)

    def begin_step(self) -> None:
        """A step of all ranks begins."""
        self._step += 1
        self._in_step, self._met = True, False

    def meet(self, config: OverlapConfig, device: torch.device) -> None:
        """Right after :meth:`begin_step`: ranks of a host meet now if they must, so that they can meet again after it.

        Raises:
            CommunicationError: as :meth:`choose`.
        """
        if self._fixed is not None or self._local is not None or device.type != "cpu":
            return
        self.choose(config, device)
        if isinstance(self._symmetric, SymmetricHostTransport) and not self._symmetric.broken:
            self._symmetric.begin_step(self._step)
        if self._collective is not None:
            self._collective.begin_step(self._step)
        self._met = True

    def leave_step(self, said: str, config: OverlapConfig, *, lasting: bool) -> None:
        """This rank makes no more calls of its step; peers that wait for it raise what it ``said``."""
        if not self._in_step or self._fixed is not None or self._local is not None:
            return
        self._in_step = False
        if isinstance(self._symmetric, SymmetricHostTransport):
            self._symmetric.leave(said, lasting=lasting)
        in_step = self._met and not lasting
        if self._collective is not None:
            in_step = (
                self._collective.leave(said, torch.device(self._device_type or "cpu"), config.timeout_s) and in_step
            )
        if not in_step:
            self._meeting.give_up(said)

    @property
    def heard(self) -> str:
        """Why calls of this step failed; empty if none did."""
        symmetric = self._symmetric
        if isinstance(symmetric, SymmetricHostTransport) and symmetric.step == self._step and symmetric.broken:
            return symmetric.broken
        return self._meeting.unusable or ""

    def look(self) -> None:
        """CommunicationError if a rank said that it left the group, in which other code waits."""
        self._meeting.check_usable()
        self._meeting.look(f"process group {self._meeting.name}")

    def explain(self) -> str:
        """Which modes were chosen so far, and why."""
        return explain_decisions(self._selection.decisions if self._selection is not None else ())

    def synchronize(self) -> None:
        """Waits until devices have done what was enqueued; raises what went wrong there."""
        if isinstance(self._symmetric, SymmetricDeviceTransport):
            self._symmetric.synchronize()
        if self._collective is not None:
            self._collective.synchronize()

    def close(self) -> None:
        """Gives back memory and descriptors; peers learn that this rank left in order."""
        for transport in (self._symmetric, self._collective):
            if transport is not None:
                transport.close()
        self._meeting.board.close()

    def _check_usable(self) -> None:
        if self._collective is not None and self._collective.broken:
            self._meeting.give_up(self._collective.broken)
        self._meeting.check_usable()

    def _connect(self, config: OverlapConfig, device: torch.device) -> Symmetric | None:
        if self._symmetric is not None and self._symmetric.broken:
            # An error between ranks ends a transport on all of them; the next call starts with fresh segments.
            self._completed += self._symmetric.completed
            self._symmetric.close()
            # A host runs ahead of its device: ranks need not have enqueued the same calls when one gave up.
            if isinstance(self._symmetric, SymmetricDeviceTransport) or self._symmetric.lasting:
                self._meeting.give_up(self._symmetric.broken)
                self._meeting.check_usable()
            self._symmetric = None
        if self._symmetric is not None or self._no_symmetric is not None:
            return self._symmetric
        if device.type == "cuda" and not _ext.has_cuda():
            raise ExtensionNotBuiltError(
                f"tensors on {device}: {_ext.why_no_cuda()}; "
                f'or ask for transport="collective", which needs no compiled code'
            )
        self._check_usable()
        identity = cuda.device_identity(device) if device.type == "cuda" else ("", "")
        everyone = self._meeting.introduce(config, device, self._completed, self._step, identity)
        members = [one.member for one in everyone]
        lacking = [f"rank {rank}: {one.extension}" for rank, one in enumerate(everyone) if one.extension]
        hosts = sorted({member.host for member in members})
        if len({(member.machine, member.namespace) for member in members}) > 1:
            self._no_symmetric = f"it needs all ranks on one host and in one container, they are on {', '.join(hosts)}"
        elif lacking:
            self._no_symmetric = lacking[0]
        else:
            try:
                self._symmetric = self._make(config, device, everyone)
                ranks = len(everyone)
                logger.info("group %s: symmetric transport, %d ranks on %s", self._meeting.name, ranks, hosts[0])
                return self._symmetric
            except OSError as error:
                where = f"shared memory in {shared_memory_directory()}" if device.type == "cpu" else "peer memory"
                self._no_symmetric = f"{where}: {error}"
        if config.transport == "auto":
            warnings.warn(
                f"the symmetric transport is not available, operators use the process group's collectives: "
                f"{self._no_symmetric}",
                FallbackWarning,
                stacklevel=2,
            )
        return None

    def _make(self, config: OverlapConfig, device: torch.device, everyone: list[Introduction]) -> Symmetric:
        group, nonce = self._meeting.group, everyone[0].nonce

        def exchange(text: str) -> list[str]:
            return self._meeting.exchange(text, config)

        if device.type == "cuda":
            peers = [(one.device_name, one.device_uuid) for one in everyone]
            # NCCL serves no two ranks of one GPU.
            self._compares_nccl = nccl_of(group) is not None and len(set(peers)) == len(peers)
            return cuda.connect(group, device, peers, nonce, exchange)
        directory = shared_memory_directory()
        return SymmetricHostTransport.connect(
            group.rank(), group.size(), directory, nonce, exchange, self._meeting.names
        )
