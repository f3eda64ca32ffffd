"""Rows in processes of their own: one that fails, hangs or dies costs itself, and what was measured is in the file."""

from __future__ import annotations

import math
import multiprocessing
import time
from pathlib import Path

import isolated_cases as cases
import pytest

from benchmarks.device.isolated import Job, Outcome, measure_each, read_rows

pytestmark = pytest.mark.without_ranks


def _told(outcomes: list[Outcome]) -> list[tuple[str, object, str]]:
    return [(outcome.name, outcome.result, outcome.failed) for outcome in outcomes]


def test_a_row_that_hangs_or_dies_costs_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    jobs = [
        Job("fails", cases.fail),
        Job("hangs", cases.hang),
        Job("dies", cases.die),
        Job("is interrupted", cases.interrupt),
        Job("doubles", cases.double, (21,)),
    ]
    begin, before = time.monotonic(), set(multiprocessing.active_children())  # ranks of other tests
    outcomes = list(measure_each(jobs, path, limit_s=2.0))
    assert time.monotonic() - begin < 30
    assert _told(outcomes) == [
        ("fails", None, "RuntimeError: out of memory"),
        ("hangs", None, "it was ended after 2 s, the limit of a row"),
        ("dies", None, "its process ended with status 7 and said nothing"),
        ("is interrupted", None, "its process ended with status 1 and said nothing"),
        ("doubles", 42, ""),
    ]
    assert all(1.9 < outcome.seconds < 10 for outcome in outcomes if outcome.name == "hangs")
    assert read_rows(path) == (outcomes, [])
    assert not set(multiprocessing.active_children()) - before


def test_what_did_not_run_is_named(tmp_path: Path) -> None:
    """For lack of time; because whoever reads the outcomes stops; and behind a line that was being written."""
    path = tmp_path / "rows.jsonl"
    jobs = [Job(str(number), cases.double, (number,)) for number in range(3)]
    assert list(measure_each(jobs, path, limit_s=10.0, deadline=-math.inf)) == []
    assert read_rows(path) == ([], ["0", "1", "2"])
    measuring = measure_each(jobs, path, limit_s=10.0)
    first = next(measuring)
    assert (first.name, first.result) == ("0", 0)
    assert read_rows(path) == ([first], ["1", "2"]), "a row is in the file as soon as it ends"
    measuring.close()
    assert read_rows(path) == ([first], ["1", "2"])
    with path.open("a") as file:
        file.write('{"name": "1", "sec')
    assert read_rows(path) == ([first], ["1", "2"])
    path.write_text("")
    assert read_rows(path) == ([], [])
