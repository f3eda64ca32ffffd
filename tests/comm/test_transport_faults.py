"""Ranks that disagree, die, stall or lack memory: errors that say who and what, on every rank, in time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fault_cases as cases
import pytest

from odysseus_kernels.testing.spawn import RankPools, run_ranks

TRANSPORTS = ("symmetric", "collective")


@pytest.mark.parametrize("what", ("shape", "dtype", "operator", "mode", "pieces"))
@pytest.mark.parametrize(
    ("transport", "mode"), (("symmetric", "fused"), ("collective", "fused"), ("collective", "unfused"))
)
def test_every_rank_learns_which_one_differs(ranks: RankPools, transport: str, mode: str, what: str) -> None:
    for rank, (error, message, seconds) in enumerate(ranks(3).run(cases.odd_rank, transport, mode, what, 1)):
        assert error == "RankMismatchError", f"rank {rank}: {error}: {message}"
        assert "rank 1 differs" in message and "all_gather_linear forward" in message, message
        assert seconds < 5


def test_two_ranks_that_differ_are_both_named(ranks: RankPools) -> None:
    for error, message, _ in ranks(2).run(cases.odd_rank, "symmetric", "fused", "shape", 0):
        assert error == "RankMismatchError"
        assert "rank 0 called" in message and "x [5, 8]" in message
        assert "rank 1 called" in message and "x [4, 8]" in message


@pytest.mark.parametrize("operator", ("gather", "scatter"))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_rank_is_an_error_on_every_survivor(transport: str, operator: str) -> None:
    # Four ranks: in a ring, one of them does not talk to the one that dies.
    outcomes = run_ranks(cases.killed_rank, 4, transport, operator, 1, timeout=60, expect_failure=True)
    assert outcomes[1].exit_code == -9
    for survivor in (0, 2, 3):
        assert outcomes[survivor].ok, outcomes[survivor].describe()
        error, message, seconds, names = outcomes[survivor].result
        assert error == "PeerLostError", f"{error}: {message}"
        assert "rank 1" in message and "forward" in message, message
        assert seconds < 0.5 + 2.0  # it died half a second after the others began to wait
        assert names == []


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_does_not_come_is_an_error_in_time(transport: str) -> None:
    outcomes = run_ranks(cases.absent_rank, 2, transport, 1, 1.5, timeout=60, expect_failure=True)
    error, message, seconds = outcomes[0].result
    assert error == "SignalTimeoutError", f"{error}: {message}"
    assert "all_gather_linear" in message and "1.5 s" in message
    assert 1.4 < seconds < 4
    if transport == "symmetric":
        assert "rank 1" in message and "signal" in message


@pytest.mark.parametrize("program", ("gather", "scatter"))
@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_a_rank_that_fails_tells_its_peers_why(transport: str, program: str) -> None:
    # Over the collective transport the product of what is scattered runs before ranks have agreed on the call.
    outcomes = run_ranks(cases.failing_rank, 3, transport, program, 2, timeout=60, expect_failure=True)
    assert outcomes[2].result[0] == "MemoryError"
    for rank in (0, 1):
        error, message, seconds = outcomes[rank].result
        assert error == "PeerLostError" and "rank 2 gave up" in message and "no memory for the product" in message
        assert seconds < 2


@pytest.fixture
def tiny_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tmpfs of 6 MiB as the place of the segments."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    monkeypatch.setenv("ODYSSEUS_SHM_DIR", str(tmp_path))
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_too_little_shared_memory_is_one_warning(tiny_memory: Path) -> None:
    for messages, transports in run_ranks(cases.small_memory, 2, timeout=90):
        assert len(messages) == 1, messages
        assert "all_gather_linear (forward) needs 8,388,608 more bytes" in messages[0], messages
        assert (
            "bytes needed" in messages[0] and "bytes free" in messages[0] and "collective transport" in messages[0]
        ), messages
        assert transports == [["symmetric"], ["collective"], ["symmetric"], ["collective"], ["symmetric"]]


def test_no_shared_memory_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODYSSEUS_SHM_DIR", "/proc/self/task")
    for messages, (error, message, _) in run_ranks(cases.no_memory_directory, 2, timeout=90):
        assert len(messages) == 1 and "collectives" in messages[0]
        assert error == "ValueError" and 'transport="symmetric"' in message and "rank 0" in message


@pytest.mark.parametrize(("world", "count", "late"), ((2, 300, False), (3, 200, True), (4, 150, True)))
def test_back_to_back_in_random_order(ranks: RankPools, world: int, count: int, late: bool) -> None:
    for checked in ranks(world).run(cases.random_order, world, count, late):
        assert checked >= count


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", (2, 3))
def test_prefetched_weights_that_change_or_are_not_used(ranks: RankPools, world: int, transport: str) -> None:
    ranks(world).run(cases.stale_prefetch, transport)


def test_nothing_is_left_behind() -> None:
    assert run_ranks(cases.clean_exit, 2, timeout=60) == [[], []]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_after_a_stopped_rank_calls_fail_at_once_and_processes_end(transport: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("exit_run.py")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), "3", tmp_path / "meeting", transport],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        processes[1].send_signal(signal.SIGSTOP)
        outcomes = {}
        for rank in (0, 2, 1):
            if rank == 1:
                processes[1].send_signal(signal.SIGCONT)
            for process in processes[:1] + processes[2:] if rank == 0 else processes[1:2] if rank == 1 else []:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            stdout = processes[rank].stdout
            assert stdout is not None
            outcomes[rank] = json.loads(stdout.readline())
            begin = time.monotonic()
            _, errors = processes[rank].communicate(timeout=30)
            assert processes[rank].returncode == 3, errors
            assert time.monotonic() - begin < 5, f"rank {rank} took its time to end"
            assert "terminate called" not in errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    kinds = {rank: [kind for kind, _, _ in calls] for rank, calls in outcomes.items()}
    assert "SignalTimeoutError" in (kinds[0][0], kinds[2][0]), outcomes
    for rank, calls in outcomes.items():
        for kind, message, seconds in calls:
            assert kind in ("SignalTimeoutError", "PeerLostError", "CommunicationError"), (rank, message)
            assert seconds < 1.5 + 3
        for _, message, seconds in calls[1:]:
            assert seconds < 1 and "make it again" in message, (rank, message)
