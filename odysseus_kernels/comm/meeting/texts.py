"""How the ranks of a group meet: who they are, what they have, and texts that they exchange before anything else.

What ranks tell one another is JSON in tensors of a fixed size; nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import weakref

import torch
import torch.distributed as dist

from odysseus_kernels import _ext
from odysseus_kernels.comm.meeting.backend import WaitTimeoutError, all_gather_single, exchange_device, wait
from odysseus_kernels.comm.meeting.board import Board
from odysseus_kernels.comm.meeting.lingering import keep_for_ever
from odysseus_kernels.comm.meeting.membership import Member, lost_members, lost_members_soon, this_member
from odysseus_kernels.comm.mismatch import departure, describe_mismatch
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.errors import CommunicationError, PeerLostError, RankMismatchError, SignalTimeoutError

__all__ = ["Introduction", "Meeting"]

_TEXT_BYTES = 4096
_REASON_CHARACTERS = 600


@dataclasses.dataclass(frozen=True)
class Introduction:
    """What a rank tells the others when they meet: who it is, and what it has and wants.

    ``device`` is the type of the tensors that it was called with, ``device_name`` and ``device_uuid`` its GPU.
    ``completed`` counts calls on symmetric transports of this group, before an error made the ranks meet again, and
    ``step`` the steps that it has begun.
    ``extension`` says why the compiled extension cannot be used, or is empty.
    """

    member: Member
    transport: str
    device: str
    device_name: str
    device_uuid: str
    completed: int
    step: int
    extension: str
    nonce: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Introduction:
        fields = json.loads(text)
        return Introduction(Member(**fields.pop("member")), **fields)


class Meeting:
    """Exchanges of one process group on this rank.

    Attributes:
        members: all ranks, once they have met.
        names: their numbers in the default process group, by which errors call them.
        unusable: why the group cannot be used any more: collectives of different calls could meet in it.
        board: where a rank says so to peers that wait in one of them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self.name = group.group_name
        self.names = dist.get_process_group_ranks(group)
        self.members: list[Member] | None = None
        self.unusable: str | None = None
        self.board = Board(group)

    def belongs_to(self, group: dist.ProcessGroup) -> bool:
        return self._group() is group

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        assert group is not None, "transports outlived their process group"
        return group

    @property
    def between_hosts(self) -> bool:
        """Whether ranks are known to be on several hosts, or in several containers."""
        return len({(member.machine, member.namespace) for member in self.members or ()}) > 1

    def give_up(self, why: str) -> None:
        """The group cannot be used any more; tells all ranks."""
        if self.unusable is None:
            self.unusable = why
            self.board.post(why)

    def check_usable(self) -> None:
        """CommunicationError if the group cannot be used any more."""
        if self.unusable:
            raise CommunicationError(
                f"process group {self.name} is out of step since an earlier error ({self.unusable}); "
                f"destroy it and make it again",
                said=self.unusable,
                lasting=True,
            )

    def look(self, where: str) -> None:
        """Called while something is waited for.

        Raises:
            PeerLostError: a process is gone, or a rank said that it gave up.
        """
        gone = lost_members(self.members or [])
        if gone:
            raise self.lost(where, gone)
        said = self.board.read()
        if said:
            raise PeerLostError(f"{where}; {said}", said=said, lasting=True)

    def lost(self, where: str, gone: list[int], reason: str = "") -> PeerLostError:
        """The error for ranks of the group that are gone."""
        ranks = ", ".join(f"rank {self.names[rank]}" for rank in gone)
        return PeerLostError(f"{where}: the process of {ranks} is gone" + (reason and f" ({reason})"), lasting=True)

    def introduce(
        self,
        config: OverlapConfig,
        device: torch.device,
        completed: int,
        step: int,
        identity: tuple[str, str] = ("", ""),
    ) -> list[Introduction]:
        """All ranks' introductions, checked for what must be equal."""
        extension = _ext.why_unavailable().encode("ascii", "replace").decode()[:_REASON_CHARACTERS]
        own = Introduction(
            this_member(), config.transport, device.type, *identity, completed, step, extension, secrets.randbits(63)
        )
        everyone = [Introduction.from_json(text) for text in self.exchange(own.to_json(), config)]
        if self.members is None:
            self.board.tell_apart(everyone[0].nonce)
        self.members = [one.member for one in everyone]
        wanted = [f"transport={one.transport!r} with {one.device} tensors" for one in everyone]
        if len(set(wanted)) > 1:
            calls = {name: (hash(text), text) for name, text in zip(self.names, wanted, strict=True)}
            raise RankMismatchError(f"first call of process group {self.name}: {describe_mismatch(calls, 1)}")
        for what, counts in (
            ("were in steps {}", [one.step for one in everyone]),
            ("had completed {} calls", [one.completed for one in everyone]),
        ):
            if len(set(counts)) > 1:
                self.give_up(f"ranks {self.names} {what.format(counts)} when it happened")
                self.check_usable()
        return everyone

    def exchange(self, text: str, config: OverlapConfig) -> list[str]:
        """Every rank's text, in the order of ranks; all ranks call it.

        Raises:
            CommunicationError: a rank does not come, or is gone.
        """
        self.check_usable()
        group = self.group
        data = text.encode()
        assert len(data) <= _TEXT_BYTES, f"a text of {len(data)} bytes, at most {_TEXT_BYTES} can be exchanged"
        own = torch.frombuffer(bytearray(data.ljust(_TEXT_BYTES)), dtype=torch.uint8).to(exchange_device(group))
        everyone = own.new_empty((group.size(), _TEXT_BYTES))
        where = f"rank {self.names[group.rank()]} of process group {self.name} waited for all ranks to meet"
        work = None
        try:
            work = all_gather_single(everyone.view(-1), own, group, async_op=True)
            wait(work, config.timeout_s, lambda: self.look(where), on_gpu=own.is_cuda)
        except BaseException as error:
            if work is not None and not own.is_cuda:
                keep_for_ever(work, own, everyone, group)
            self.give_up(departure(self.names[group.rank()], "gave up", error))
            if isinstance(error, WaitTimeoutError):
                raise SignalTimeoutError(
                    f"{where}: {error}; a rank did not make its first call (or, after an error, its next one)",
                    lasting=True,
                ) from error
            if isinstance(error, RuntimeError) and not isinstance(error, CommunicationError):
                reason = str(error).splitlines()[0][:200]
                gone = lost_members_soon(self.members or [])
                if gone:
                    raise self.lost(where, gone, reason) from error
                raise PeerLostError(f"{where}: a rank left ({reason})", lasting=True) from error
            raise
        return [bytes(row).decode(errors="replace").rstrip() for row in everyone.tolist()]
