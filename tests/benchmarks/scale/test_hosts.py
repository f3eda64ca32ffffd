"""Two hosts on one machine: their link, their ranks, and that nothing of them is left, however the launcher ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.scale import hosts
from benchmarks.scale.hosts import HostsError, ask_hosts, check_machine, parse_rate, run_on_hosts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PATHS = {"PYTHONPATH": str(ROOT)}
GONE_LIMIT_S = 10.0


def _why_not() -> str:
    try:
        check_machine()
        run_on_hosts(1e9, ["-c", "pass"], timeout=30)
    except HostsError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def here() -> None:
    """Skips where hosts cannot be made."""
    reason = _why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def launcher(here: None) -> Iterator[subprocess.Popen[str]]:
    """hosts.py whose ranks sleep, once both have started."""
    command = [sys.executable, str(ROOT / "benchmarks/scale/hosts.py"), "--rate", "100", str(HERE / "sleep.py")]
    # As in a terminal: a shell starts background jobs with SIGINT ignored, and so these tests may have been.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    yield process
    process.kill()
    process.communicate()


def _namespaces_of_children(pid: int) -> set[str]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {os.readlink(f"/proc/{child}/ns/net") for child in children}


def _processes_in(namespaces: set[str]) -> list[int]:
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                if os.readlink(path / "ns/net") in namespaces:
                    found.append(int(path.name))
            except OSError:
                continue  # gone meanwhile
    return found


@pytest.mark.parametrize(("ending", "status"), ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_nothing_is_left(launcher: subprocess.Popen[str], ending: signal.Signals, status: int) -> None:
    interfaces = sorted(os.listdir("/sys/class/net"))
    namespaces = _namespaces_of_children(launcher.pid)
    assert len(namespaces) == 2
    assert os.readlink("/proc/self/ns/net") not in namespaces
    assert len(_processes_in(namespaces)) >= 4  # a rank each, and what started it
    launcher.send_signal(ending)
    assert launcher.wait(GONE_LIMIT_S) == status
    end = time.monotonic() + GONE_LIMIT_S
    while _processes_in(namespaces) and time.monotonic() < end:
        time.sleep(0.05)
    assert _processes_in(namespaces) == []  # a nameless namespace is gone with its last process
    assert sorted(os.listdir("/sys/class/net")) == interfaces


def test_link_has_its_rate(here: None) -> None:
    before = sorted(os.listdir("/sys/class/net"))
    codes, text = ask_hosts(40e6, [str(HERE / "stream.py"), "5"], timeout=60)
    assert codes == [0, 0]
    rate, control = text.split()
    assert 0.5 * 40e6 < float(rate) < 1.1 * 40e6  # the bucket's first burst goes out at once
    assert control == hosts.CONGESTION_CONTROL  # whatever this machine's is
    assert sorted(os.listdir("/sys/class/net")) == before


def test_ranks_across_take_the_collective_transport_and_are_right(here: None) -> None:
    codes, text = ask_hosts(1e9, [str(HERE / "across_hosts.py")], environment=PATHS, timeout=120)
    assert codes == [0, 0]
    found = sorted((json.loads(line) for line in text.splitlines()), key=lambda each: each["rank"])
    assert [each["rank"] for each in found] == [0, 1]
    for each in found:
        assert "needs all ranks on one host" in each["refusal"]
        assert "host0, host1" in each["refusal"]
        assert each["transport"] == "collective"
        assert each["error"] < 1e-6
        assert (each["cores"], each["threads"]) == (1, 1)


@pytest.mark.parametrize(
    ("script", "code"),
    (("import sys; sys.exit(-1)", 255), ("import os; os.abort()", -6), ("import os; os.kill(os.getpid(), 9)", -9)),
)
def test_exit_codes_tell_signals_from_statuses(here: None, script: str, code: int) -> None:
    assert run_on_hosts(1e9, ["-c", script], timeout=50) == [code, code]


def test_a_rank_that_fails_ends_the_other(here: None) -> None:
    script = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
    begin = time.monotonic()
    assert run_on_hosts(1e9, ["-c", script], timeout=50, grace=0.2) == [-signal.SIGKILL, 3]
    assert time.monotonic() - begin < 40


def test_ranks_that_do_not_end_are_named(here: None) -> None:
    with pytest.raises(HostsError, match=r"ranks \[0, 1\] did not end within 1 s, and were killed"):
        run_on_hosts(1e9, ["-c", "import time; time.sleep(60)"], timeout=1)


def test_missing_commands_and_rights_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hosts.shutil, "which", lambda name: None if name in ("tc", "nsenter") else f"/bin/{name}")
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(hosts.os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(sys, "argv", ["hosts.py", "script.py"])
    assert hosts.main() == 2
    text = capsys.readouterr().err
    for part in (
        "the commands tc, nsenter: install iproute2 (Fedora: iproute and iproute-tc) and util-linux",
        "root, for network namespaces and tc: run with sudo",
        "2 cores, one for each host: this process may use 1",
    ):
        assert part in text
    assert "Traceback" not in text


def test_steps_that_fail_say_what_the_command_said(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "INTERFACE", "a-name-that-is-too-long")
    with pytest.raises(HostsError, match="ip link add name a-name-that-is-too-long .*not a valid ifname"):
        run_on_hosts(1e9, ["-c", "pass"], timeout=30)


@pytest.mark.parametrize(
    ("text", "rate"), (("120mbit", 120e6), ("1000", 1e9), ("1Gbit", 1e9), ("0.5gbit", 5e8), ("800kbit", 8e5))
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ("", "fast", "-5", "120mb", "1bit", "200gbit", "0"))
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=f"rate: expected .*got '{text}'"):
        parse_rate(text)
