"""A thread that ends waits of a device which nobody else would end: for peers that are gone or call something else.

A wait on a device ends by itself at ``timeout_s``.  Until then the host may sit in a synchronisation and see nothing,
so this thread looks several times a second.  It makes no call of the device's interface (which could disturb a capture
in another thread): it reads and writes a block of memory that both sides see.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

from odysseus_kernels.comm.device.ledger import Ledger
from odysseus_kernels.errors import CommunicationError, PeerLostError, RankMismatchError, SignalTimeoutError

__all__ = ["Control", "Supervisor"]

logger = logging.getLogger("odysseus_kernels")

_LOOK_S = 0.05
_TIMED_OUT, _LOST, _DIFFERS = 1, 2, 3


class Control(Protocol):
    """The block; ``odysseus_kernels/_C.pyi`` documents it (``cuda.Control``)."""

    def abort(self, code: int) -> None: ...
    def error(self) -> tuple[int, int, int, int, int] | None: ...


class Supervisor:
    """Looks after the waits of one rank's device.

    Args:
        control: what ends waits, and says which gave up.
        ledger: what all ranks call; None where all ranks are in one process.
        waits: what each tag stands for; grows.

    Attributes:
        timeout_s: limit of the waits, for the message.
    """

    def __init__(self, control: Control, ledger: Ledger | None, waits: Sequence[str]) -> None:
        self._control, self._ledger, self._waits = control, ledger, waits
        self._reason: CommunicationError | None = None  # why waits were ended
        self._reported = False
        self._stop = threading.Event()
        self.timeout_s = 0.0
        self._thread: threading.Thread | None = None
        if ledger is not None:
            self._thread = threading.Thread(target=self._run, name="odysseus-supervisor", daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Before a call: raises if a wait gave up, if ranks differ, or if a peer that the call needs is gone."""
        error = self.failure() or self._reason
        if error is not None:
            raise error

    def failure(self) -> CommunicationError | None:
        """Why a wait on the device gave up; None if none did, even if a peer has left since."""
        found = self._control.error()
        if found is None:
            # Ranks that differ have exchanged data that does not belong together, whether or not a wait noticed.
            return self._reason if self._reason is not None and not isinstance(self._reason, PeerLostError) else None
        code, tag, index, expected, seen = found
        what = self._waits[tag + index] if 0 <= tag + index < len(self._waits) else "a wait of the device"
        signal = f"(signal {seen:#x}, expected {expected:#x})"
        error: CommunicationError
        if code == _TIMED_OUT:
            error = SignalTimeoutError(f"{what}; it did not signal within {self.timeout_s:g} s {signal}")
        elif code == _DIFFERS and self._reason is not None:
            error = self._reason
        else:
            error = PeerLostError(f"{what}; {self._reason or 'the transport was closed'} {signal}")
        if not self._reported:
            self._reported = True
            logger.error("%s", error)
            if self._ledger is not None:
                self._ledger.give_up(error)
        return error

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_S):
            try:
                self.look()
            except RuntimeError:  # closed meanwhile
                return

    def look(self) -> None:
        """One look; the thread's work."""
        assert self._ledger is not None
        if self._reason is not None:
            self.failure()
            return
        try:
            reason = self._ledger.look()
        except CommunicationError as error:
            self.end(error)
            return
        if reason:
            # A wait whose signal is there goes on: only those that would wait for ever see this.
            self._reason = PeerLostError(reason)
            self._control.abort(_LOST)
        else:
            self.failure()

    def end(self, reason: CommunicationError) -> None:
        """Ends this rank's waits and tells its peers why."""
        if self._reason is None:
            self._reason = reason
            logger.error("%s", reason)
        self._control.abort(_DIFFERS if isinstance(reason, RankMismatchError) else _LOST)
        if self._ledger is not None:
            self._ledger.give_up(reason)
