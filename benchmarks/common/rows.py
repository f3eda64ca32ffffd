"""A file of rows that are written as they end, so that whoever is stopped in the middle keeps what there is.

It has lines of JSON.  The first names all rows; each of the others is how one of them ended.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["ROWS_FILE", "Outcome", "RowWriter", "read_rows"]

ROWS_FILE = "rows-{}.jsonl"
"""Name of the file, with what a run measures."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a row ended: with a result, or with a text that says why there is none."""

    name: str
    seconds: float
    result: Any = None
    failed: str = ""


class RowWriter:
    """Writes such a file, replacing what was there; a context manager.

    Args:
        path: the file.
        planned: names of all rows.
    """

    def __init__(self, path: Path, planned: Sequence[str]) -> None:
        self._file = path.open("w")
        self._write({"planned": list(planned)})

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, outcome: Outcome) -> None:
        """The next row has ended."""
        self._write(dataclasses.asdict(outcome))

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def read_rows(path: Path) -> tuple[list[Outcome], list[str]]:
    """The outcomes in a file, and the names of rows that have none."""
    # A line that its writer did not end is none.
    first, *lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]] or [{"planned": []}]
    outcomes = [Outcome(**line) for line in lines]
    there = {outcome.name for outcome in outcomes}
    return outcomes, [name for name in first["planned"] if name not in there]
