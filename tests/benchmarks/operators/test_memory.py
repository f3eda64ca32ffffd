"""Accounting of allocations."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.common.memory import AllocationEvent, peak_of_others, process_growth, record_allocations


def _events(*sizes: tuple[int, int]) -> list[AllocationEvent]:
    return [AllocationEvent(float(time), address, size) for time, (address, size) in enumerate(sizes)]


def test_results_do_not_count_and_what_was_there_before_does_not_either() -> None:
    events = _events((1, 100), (9, -50), (2, 30), (2, -30), (3, 40), (4, 10), (3, -40))
    assert peak_of_others(events, results={1}) == (50, 40)
    assert peak_of_others(events, results=set()) == (150, 100)
    assert peak_of_others([], results={1}) == (0, 0)


def test_an_address_that_was_used_before_its_result_counts_until_then() -> None:
    events = _events((1, 70), (1, -70), (1, 20))
    assert peak_of_others(events, results={1}) == (70, 70)


def test_profiler_sees_a_temporary_but_not_the_result() -> None:
    x = torch.ones(1000, 100)

    def call() -> list[torch.Tensor]:
        temporary = x + 1  # 400 kB
        return [temporary[:10].clone()]

    results, events = record_allocations(call)
    peak, largest = peak_of_others(events, {results[0].untyped_storage().data_ptr()})
    assert largest == 400_000
    assert peak - largest < 1000  # numbers that torch wraps on the way


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_operating_system_sees_a_temporary_but_not_the_result() -> None:
    def call() -> list[torch.Tensor]:
        temporary = torch.ones(16 << 20)  # 64 MiB
        return [temporary[: 4 << 20] + 1]  # 16 MiB

    grown = process_growth(call)
    if grown < 0:
        pytest.skip("the system does not let a process reset its peak")
    assert abs(grown - (64 << 20)) < 8 << 20
