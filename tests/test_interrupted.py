"""Ctrl-C ends whatever a user has started: every process, soon, with nothing left behind and no wall of text."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from odysseus_kernels.local_ranks import interrupts_held, started_ranks

pytestmark = pytest.mark.without_ranks

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
START_LIMIT_S, GONE_LIMIT_S = 60.0, 10.0
MARK = "ODYSSEUS_INTERRUPTED_RUN"  # in the environment of all that a program starts, in whatever session it runs

BUILD = """
import os, pathlib, time

def build():
    (pathlib.Path(__file__).parent / f"{os.getpid()}.ready").touch()
    time.sleep(600)
"""

TRAINING = """
import os, pathlib
import torch
import torch.distributed as dist
import odysseus_kernels as ody

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
torch.set_num_threads(1)
dist.init_process_group("gloo")
weight = torch.randn(64, 64, requires_grad=True)
while True:
    ody.all_gather_linear(torch.randn(1, 32, 64), weight, group=None).sum().backward()
    (pathlib.Path(__file__).parent / f"{os.getpid()}.ready").touch()
"""


class Program(NamedTuple):
    """Arguments of Python, given a folder; and the processes that are at work, given the folder and the run's."""

    arguments: Callable[[Path], list[str]]
    at_work: Callable[[Path, set[int]], int]


def _have_said_so(folder: Path, processes: set[int]) -> int:
    return sum(int(path.stem) in processes for path in folder.glob("*.ready"))


def _have_loaded_the_extension(folder: Path, processes: set[int]) -> int:
    return sum("/odysseus_kernels/_C." in _read(process, "maps") for process in processes)


def _script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


# None ends by itself soon: a self-test of all operators, a user's function that sleeps, many rounds, a loop.
PROGRAMS = {
    "doctor": Program(
        lambda folder: ["-m", "odysseus_kernels", "doctor", "--device", "cpu", "--ranks", str(RANKS)],
        _have_loaded_the_extension,
    ),
    "verify": Program(
        lambda folder: ["-m", "odysseus_kernels", "verify", f"{_script(folder, BUILD)}:build", "--ranks", str(RANKS)],
        _have_said_so,
    ),
    "overlap": Program(
        lambda folder: [
            str(ROOT / "benchmarks/overlap.py"), "--quick", "--repeats", "100000", "--output", str(folder)
        ],
        _have_loaded_the_extension,
    ),
    "training": Program(
        lambda folder: [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), _script(folder, TRAINING)
        ],
        _have_said_so,
    ),
}  # fmt: skip


def _read(process: int, name: str) -> str:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes().decode(errors="replace")
    except OSError:
        return ""  # gone meanwhile


class Run:
    """A program in a session of its own, as in a terminal."""

    def __init__(self, program: Program, folder: Path, memory: Path) -> None:
        self._program, self._folder = program, folder
        self._mark = uuid.uuid4().hex
        self._output = (folder / "output").open("w+")
        temporary = folder / "tmp"
        temporary.mkdir()
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= {
            MARK: self._mark,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "ODYSSEUS_SHM_DIR": str(memory),
            "TMPDIR": str(temporary),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),  # torch makes it in TMPDIR, and leaves it there
        }
        # A shell starts background jobs with SIGINT ignored, and so these tests may have been.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = subprocess.Popen(
                [sys.executable, *program.arguments(folder)],
                env=environment, stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        finally:
            signal.signal(signal.SIGINT, before)

    def processes(self) -> set[int]:
        """All that the program has started, and itself."""
        mark = f"{MARK}={self._mark}"
        numbers = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
        return {number for number in numbers if mark in _read(number, "environ").split("\0")}

    def wait_until_at_work(self) -> None:
        end = time.monotonic() + START_LIMIT_S
        while self._program.at_work(self._folder, self.processes() - {self.process.pid}) < RANKS:
            assert self.process.poll() is None, f"ended by itself:\n{self.text()}"
            assert time.monotonic() < end, f"not at work within {START_LIMIT_S:g} s:\n{self.text()}"
            time.sleep(0.05)

    def wait_until_gone(self) -> float:
        """Seconds until the last process is gone; a test that finds one left fails."""
        begin = time.monotonic()
        while self.process.poll() is None or self.processes():
            assert time.monotonic() < begin + GONE_LIMIT_S, f"left: {self.processes()}\n{self.text()}"
            time.sleep(0.02)
        return time.monotonic() - begin

    def text(self) -> str:
        self._output.seek(0)
        return self._output.read()

    def end(self) -> None:
        """Whatever a failed test has left."""
        for number in self.processes():
            os.kill(number, signal.SIGKILL)
        self.process.wait(GONE_LIMIT_S)
        self._output.close()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises, although a shell may have started these tests with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_is_held_raises_at_the_end(interruptible: None) -> None:
    steps = []

    def block() -> None:
        with interrupts_held():
            # To this thread: another one, of a library, would let the process have it at once.
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            steps.append("held")
        steps.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert steps == ["held"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_started_ranks_do_not_hear_an_interrupt_and_end_with_the_block(interruptible: None) -> None:
    with started_ranks([sys.executable, "-c", "import time; time.sleep(60)"], RANKS) as processes:
        for process in processes:
            process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            processes[0].wait(0.5)
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * RANKS


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for the sockets in it, which tmp_path is not."""
    with tempfile.TemporaryDirectory(prefix="int-") as path:
        yield Path(path)


@pytest.fixture
def memory() -> Iterator[Path]:
    """Where nobody else's segments lie."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("needs /dev/shm")
    path = Path(tempfile.mkdtemp(prefix="int-", dir=shared))
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "to_group"),
    [("doctor", True), ("doctor", False), ("verify", True), ("overlap", True), ("overlap", False), ("training", True)],
    ids=lambda value: value if isinstance(value, str) else "terminal" if value else "parent alone",
)
def test_ctrl_c_ends_everything(
    folder: Path, memory: Path, record_property: Callable[[str, object], None], name: str, to_group: bool
) -> None:
    run = Run(PROGRAMS[name], folder, memory)
    try:
        run.wait_until_at_work()
        assert len(run.processes()) > RANKS
        send = os.killpg if to_group else os.kill
        send(run.process.pid, signal.SIGINT)
        seconds = run.wait_until_gone()
        record_property("seconds until all were gone", round(seconds, 2))
        print(f"{name}: all gone after {seconds:.2f} s, status {run.process.returncode}")
        assert list(memory.iterdir()) == []
        if name == "training":  # how torchrun ends, and what it says and leaves, is torchrun's
            assert run.process.returncode != 0
            return
        assert run.process.returncode == 130, run.text()
        assert "Traceback" not in run.text(), run.text()
        assert list((folder / "tmp").iterdir()) == []
    finally:
        run.end()
