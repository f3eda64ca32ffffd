"""Ranks that a command starts as processes of its own, and that end with it: on Ctrl-C, too.

A terminal sends SIGINT to everything in the foreground, ranks included.  Each would print where it was interrupted, one
over another, while the command that the user wants to end is ending them anyway.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator, Sequence

__all__ = ["INTERRUPTED", "interrupts_held", "started_ranks"]

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C has ended, as a shell reports it: 128 and the number of SIGINT."""


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Holds SIGINT back from this thread until the block ends, and for good from processes that are started in it.

    What came meanwhile raises KeyboardInterrupt at the end of the block.  Processes inherit the mask from the first
    instruction on; a handler of their own would be set only after they have imported what takes seconds.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def started_ranks(command: Sequence[str], ranks: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes of ``command`` with ``--rank 0`` to ``--rank N-1`` behind it, killed and waited for as the block ends.

    Only the process that starts them hears Ctrl-C.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with interrupts_held():
            for rank in range(ranks):
                processes.append(subprocess.Popen([*command, "--rank", str(rank)]))
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
