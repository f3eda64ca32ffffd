"""Rows of real ranks, each with a limit: one that hangs or fails costs itself, and what was measured is in the file."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any
from unittest import mock

import apart_cases
import pytest
from test_report import _row

from benchmarks import overlap
from benchmarks.common.rows import read_rows
from benchmarks.operators.apart import measure_apart
from benchmarks.operators.cases import Case
from benchmarks.operators.workload import Settings
from odysseus_kernels.testing.spawn import RankPool

pytestmark = pytest.mark.without_ranks


def _settings(*labels: str) -> Settings:
    cases = tuple(Case(label, "all_gather_linear", 64, 32, (24,), False) for label in labels)
    return Settings(rows=cases, dtype="float32", device="cpu", repeats=1)


@pytest.mark.slow
def test_a_row_that_hangs_or_dies_costs_itself(tmp_path: Path) -> None:
    path, settings = tmp_path / "rows.jsonl", _settings("first", "hangs", "second", "fails", "dies", "third")
    names = [case.name for case in settings.rows]
    begin = time.monotonic()
    with RankPool(2) as pool:
        done = measure_apart(pool, apart_cases.measured, settings, path, limit_s=3.0)
    assert time.monotonic() - begin < 60, "a row that hangs sleeps for so long"
    assert [row["name"] for row in done.rows] == [names[0], names[2], names[5]]
    assert len({row["pid"] for row in done.rows}) == 3, "ranks start anew behind a row that failed"
    hung, failed, died = done.failed
    assert (hung["name"], failed["name"], died["name"]) == (names[1], names[3], names[4])
    assert hung["failed"] == "rank 1: exit code -9: did not return within 3 s; stopped"
    assert failed["failed"] == "rank 1: RuntimeError: out of memory"
    assert died["failed"] == "rank 0: exit code 7: the process ended"
    assert (done.not_run, done.interrupted) == ([], False)
    outcomes, missing = read_rows(path)
    assert [(outcome.name, bool(outcome.failed)) for outcome in outcomes] == [
        (name, name in (names[1], names[3], names[4])) for name in names
    ]
    assert [outcome.result for outcome in outcomes if not outcome.failed] == done.rows and not missing


def test_what_did_not_run_is_named_and_what_ran_is_kept(tmp_path: Path) -> None:
    path, settings = tmp_path / "rows.jsonl", _settings("first", "second", "third")
    names = [case.name for case in settings.rows]
    pool = mock.Mock()
    late = measure_apart(pool, apart_cases.measured, settings, path, limit_s=1.0, deadline=-math.inf)
    assert (late.rows, late.not_run) == ([], names) and not pool.run.called
    pool.run.side_effect = [[[{"name": names[0]}]], KeyboardInterrupt]
    stopped = measure_apart(pool, apart_cases.measured, settings, path, limit_s=1.0)
    assert (stopped.rows, stopped.not_run, stopped.interrupted) == ([{"name": names[0]}], names[1:], True)
    outcomes, missing = read_rows(path)
    assert [outcome.name for outcome in outcomes] == names[:1] and missing == names[1:]


def test_a_document_of_rows_apart_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = overlap.parse(["--row-limit", "9", "--output", str(tmp_path)])
    settings = dataclasses.replace(_settings("first", "second", "third"), device="cpu")
    found: list[Any] = [[[_row()]], KeyboardInterrupt]
    pool = mock.Mock(world_size=2, run=mock.Mock(side_effect=found))
    assert overlap.run_apart(arguments, pool, settings) == 1
    assert [call.kwargs for call in pool.run.call_args_list] == [{"timeout": 9.0}] * 2
    document = json.loads(next(tmp_path.glob("overlap-*.json")).read_text())
    assert document["interrupted"] and len(document["rows"]) == 1 and document["failed"] == []
    assert document["not_run"] == [case.name for case in settings.rows[1:]]
    assert "not run, interrupted: 2 rows, the first all_gather_linear second" in capsys.readouterr().err
    nothing = mock.Mock(world_size=2, run=mock.Mock(side_effect=KeyboardInterrupt))
    assert overlap.run_apart(arguments, nothing, settings) == 1


@pytest.mark.parametrize("options", (["--memory"], ["--level", "layer"]))
def test_only_times_of_operators_are_measured_apart(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overlap.parse(["--row-limit", "9", *options])
    assert "--row-limit: it is for times of operators" in capsys.readouterr().err
