"""How the ranks of a host come by one another's memory: each makes a segment, and all map all of them, or none does."""

from __future__ import annotations

import json
import os
from typing import Any, Protocol

from odysseus_kernels import _ext
from odysseus_kernels.comm.mismatch import short_text

__all__ = ["Rendezvous", "map_segments"]

# Address space is free until it is used, but not endless: 16 windows of each rank, mapped by every rank, and many
# groups in a process share 47 bits.
_ALL_WINDOWS_BYTES = 1 << 38


class Rendezvous(Protocol):
    """Exchanges a short text among the ranks: what this rank gives, and what all gave, in rank order."""

    def __call__(self, text: str) -> list[str]: ...


def map_segments(rank: int, world: int, directory: str, nonce: int, rendezvous: Rendezvous) -> Any:
    """The compiled ``SymmetricHost``: this rank's segment in ``directory``, and all others' mapped.

    Every rank calls it; it fails on all or on none.  ``nonce`` is the same on all of them and no other group's.

    Raises:
        OSError: some rank could not; the message names it and says why.
    """
    host: Any = None
    answer: dict[str, str]
    try:
        host = _ext.load().SymmetricHost(rank, world, directory, _window_bytes(directory, world), nonce)
        answer = {"path": host.path}
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        answer = {"error": short_text(error)}
    answers = [json.loads(text) for text in rendezvous(json.dumps(answer))]
    failure = ""
    if not any("error" in other for other in answers):
        try:
            host.attach([other["path"] for other in answers])
        except (OSError, ValueError, RuntimeError) as error:
            failure = short_text(error)
    else:
        failure = answers[rank].get("error", "")
    # The second exchange is also what makes it safe to use the segments: all ranks have mapped them.
    failures = rendezvous(failure)
    for other, reason in enumerate(failures):
        if reason:
            if host is not None:
                host.close()
            raise OSError(f"rank {other}: {reason}")
    cores = len(os.sched_getaffinity(0))
    if world > cores:
        host.spin_us = 0  # a spinning rank would keep the one it waits for off its core
    return host


def _window_bytes(directory: str, world: int) -> int:
    """Address space of one window: all that the file system could ever back if every rank needs as much."""
    status = os.statvfs(directory)
    return max(4096, min(status.f_blocks * status.f_frsize, _ALL_WINDOWS_BYTES) // world)
