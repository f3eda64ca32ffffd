"""Faults for tests: ranks that die without a word, ranks that are late, ranks that stop moving."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator

__all__ = ["Jitter", "frozen_for", "kill_self"]


def kill_self() -> None:
    """Ends this process as the kernel's out-of-memory killer would: at once, with nothing cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # SIGKILL cannot be handled, so this line outlives nothing


class Jitter:
    """Seeded random delays that differ from rank to rank, so that ranks meet in every order.

    Most calls return at once and a few sleep long: uniform delays of one size would leave ranks in step on average.

    Args:
        seed: seed of the test.
        rank: rank that sleeps; equal seeds on different ranks give different delays.
        longest_s: seconds of the longest delay.
        share: share of the calls that sleep, from 0 to 1.
    """

    def __init__(self, seed: int, rank: int, *, longest_s: float = 0.01, share: float = 0.3) -> None:
        if longest_s < 0 or not 0 <= share <= 1:
            raise ValueError(f"expected longest_s >= 0 and share from 0 to 1, got {longest_s} and {share}")
        self._random = random.Random(f"{seed}/{rank}")
        self._longest_s = longest_s
        self._share = share

    def __call__(self) -> float:
        """Sleeps, or not; returns the seconds."""
        seconds = self._random.random() * self._longest_s if self._random.random() < self._share else 0.0
        if seconds:
            time.sleep(seconds)
        return seconds


@contextlib.contextmanager
def frozen_for(process_id: int, seconds: float) -> Iterator[None]:
    """Stops another process (SIGSTOP) for ``seconds``, or until the block ends if that is later.

    The process is alive but does not move, which is what a peer that is stuck looks like from outside.
    """
    os.kill(process_id, signal.SIGSTOP)
    begin = time.monotonic()
    try:
        yield
        time.sleep(max(0.0, seconds - (time.monotonic() - begin)))
    finally:
        os.kill(process_id, signal.SIGCONT)
