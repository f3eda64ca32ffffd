"""The benchmark's rank with silent peers, on a GPU: right results over both kinds of emulated link, honest pacing."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from benchmarks.common.measure import EventTimer, median
from benchmarks.device.cases import EmulatedCase
from benchmarks.device.emulated import measure_case
from benchmarks.device.kernels import gather_problem, reduce_problem
from benchmarks.device.workload import EmulatedWorkload, emulate, fake_group

pytestmark = pytest.mark.gpu

_CASES = tuple(
    EmulatedCase("small", operator, phase, 8 * 2048, inner, outer, "")
    for operator, inner, outer in (("all_gather_linear", 512, 256), ("linear_reduce_scatter", 128, 512))
    for phase in ("forward", "backward")
)


@pytest.mark.parametrize("link", ("paced:100", "pcie"))
def test_results_are_right(link: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    timer = EventTimer(device, 64 << 20)
    cases = [dataclasses.replace(case, link=link) for case in _CASES]
    with fake_group(8) as group, emulate(device, group, link, cases) as emulation:
        for case in cases:
            row = measure_case(
                case, emulation, rounds=2, timed=timer, synchronize=lambda: torch.cuda.synchronize(device)
            )
            assert row["wrong"] == [], (case.name, row["errors"])
            assert {"gemm", "link", "serial", "fused"} <= set(row["samples_s"])
            assert "tiles" in row["samples_s"] or "tiles" in row["impossible"]
        emulation.transport.synchronize()


def test_a_paced_link_is_as_fast_as_it_says() -> None:
    """All that travels takes bytes / rate, within a few percent, whatever the device could do."""
    device = torch.device("cuda", torch.cuda.current_device())
    case = dataclasses.replace(_CASES[0], tokens=8 * 8192, link="paced:50")
    timer = EventTimer(device, 64 << 20)
    with fake_group(8) as group, emulate(device, group, case.link, [case]) as emulation:
        work = EmulatedWorkload(case, emulation)
        link = work.calls()["link"]
        timer(link)
        timer(link)  # the first one's host time has what is done once
        timer.stay_ahead(timer.host_s)
        seconds = median([timer(link)[0] for _ in range(5)])
    expected = case.link_bytes / 50e9
    assert expected < seconds < 1.1 * expected + 1e-4


def test_the_timer_keeps_the_host_ahead() -> None:
    """A call that takes the host long and the device nothing takes no time."""
    device = torch.device("cuda", torch.cuda.current_device())
    timer = EventTimer(device)
    tensor = torch.zeros(1, device=device)

    def call() -> None:
        time.sleep(0.005)
        tensor.add_(1)

    timer(call)
    timer.stay_ahead(timer.host_s)
    assert median([timer(call)[0] for _ in range(5)]) < 0.002


@pytest.mark.parametrize("make", (lambda d: gather_problem(d, 512, 256, 384), lambda d: reduce_problem(d, 3, 1 << 20)))
def test_kernel_rows_compare_what_they_say(make: object) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    problem = make(device)  # type: ignore[operator]
    assert not problem.error() <= problem.tolerance  # nothing was computed yet
    problem.calls["kernel"]()
    problem.calls["library"]()
    assert problem.error() <= problem.tolerance
