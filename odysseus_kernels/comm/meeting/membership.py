"""Who the ranks of a group are: host, process, and whether that process still exists."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from pathlib import Path

from odysseus_kernels.config import host_name

__all__ = ["Member", "lost_members", "lost_members_soon", "this_member"]


@dataclasses.dataclass(frozen=True)
class Member:
    """One rank: ``machine`` and ``namespace`` are equal for ranks that see one another's processes.

    ``started`` tells a process from a later one with the same number.
    """

    host: str
    machine: str
    namespace: str
    pid: int
    started: str

    def sees(self, other: Member) -> bool:
        return (self.machine, self.namespace) == (other.machine, other.namespace)


def this_member() -> Member:
    """What this process tells the others of itself.

    ODYSSEUS_HOST divides a machine into several and never joins two: what is found of the machine stays in its name.
    """
    found, named = _read("/proc/sys/kernel/random/boot_id") or socket.gethostname(), host_name()
    return Member(
        named or socket.gethostname(),
        f"{found} {named}" if named else found,
        _link("/proc/self/ns/pid"),
        os.getpid(),
        _state(os.getpid())[1],
    )


def lost_members(members: list[Member]) -> list[int]:
    """Ranks whose process is known to be gone; those that cannot be seen from here are taken to be alive."""
    here = this_member()
    lost = []
    for rank, member in enumerate(members):
        if here.sees(member):
            state, started = _state(member.pid)
            if started != member.started or state in ("Z", "X", ""):
                lost.append(rank)
    return lost


def lost_members_soon(members: list[Member], seconds: float = 1.0) -> list[int]:
    """:func:`lost_members`, given time: a dying process closes its connections before it is gone."""
    deadline = time.monotonic() + seconds
    while True:
        lost = lost_members(members)
        if lost or time.monotonic() > deadline:
            return lost
        time.sleep(0.02)


def _state(pid: int) -> tuple[str, str]:
    """Process state and start time from /proc; empty strings where there is no such process."""
    text = _read(f"/proc/{pid}/stat")
    fields = text[text.rfind(")") + 1 :].split()
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
