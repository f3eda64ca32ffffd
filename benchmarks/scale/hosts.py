#!/usr/bin/env python
"""Two hosts on this machine with a link of a given rate: ``python benchmarks/scale/hosts.py --rate 120mbit x.py``.

Each host is a network namespace with one rank in it, pinned to a core of its own; a veth pair joins them, and a token
bucket (``tc qdisc tbf``) limits what each sends.  Ranks find the variables that torchrun sets, and
``dist.init_process_group("gloo")`` works as it does across machines.

Nothing is left behind, however the launcher ends.  The namespaces have no names: they, and the veth pair, which is made
inside of them, are gone when their last process is.  Each rank has a process namespace of its own, so that whatever it
started ends with it, and the kernel kills it when the launcher ends (``PR_SET_PDEATHSIG``).

Needs Linux, root, and the commands of :data:`COMMANDS`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

__all__ = [
    "COMMANDS",
    "CONGESTION_CONTROL",
    "FRAME_BYTES",
    "HOSTS",
    "INTERFACE",
    "Hosts",
    "HostsError",
    "ask_hosts",
    "parse_rate",
    "run_on_hosts",
]

HOSTS = 2
_IPROUTE = "iproute2 (Fedora: iproute and iproute-tc)"
COMMANDS = {"ip": _IPROUTE, "tc": _IPROUTE} | dict.fromkeys(("unshare", "nsenter", "setpriv", "taskset"), "util-linux")
"""Commands that are used, and the package that has them."""

INTERFACE = "odysseus0"
"""Each host's end of the link."""

