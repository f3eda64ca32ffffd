"""One rank's view of its peers on a host: waits that end in an error with a name, and calls that are compared.

Before the first signal of a peer is waited for in a call, that peer's *descriptor* of the call is compared with our
own, so that ranks which disagree learn who differs instead of waiting for signals that never come.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from odysseus_kernels.comm.mismatch import departure, describe_mismatch, signature_hash
from odysseus_kernels.comm.transport import Call
from odysseus_kernels.errors import CommunicationError, PeerLostError, RankMismatchError, SignalTimeoutError

__all__ = ["MISMATCH", "Peers"]

# How long a rank that noticed a disagreement waits for the other ranks' descriptors before it reports what it knows.
_REPORT_WAIT_S = 2.0
# A descriptor and a reason have a fixed place in the segment; longer text is cut.
_SHORTAGE_CHARACTERS = 100
_SIGNATURE_CHARACTERS = 270
_REASON_CHARACTERS = 450
# Marks before a reason: peers raise the same error; the group cannot meet again.
MISMATCH, _LASTING = "mismatch ", "lasting "


class Peers:
    """Signals, descriptors and errors of one group; ``host`` is the compiled ``SymmetricHost``, attached.

    ``names`` are the numbers that ranks have in errors: those in the default process group.
    """

    def __init__(self, host: Any, rank: int, world: int, names: Sequence[int] | None = None) -> None:
        self._host = host
        self._names = range(world) if names is None else names
        self._rank = rank
        self._others = [peer for peer in range(world) if peer != rank]
        self._sequence = 0
        self._checked: set[int] = set()

    def begin(self, call: Call, extra: str, shortage: str) -> None:
        """Posts what this rank calls next, and what it lacks for it (``""``: nothing)."""
        signature = call.signature + extra
        self._sequence += 1
        self._checked.clear()
        text = f"{_line(shortage, _SHORTAGE_CHARACTERS)}\n{_line(signature, _SIGNATURE_CHARACTERS)}"
        self._host.post(self._sequence, signature_hash(signature), text)

    def shortages(self, call: Call) -> dict[int, str]:
        """What each rank lacks for the call, after all have begun it; ranks that lack nothing are left out."""
        for peer in self._others:
            self.check(call, peer)
        found = {rank: self._posted(rank, self._sequence)[1] for rank in sorted([self._rank, *self._others])}
        return {rank: shortage for rank, shortage in found.items() if shortage}

    def check(self, call: Call, peer: int) -> None:
        """Once for each peer and call: the peer must be in the same call as we are."""
        if peer in self._checked:
            return
        answer = self._host.wait_posted(peer, self._sequence, call.config.timeout_s)
        if answer[0] != "ok":
            raise self._error(call, answer, peer, f"to begin call number {self._sequence} (signal posted)")
        if self._posted(peer, self._sequence)[0] != self._posted(self._rank, self._sequence)[0]:
            raise self._mismatch(self._sequence)
        self._checked.add(peer)

    def wait_ready(self, call: Call, owner: int, window: int, cell: int, value: int, what: str) -> None:
        """Until ``owner`` has published ``value`` in a cell of its window; ``what`` names it in an error."""
        self.check(call, owner)
        answer = self._host.wait_ready(owner, window, cell, value, call.config.timeout_s)
        if answer[0] != "ok":
            signal = f"(signal ready, window {window}, cell {cell}, count {value})"
            raise self._error(call, answer, owner, f"to publish {what} {signal}")

    def wait_done(self, call: Call, reader: int, window: int, cell: int, value: int, what: str) -> None:
        """Until ``reader`` has finished reading ``value`` in a cell of this rank's window."""
        answer = self._host.wait_done(reader, window, cell, value, call.config.timeout_s)
        if answer[0] != "ok":
            signal = f"(signal done, window {window}, cell {cell}, count {value})"
            raise self._error(call, answer, reader, f"to finish reading {what} {signal}")

    def give_up(self, error: BaseException) -> str:
        """Tells all peers that this rank has left the schedule, and why: they must not wait for it.  Returns why."""
        mismatch = isinstance(error, RankMismatchError) and not error.said
        text = str(error) if mismatch else departure(self._names[self._rank], "gave up", error)
        lasting = isinstance(error, CommunicationError) and error.lasting
        with contextlib.suppress(RuntimeError):  # closed meanwhile, or a forked child: then nobody waits for us
            self._host.fail(_reason(text, mismatch=mismatch, lasting=lasting))
        return text

    def leave(self, said: str, *, lasting: bool) -> None:
        """Tells all peers, between two calls, that this rank will not make the next one with them."""
        with contextlib.suppress(RuntimeError):
            self._host.leave(_reason(said, mismatch=False, lasting=lasting))

    def begin_step(self, number: int) -> None:
        """A peer that begins a step before it has made all calls of the one before never makes them."""
        self._host.set_step(number)

    def _posted(self, rank: int, sequence: int) -> tuple[int, str, str]:
        digest, text = self._host.descriptor(rank, sequence)
        shortage, _, signature = text.partition("\n")
        return digest, shortage, signature

    def _mismatch(self, sequence: int) -> RankMismatchError:
        calls = {}
        for rank in sorted([self._rank, *self._others]):
            if rank == self._rank or self._host.wait_posted(rank, sequence, _REPORT_WAIT_S)[0] == "ok":
                digest, _, signature = self._posted(rank, sequence)
                calls[self._names[rank]] = (digest, signature)
        return RankMismatchError(describe_mismatch(calls, sequence))

    def _error(self, call: Call, answer: tuple[str, int], peer: int, what: str) -> CommunicationError:
        status, rank = answer
        name = self._names[rank]
        where = f"{call.name}: rank {self._names[self._rank]} waited for rank {self._names[peer]} {what}"
        if status == "timeout":
            late = f"{where}; it is alive and did not signal within {call.config.timeout_s:g} s"
            return SignalTimeoutError(late, lasting=True)
        if status == "ahead":
            mine, others = self._host.step(self._rank), self._host.step(rank)
            return RankMismatchError(
                f"{where}; rank {name} has begun step {others} and left step {mine}, in which this rank is, without "
                f"this call: an exception that was caught there, or a call that was left out"
            )
        if status == "failed":
            kind, _, message = self._host.reason(rank).partition("\n")
            lasting = _LASTING in kind
            if MISMATCH in kind:
                return RankMismatchError(message, lasting=lasting)
            said = message or f"rank {name} gave up and gave no reason"
            return PeerLostError(f"{where}; {said}", said=said, lasting=lasting)
        return PeerLostError(f"{where}; the process of rank {name} is gone", lasting=True)


def _reason(text: str, *, mismatch: bool, lasting: bool) -> str:
    """What a rank leaves for its peers: marks, followed by what it says."""
    marks = (MISMATCH if mismatch else "") + (_LASTING if lasting else "")
    return f"{marks}\n{_line(text, _REASON_CHARACTERS)}"


def _line(text: str, most: int) -> str:
    flat = " ".join(text.split()).encode("ascii", "replace").decode()
    return flat if len(flat) <= most else flat[: most - 3] + "..."
