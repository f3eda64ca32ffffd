"""What ranks run in the tests of rows apart: rows that end, hang, fail or take their process with them."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.operators.workload import Settings


def measured(rank: int, world: int, settings: Settings) -> list[dict[str, Any]]:
    """One row, by its label."""
    (case,) = settings.rows
    if case.label == "hangs" and rank == 1:
        time.sleep(60)
    if case.label == "fails" and rank == 1:
        raise RuntimeError("out of\nmemory")
    if case.label == "dies" and rank == 0:
        os._exit(7)
    return [{"name": case.name, "world": world, "pid": os.getpid()}]