_NETWORK = "10.213.0.0/24"
_PORT = 29500  # in a namespace of its own, where nobody else listens
# In the mount namespace of the host alone: c10d asks for the names of peers, and no name server can be reached there.
_NO_NAME_SERVER = "mount --bind /dev/null /etc/resolv.conf 2>/dev/null"
_START_LIMIT_S = 20.0
_COMMAND_LIMIT_S = 10.0
_GRACE_S = 15.0
_POLL_S = 0.02
_UNITS = {"": 1e6, "bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SLOWEST, _FASTEST = 1e5, 1e11
# More than a packet as TCP hands it to the interface (64 KiB), or the kernel cuts each into frames on the rank's own
# core, which real interfaces do themselves.
_LEAST_BURST = 72 << 10
_BURST_S, _QUEUE_S = 0.004, 0.05
_LEAST_QUEUE = 256 << 10
# Bytes of a frame, as networks of machines that compute have them; of 1,500, headers would take 4 % of the link.
FRAME_BYTES = 9000
# Every kernel has it, and next to nothing is lost on this link.  BBR, which some machines choose, empties a link for up
# to 0.2 s every ten seconds to measure its delay, in one direction or in both.
CONGESTION_CONTROL = "reno"


class HostsError(RuntimeError):
    """Hosts cannot be made here, or their processes did not start; says what is missing and how to get it."""


def parse_rate(text: str) -> float:
    """Bits per second of ``"120mbit"``, ``"1gbit"``, ``"1000"`` (Mb/s).

    Raises:
        ValueError: for anything else, and for rates that the link cannot have.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(bit|kbit|mbit|gbit|)", text.strip().lower())
    if match is None:
        raise ValueError(f"rate: expected Mb/s, or a number with kbit, mbit or gbit such as 120mbit, got {text!r}")
    rate = float(match[1]) * _UNITS[match[2]]
    if not _SLOWEST <= rate <= _FASTEST:
        raise ValueError(f"rate: expected 100kbit to 100gbit, got {text!r}")
    return rate


def check_machine() -> None:
    """Raises HostsError with all that is missing for hosts on this machine."""
    missing = []
    if sys.platform != "linux":
        raise HostsError(f"two hosts on one machine need Linux with network namespaces, this is {sys.platform}")
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        packages = sorted({COMMANDS[name] for name in absent})
        missing.append(f"the commands {', '.join(absent)}: install {' and '.join(packages)}")
    if os.geteuid() != 0:
        missing.append(
            "root, for network namespaces and tc: run with sudo, or in a container with --cap-add NET_ADMIN "
            "--cap-add SYS_ADMIN"
        )
    cores = len(os.sched_getaffinity(0))
    if cores < HOSTS:
        missing.append(f"{HOSTS} cores, one for each host: this process may use {cores}")
    if missing:
        raise HostsError("two hosts on one machine need " + "; and ".join(missing))


class Hosts:
    """Two namespaces with a link, in each of which one command is started: a context manager.

    Ranks live no longer than the thread that enters it, which is how the kernel understands ``PR_SET_PDEATHSIG``.

    Args:
        rate: of the link, bits per second in each direction.
        command: what each host runs, the same on both.
        environment: variables set beside those of this process and of the ranks.
        threads: of each rank.
        pass_fds: file descriptors that ranks inherit.

    Raises:
        HostsError: what is needed is missing, or a step failed; says which.
    """

    def __init__(
        self,
        rate: float,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        threads: int = 1,
        pass_fds: Sequence[int] = (),
    ) -> None:
        check_machine()
        self.rate = rate
        self._command = list(command)
        self._environment = {**os.environ, **(environment or {})}
        self._threads = threads
        self._pass_fds = tuple(pass_fds)
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        try:
            cores = sorted(os.sched_getaffinity(0))
            for rank in range(HOSTS):
                self.processes.append(self._start(rank, cores[rank]))
            self._join()
            for process in self.processes:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # its exit status says more
                    process.stdin.write(b"go\n")
                    process.stdin.close()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait(self, timeout: float | None = None, grace: float = _GRACE_S) -> list[int]:
        """Waits for both ranks; returns their exit codes (negative: the signal).

        A rank that outlives a failed one by ``grace`` seconds is killed.

        Raises:
            HostsError: they run longer than ``timeout`` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        failed_at = None
        while True:
            codes = [process.poll() for process in self.processes]
            if None not in codes:
                return [_code(code) for code in codes if code is not None]
            now = time.monotonic()
            if failed_at is None and any(codes):
                failed_at = now
            if failed_at is not None and now > failed_at + grace:
                self.close()
            elif end is not None and now > end:
                running = [rank for rank, code in enumerate(codes) if code is None]
                self.close()
                raise HostsError(f"ranks {running} did not end within {timeout:g} s, and were killed")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Kills what still runs; namespaces and link are gone with it."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait(_COMMAND_LIMIT_S)
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()

    # -- the steps ----------------------------------------------------------------------------------------------------

    def _start(self, rank: int, core: int) -> subprocess.Popen[bytes]:
        """A process in new namespaces that waits for a line before it becomes the rank."""
        environment = {
            **self._environment,
            "RANK": str(rank),
            "WORLD_SIZE": str(HOSTS),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": _address(0),
            "MASTER_PORT": str(_PORT),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "ODYSSEUS_HOST": f"host{rank}",
            "OMP_NUM_THREADS": str(self._threads),
            "MKL_NUM_THREADS": str(self._threads),
        }
        command = ["taskset", "--cpu-list", str(core), "setpriv", "--pdeathsig", "KILL"]
        command += ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        # At the launcher's end before the line, read fails, and so does the shell.  The shell stays the first process
        # of the namespace: that one ignores signals it sends itself, abort() among them, and unshare 2.38 does not
        # tell that it was killed.
        script = f'{_NO_NAME_SERVER}; read go || exit; "$@" </dev/null; exit $?'
        command += ["sh", "-c", script, "sh", *self._command]
        # A session of its own: Ctrl-C reaches the launcher alone, which ends the ranks.
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, start_new_session=True, pass_fds=self._pass_fds
        )

    def _join(self) -> None:
        """Both ends of the link, with addresses and limits; made inside of the namespaces, so that no end is lost."""
        pids = [process.pid for process in self.processes]
        for process in self.processes:
            self._await_namespace(process)
        first, second = (str(pid) for pid in pids)
        ends = [INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second]
        _call(["ip", "link", "add", "name", *ends])
        burst = max(_LEAST_BURST, round(self.rate / 8 * _BURST_S))
        queue = max(_LEAST_QUEUE, round(self.rate / 8 * _QUEUE_S))
        limit = ["rate", f"{round(self.rate)}bit", "burst", str(burst), "limit", str(queue)]
        for rank, pid in enumerate(pids):
            inside = ["nsenter", "--target", str(pid), "--net"]
            _call([*inside, "ip", "link", "set", "lo", "up"])
            _call([*inside, "ip", "address", "add", f"{_address(rank)}/24", "dev", INTERFACE])
            _call([*inside, "tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit])
            _call([*inside, "ip", "link", "set", INTERFACE, "mtu", str(FRAME_BYTES), "up"])
            # Not by sysctl: containers mount /proc/sys read-only.
            route = [_NETWORK, "dev", INTERFACE, "src", _address(rank), "congctl", CONGESTION_CONTROL]
            _call([*inside, "ip", "route", "replace", *route])

    def _await_namespace(self, process: subprocess.Popen[bytes]) -> None:
        own = os.readlink("/proc/self/ns/net")
        end = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < end:
            if process.poll() is not None:
                raise HostsError(
                    f"no namespace could be made: unshare ended with status {process.returncode}; its message is "
                    f"above. In a container, expected --cap-add NET_ADMIN --cap-add SYS_ADMIN"
                )
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{process.pid}/ns/net") != own:
                    return
            time.sleep(_POLL_S)
        raise HostsError(f"no namespace was made within {_START_LIMIT_S:g} s (unshare, process {process.pid})")


def _address(rank: int) -> str:
    return f"10.213.0.{rank + 1}"


def _code(code: int) -> int:
    """Of a rank, negative for a signal, which the shell adds to 128; ``sys.exit(-1)`` is 255, and no signal."""
    return 128 - code if code - 128 in signal.valid_signals() else code


def _call(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise HostsError(f"{' '.join(command)}: no answer within {_COMMAND_LIMIT_S:g} s") from None
    if done.returncode:
        hint = "; the kernel has no tbf (module sch_tbf)" if "tbf" in command and "kind" in done.stderr else ""
        raise HostsError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}{hint}")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM raises, as SIGINT does, so that ranks are ended and waited for."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_on_hosts(
    rate: float,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    threads: int = 1,
    timeout: float | None = None,
    grace: float = _GRACE_S,
) -> list[int]:
    """Runs ``python`` with ``arguments`` (a script, or ``-m`` and a module) on both hosts; returns their exit codes.

    Args:
        rate: bits per second in each direction.
        arguments: of the interpreter.
        environment, threads: as :class:`Hosts` takes them.
        timeout: seconds after which it is an error.
        grace: seconds that a rank may outlive a failed one.

    Raises:
        HostsError: as :class:`Hosts`, and when ``timeout`` has passed.
    """
    with (
        _ended_by_signals(),
        Hosts(rate, [sys.executable, *arguments], environment=environment, threads=threads) as hosts,
    ):
        return hosts.wait(timeout, grace)


def ask_hosts(
    rate: float, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout: float | None = None
) -> tuple[list[int], str]:
    """As :func:`run_on_hosts`, for a program that takes ``--report-fd N`` as its last arguments and writes text there.

    A pipe and no file: nothing is left of it if the launcher is killed.

    Returns:
        Exit codes, and what was written.
    """
    read, write = os.pipe()
    found: list[str] = []

    def collect() -> None:
        with os.fdopen(read, encoding="utf-8") as stream:
            found.append(stream.read())

    reader = threading.Thread(target=collect, name="what the hosts report", daemon=True)
    reader.start()
    command = [sys.executable, *arguments, "--report-fd", str(write)]
    try:
        with _ended_by_signals(), Hosts(rate, command, environment=environment, pass_fds=[write]) as hosts:
            codes = hosts.wait(timeout)
    finally:
        os.close(write)  # the last writer: the reader comes to the end
        reader.join(_COMMAND_LIMIT_S)
    return codes, "".join(found)


def main() -> int:
    """Runs a script on both hosts; the exit status is the first rank's that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit", help="of the link: 120mbit, 1gbit, or a number of Mb/s")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads of each rank")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds after which both ranks are killed")
    parser.add_argument("--grace", type=float, default=_GRACE_S, metavar="S", help="a rank may outlive a failed one")
    parser.add_argument("-m", dest="module", action="store_true", help="the first argument is a module")
    parser.add_argument("script", help="Python file, or module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parsed = parser.parse_args()
    command = [*(["-m"] if parsed.module else []), parsed.script, *parsed.arguments]
    try:
        codes = run_on_hosts(
            parse_rate(parsed.rate), command, threads=parsed.threads, timeout=parsed.timeout, grace=parsed.grace
        )
    except (HostsError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for rank, code in enumerate(codes):
        if code:
            print(f"rank {rank}: ended with {f'signal {-code}' if code < 0 else f'status {code}'}", file=sys.stderr)
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
