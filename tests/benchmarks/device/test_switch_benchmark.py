"""The benchmark of the switch: it says why it is not run, and what it measures is checked first."""

from __future__ import annotations

import math
from typing import Any

import pytest
import switch_bench_cases as cases

from benchmarks.device.switch import _line, switch_cases
from odysseus_kernels.planner.switch import switch_link_bytes


def test_without_a_switch_it_says_why(ranks: Any) -> None:
    for reason in ranks(2).run(cases.refused):
        assert "expected GPUs behind one NVLink switch" in reason and "linear_reduce_scatter" in reason


def test_rows_have_times_errors_bytes_and_predictions(ranks: Any) -> None:
    chunk = 16 // 2 * 24 * 2
    for rows in ranks(2).run(cases.measured):
        for row, sent in zip(rows, (chunk, 2 * chunk, 16 // 2 * 32 * 2), strict=True):
            assert set(row["median_s"]) == {"unfused ranks", "fused ranks"}, row["errors"]
            assert all(error <= row["tolerance"] for error in row["errors"].values())
            assert all(len(values) == 2 for values in row["samples_s"].values())
            assert set(row["sent_bytes"].values()) == {sent}
            assert all(math.isfinite(seconds) and seconds > 0 for seconds in row["predicted_s"].values())
            assert row["host_s"] == {}, "CPU ranks have no host beside them"
            assert "(predicted " in _line(row) and "host/device" not in _line(row)
            assert "host/device 0.50" in _line({**row, "host_s": {"fused ranks": row["median_s"]["fused ranks"] / 2}})


@pytest.mark.parametrize("world", (2, 4, 8))
def test_cases_are_a_models_projections(world: int) -> None:
    found = switch_cases(world, (8192,))
    assert [case.operator for case in found] == ["linear_reduce_scatter", "linear_all_reduce", "all_gather_linear"]
    assert all(case.inner * 2 % 16 == case.outer * 2 % 16 == 0 for case in found), "rows that a switch can add"
    assert switch_link_bytes(0, 1, world) == world
