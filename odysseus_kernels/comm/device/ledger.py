"""What ranks call, compared without waiting: for devices, whose host runs ahead of them.

A host that enqueues work for a GPU must not stop at each call until the slowest host has come.  So each rank posts what
it calls, and compares with what the others have posted so far; it waits only when it is far ahead, or when memory has
to be agreed on.  A difference is found by the next call or by the supervisor, at the latest while the device waits.
"""

from __future__ import annotations

import threading
from typing import Any

from odysseus_kernels.comm.host.peers import MISMATCH, Peers
from odysseus_kernels.comm.transport import Call
from odysseus_kernels.errors import RankMismatchError

__all__ = ["Ledger"]

# Calls that a rank may be ahead of a peer's comparison.  Descriptors stay readable for 64 calls; two ranks are at most
# this far ahead of each other, so that neither loses one that it has not compared.
_AHEAD = 24


class Ledger(Peers):
    """Calls of one group; ``host`` is the compiled ``SymmetricHost``, attached.

    Concurrency: the calling thread posts, the supervisor's looks; a lock lets one of them compare at a time.
    """

    def __init__(self, host: Any, rank: int, world: int) -> None:
        super().__init__(host, rank, world)
        self._compared = dict.fromkeys(self._others, 0)
        self._lock = threading.Lock()

    def post(self, call: Call, extra: str) -> None:
        """Posts this rank's call and compares what can be compared.

        Raises:
            RankMismatchError: a peer called something else, now or in an earlier call.
            PeerLostError, SignalTimeoutError: a peer that is far behind is gone or does not come.
        """
        with self._lock:
            self.begin(call, extra, "")
            for peer in self._others:
                while self._compared[peer] < self._sequence - _AHEAD:
                    self._await(call, peer)
            self._catch_up()

    def settle(self, call: Call) -> None:
        """Waits until all peers have come to this call, and compares all there is."""
        with self._lock:
            for peer in self._others:
                while self._compared[peer] < self._sequence:
                    self._await(call, peer)

    def look(self) -> str:
        """Compares what can be compared; says which peer has left, if one has.  Does nothing while another compares.

        Raises:
            RankMismatchError: a peer called something else.
        """
        if not self._lock.acquire(blocking=False):
            return ""
        try:
            self._catch_up()
            for peer in self._others:
                status, rank = self._host.wait_posted(peer, self._sequence + 1, 0.0)
                if status == "failed":
                    kind, _, message = self._host.reason(rank).partition("\n")
                    if MISMATCH in kind:  # the peer was the first to compare
                        raise RankMismatchError(message)
                    return message or f"rank {rank} gave up and gave no reason"
                if status == "lost":
                    return f"the process of rank {rank} is gone"
        finally:
            self._lock.release()
        return ""

    def close(self) -> None:
        """Leaves in order."""
        self._host.close()

    def _await(self, call: Call, peer: int) -> None:
        sequence = self._compared[peer] + 1
        answer = self._host.wait_posted(peer, sequence, call.config.timeout_s)
        if answer[0] != "ok":
            raise self._error(call, answer, peer, f"to begin call number {sequence} (signal posted)")
        self._compare(peer, sequence)

    def _catch_up(self) -> None:
        for peer in self._others:
            latest = min(self._host.posted(peer), self._sequence)
            while self._compared[peer] < latest:
                self._compare(peer, self._compared[peer] + 1)

    def _compare(self, peer: int, sequence: int) -> None:
        if self._posted(peer, sequence)[0] != self._posted(self._rank, sequence)[0]:
            raise self._mismatch(sequence)
        self._compared[peer] = sequence
