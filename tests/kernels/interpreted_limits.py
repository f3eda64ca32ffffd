"""Waits that never end by themselves, in Triton's interpreter: a check of interpreted_run.py."""

from __future__ import annotations

import time
from unittest import mock

import kernel_cases
import torch
from interpreted_run import POINTERS, ends, later
from kernel_cases import GatherCase, ScatterCase, word

from odysseus_kernels.comm.device.call import describe_wait
from odysseus_kernels.comm.device.supervisor import Supervisor
from odysseus_kernels.comm.schedules.device import tile_schedule
from odysseus_kernels.comm.schedules.steps import Kind
from odysseus_kernels.errors import CommunicationError, PeerLostError, SignalTimeoutError


def main() -> None:
    """A wait for what never comes ends at its limit, or when the host says so; the error names what it was."""
    for end, kind in (("late", SignalTimeoutError), ("stopped", PeerLostError)):
        for program in ("gather", "gradient", "scatter"):
            error = _given_up(program, end)
            assert type(error) is kind, error
            wanted = "rank 2 to add up what it was sent before (chunk 2, piece 0)"
            if program != "scatter":
                wanted = "chunk 2, piece 1, to be copied here from rank 2"
            assert f"{program}: rank 0 waited for {wanted}" in str(error), error
            told = "did not signal within 0.3 s" if end == "late" else "a peer is gone"
            assert told in str(error), error


def _given_up(program: str, end: str) -> CommunicationError:
    """Of rank 0 of three, which has everything but what it waits for last; as the transport and the host report it."""
    case = ScatterCase(rank=0) if program == "scatter" else GatherCase(rank=0, rows=32, pieces=2)
    schedule = tile_schedule("scatter" if program == "scatter" else "gather", 3, 0, gather_pieces=2)
    waits = [describe_wait(program, step, 0) for step in schedule.steps if step.inside and step.kind is Kind.WAIT]
    case.tag = 3  # of other kernels
    supervisor = Supervisor(case.control, None, ["another kernel's wait"] * case.tag + waits)
    supervisor.timeout_s = case.timeout_s = 0.3 if end == "late" else 60.0
    if isinstance(case, ScatterCase):
        case.credits[2] = word(case.epoch, -2)
    else:
        case.deliver()
        case.words[1] = case.wanted(1)
    if end == "stopped":
        supervisor._reason = PeerLostError("a peer is gone")
        later(lambda: case.control.abort(2))
    assert supervisor.failure() is None
    if program == "gradient":
        assert isinstance(case, GatherCase)
        with mock.patch.object(kernel_cases, "check_product"):  # of a result that is worth nothing
            ends(lambda: case.gradient(POINTERS, swapped=False, accumulate=False, out_dtype=torch.float32))
    else:
        ends(lambda: case.multiply(POINTERS))
    assert case.aborted.item() == 1
    code, tag, index, expected, seen = case.control.error() or (0,) * 5
    last = 1 if program == "scatter" else 3
    assert (code, tag + index) == (1 if end == "late" else 2, 3 + last)
    assert (expected - seen) % 2**32 == 1
    if isinstance(case, ScatterCase):
        assert case.parts[2].isnan().all() and case.arrived.tolist()[2] == -1
    error = supervisor.failure()
    assert error is not None
    # Whoever comes later ends at once, and the first error stays.
    case.tag = 0
    began = time.perf_counter()
    case.multiply(POINTERS)
    assert time.perf_counter() - began < 20
    assert case.control.error() == (code, tag, index, expected, seen)
    return error
