"""Checks in forked processes: what the parent has imported, which takes seconds, they need not import again."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

LIMIT_S = 120.0


def _attempt(channel: Connection, check: Callable[..., None], arguments: tuple[object, ...]) -> None:
    try:
        check(*arguments)
    except BaseException:  # noqa: BLE001 - what the test shows
        channel.send(traceback.format_exc())
    else:
        channel.send("")


def run_forked(check: Callable[..., None], *ranks: tuple[object, ...]) -> str:
    """What failed of ``check``, run in one forked process for each tuple of arguments; empty if nothing did."""
    context = multiprocessing.get_context("fork")
    started = []
    for arguments in ranks:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_attempt, args=(theirs, check, arguments), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    failed, deadline = [], time.monotonic() + LIMIT_S
    for process, channel in started:
        try:
            ended = channel.poll(max(0.0, deadline - time.monotonic()))
            failed.append(channel.recv() if ended else f"did not end within {LIMIT_S:g} s")
        except EOFError:
            failed.append("its process ended")
        process.kill()
        process.join()
    return "\n".join(filter(None, failed))
