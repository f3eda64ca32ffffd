"""Rows of real ranks one after another, each with a limit of its own: one that hangs costs itself and no other.

Ranks stay up from row to row.  Those of a row that failed or did not end are stopped, and the next row starts new ones.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.rows import Outcome, RowWriter
from benchmarks.operators.workload import Settings
from odysseus_kernels.testing.spawn import RankPool, RanksFailedError

__all__ = ["Apart", "measure_apart"]

_REASON_CHARACTERS = 300


@dataclasses.dataclass
class Apart:
    """What a run has: rows, rows that failed, names of those that did not begin, and whether it was told to stop."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failed: list[dict[str, str]] = dataclasses.field(default_factory=list)
    not_run: list[str] = dataclasses.field(default_factory=list)
    interrupted: bool = False


def measure_apart(
    pool: RankPool,
    run: Callable[..., list[dict[str, Any]]],
    settings: Settings,
    path: Path,
    *,
    limit_s: float,
    deadline: float = math.inf,
) -> Apart:
    """All rows of ``settings``.

    Args:
        pool: of the ranks.
        run: what each rank runs, ``run(rank, world_size, settings)``; it returns the rows.
        settings: of the run.
        path: file of the rows, see ``benchmarks/common/rows.py``; replaced.
        limit_s: seconds after which the ranks of a row are stopped; their start is not counted.
        deadline: time of ``time.monotonic`` after which no row begins.
    """
    done = Apart(not_run=[case.name for case in settings.rows])
    with RowWriter(path, done.not_run) as file:
        for case in settings.rows:
            if time.monotonic() > deadline:
                break
            begin, found, failed = time.monotonic(), None, ""
            try:
                (found,) = pool.run(run, dataclasses.replace(settings, rows=(case,)), timeout=limit_s)[0]
            except RanksFailedError as error:
                print(error, file=sys.stderr, flush=True)
                failed = _reason(error)
            except KeyboardInterrupt:
                done.interrupted = True
                break
            done.not_run.remove(case.name)
            if found is None:
                done.failed.append({"name": case.name, "failed": failed})
            else:
                done.rows.append(found)
            file.add(Outcome(case.name, time.monotonic() - begin, found, failed))
    return done


def _reason(error: RanksFailedError) -> str:
    """The rank that failed first, in a line: others are its consequences."""
    first = min((one for one in error.outcomes if not one.ok), key=lambda one: (one.error is None, one.seconds))
    text = " ".join(f"rank {first.rank}: {first.error or f'exit code {first.exit_code}'}: {first.message}".split())
    return text[:_REASON_CHARACTERS]
