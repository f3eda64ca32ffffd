"""Rows that are measured each in a process of its own: one that hangs or crashes costs itself and no other.

Results are written as each row ends (``benchmarks/common/rows.py``).  Processes are forked from one that has imported
everything and used no device.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common.rows import Outcome, RowWriter, read_rows

__all__ = ["Job", "Outcome", "measure_each", "read_rows"]

_END_S = 5.0


@dataclasses.dataclass(frozen=True)
class Job:
    """A row: ``function(*arguments)`` returns what JSON can hold; both are pickled, so the function is a module's."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


def measure_each(
    jobs: Sequence[Job], path: Path, *, limit_s: float, deadline: float = math.inf, preload: Sequence[str] = ()
) -> Iterator[Outcome]:
    """Runs the rows one after another, and gives each outcome as it is there.

    Args:
        jobs: the rows.
        path: file of the results; replaced.
        limit_s: seconds after which the process of a row is ended, its start included.
        deadline: time of ``time.monotonic`` after which no row begins.
        preload: modules that are imported once for all processes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with RowWriter(path, [job.name for job in jobs]) as rows:
        for job in jobs:
            if time.monotonic() > deadline:
                return
            outcome = _measure(context, job, limit_s)
            rows.add(outcome)
            yield outcome


def _measure(context: multiprocessing.context.ForkServerContext, job: Job, limit_s: float) -> Outcome:
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(job, sending), name=job.name, daemon=True)
    begin, said = time.monotonic(), {"failed": f"it was ended after {limit_s:g} s, the limit of a row"}
    process.start()
    sending.close()
    try:
        if receiving.poll(limit_s):
            said = json.loads(receiving.recv_bytes())
            process.join(_END_S)
    except EOFError:
        process.join(_END_S)
        said = {"failed": f"its process ended with status {process.exitcode} and said nothing"}
    finally:
        if process.is_alive():
            process.kill()
            process.join(_END_S)
        receiving.close()
    return Outcome(job.name, time.monotonic() - begin, **said)


def _run(job: Job, sending: Connection) -> None:
    """The process of a row."""
    try:
        said = {"result": job.function(*job.arguments)}
    except Exception as error:  # noqa: BLE001  # Triton's errors have no other base; whoever reads the row learns of it
        said = {"failed": f"{type(error).__name__}: {error}"}
    sending.send_bytes(json.dumps(said).encode())
    sending.close()
