"""Ranks as processes on this machine, for tests and benchmarks.

:func:`run_ranks` starts a group of ranks for one function.  :class:`RankPool` keeps them up for many functions, which
makes hundreds of multi-rank tests affordable: starting Python with torch takes seconds, a job takes milliseconds.

Ranks meet over a file, never over a port.  What comes back from a rank is a ``torch.save`` file that is read with
``weights_only=True`` and a line of JSON: nothing that a rank wrote is unpickled.  Every wait of the parent has a
limit, and a rank that is stopped at its limit leaves the Python stacks of its threads in the error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, Literal, overload

import torch

from odysseus_kernels.local_ranks import interrupts_held
from odysseus_kernels.testing.rank_process import START_JOB, Reference, Setup, result_path, serve, stack_path

__all__ = ["Outcome", "RankPool", "RankPools", "RanksFailedError", "preload", "run_ranks"]

_PRELOADED = [serve.__module__]  # what the server that ranks are forked from imports
_START_LIMIT_S = 120.0
_STOP_LIMIT_S = 5.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a function ended on one rank: with a result, with an exception, or with the end of its process.

    Attributes:
        rank: the rank.
        result: what the function returned; tensors are on the CPU and share memory with nothing.
        error: qualified name of the exception's type (``"ValueError"``,
            ``"odysseus_kernels.errors.PeerLostError"``), or None.
        message: text of the exception, or why and where the process was stopped.
        traceback: traceback of the exception, or the stacks of a rank that was stopped.
        exit_code: exit code of a process that ended (negative: the signal), or None if it is alive.
        seconds: from handing out the function to this outcome.
    """

    rank: int
    result: Any = None
    error: str | None = None
    message: str = ""
    traceback: str = ""
    exit_code: int | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the function returned."""
        return self.error is None and self.exit_code is None

    @property
    def error_name(self) -> str | None:
        """Name of the exception's type without its module, or None."""
        return None if self.error is None else self.error.rpartition(".")[2]

    def describe(self) -> str:
        """The outcome in words, with the traceback."""
        if self.ok:
            return f"rank {self.rank}: returned after {self.seconds:.1f} s"
        what = f"{self.error}: {self.message}" if self.error else f"exit code {self.exit_code}: {self.message}"
        return f"rank {self.rank}: {what}\n{self.traceback}".rstrip()


class RanksFailedError(RuntimeError):
    """A function failed on at least one rank; ``outcomes`` has every rank's, the message every traceback."""

    def __init__(self, name: str, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        # Ranks that the pool stopped are consequences; what raised or died by itself comes first.
        failed = sorted((o for o in outcomes if not o.ok), key=lambda o: (o.error is None, o.seconds))
        returned = [o.rank for o in outcomes if o.ok]
        text = "\n\n".join(o.describe() for o in failed)
        super().__init__(f"{name} failed on {len(failed)} of {len(outcomes)} ranks (returned: {returned})\n\n{text}")


class RankPool:
    """``world_size`` processes that stay up with their process group and run functions one after another.

    Use it as a context manager, or call :meth:`close`.  Processes start at the first function, and again at the next
    one after a failure, so that no function meets what a failed one left behind.

    Args:
        world_size: number of ranks, at least 1.
        threads: intra-op threads of each rank.
        timeout: seconds that one function may take, unless the call says otherwise; also the process group's.
        backend: backend of ``torch.distributed``.
        environment: variables set in the ranks.  Libraries read some as they are loaded: with any, and with a backend
            for GPUs, ranks start Python anew; else they are forked from a server that has imported torch.
    """

    def __init__(
        self,
        world_size: int,
        *,
        threads: int = 1,
        timeout: float = 120.0,
        backend: str = "gloo",
        environment: dict[str, str] | None = None,
    ) -> None:
        if world_size < 1 or threads < 1:
            raise ValueError(f"expected at least 1 rank and 1 thread, got world_size={world_size}, threads={threads}")
        if not timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0, got {timeout!r}")
        self.world_size = world_size
        self.threads = threads
        self.timeout = timeout
        self.backend = backend
        self.environment = dict(environment or {})
        self._processes: list[Any] = []  # of a multiprocessing context; its types have no public names
        self._channels: list[multiprocessing.connection.Connection] = []
        self._folder: Path | None = None
        self._job = START_JOB

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float | None = None, grace: float = 5.0) -> list[Any]:
        """Runs ``fn(rank, world_size, *args)`` on every rank.

        Args:
            fn: a function at the top level of a module.
            *args: what pickle can carry to the ranks.
            timeout: seconds after which ranks that have not returned are stopped.
            grace: seconds that the other ranks get once one has failed.

        Returns:
            What the ranks returned, in rank order: tensors, numbers, text, None, and dicts, lists and tuples of these.
            The generator of random numbers is seeded with 0 before each function.

        Raises:
            RanksFailedError: if any rank raised, died or did not return in time.
        """
        outcomes = self.outcomes(fn, *args, timeout=timeout, grace=grace)
        if not all(o.ok for o in outcomes):
            raise RanksFailedError(f"{fn.__module__}.{fn.__qualname__}", outcomes)
        return [o.result for o in outcomes]

    def outcomes(
        self, fn: Callable[..., Any], *args: Any, timeout: float | None = None, grace: float = 5.0
    ) -> list[Outcome]:
        """Like :meth:`run`, but says how each rank ended and raises for none of it."""
        job = pickle.dumps((Reference.of(fn), args))
        if not self._processes:
            self._start()
        self._job += 1
        for channel in self._channels:
            # A rank that died while idle shows up as an end of its process when outcomes are collected.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                channel.send_bytes(job)
        try:
            outcomes = self._collect(timeout or self.timeout, grace)
        except BaseException:  # Ctrl-C: ranks are in the middle of something and would answer the next question wrongly
            self._stop(at_once=True)
            raise
        if not all(o.ok for o in outcomes):
            self._stop(at_once=True)
        return outcomes

    def close(self) -> None:
        """Ends the processes; the pool can be used again afterwards."""
        self._stop(at_once=False)

    def _start(self) -> None:
        try:
            self._start_processes()
            outcomes = self._collect(_START_LIMIT_S, grace=1.0)
            if not all(o.ok for o in outcomes):
                raise RanksFailedError("start of the ranks", outcomes)
        except BaseException:  # Ctrl-C, too: ranks that import or meet one another would not end for seconds
            self._stop(at_once=True)
            raise

    def _start_processes(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="odysseus-ranks-"))
        self._job = START_JOB
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCH_NUM_THREADS")}
        # Gloo looks for an interface by the host's name, which containers often cannot resolve.
        loopback = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
        method = "spawn" if self.environment or self.backend != "gloo" else "forkserver"
        context: Any = multiprocessing.get_context(method)  # the common base of contexts names no Process
        context.set_forkserver_preload(_PRELOADED)
        resource_tracker.ensure_running()  # first: once it has started, it lets interrupts through again
        with _environment({**loopback, **threads, **self.environment}):
            if method == "forkserver":
                with interrupts_held():
                    forkserver.ensure_running()
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                setup = Setup(
                    rank, self.world_size, self.threads, self.timeout, self.backend, str(self._folder), dict(os.environ)
                )
                process = context.Process(target=serve, args=(setup, theirs), name=f"rank{rank}", daemon=True)
                # A fork server answers when it has imported torch, too late for Ctrl-C; its ranks inherit its mask.
                with interrupts_held() if method == "spawn" else contextlib.nullcontext():
                    process.start()
                    self._processes.append(process)
                theirs.close()
                self._channels.append(ours)

    def _collect(self, timeout: float, grace: float) -> list[Outcome]:
        begin = time.monotonic()
        limit, reason = begin + timeout, f"did not return within {timeout:g} s"
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < self.world_size:
            waiting = [rank for rank in range(self.world_size) if rank not in outcomes]
            watched = [self._channels[r] for r in waiting] + [self._processes[r].sentinel for r in waiting]
            left = limit - time.monotonic()
            if left > 0:
                multiprocessing.connection.wait(watched, left)
            for rank in waiting:
                outcome = self._look(rank, time.monotonic() - begin)
                if outcome is None and left <= 0:
                    outcome = self._kill(rank, reason, time.monotonic() - begin)
                if outcome is None:
                    continue
                outcomes[rank] = outcome
                if not outcome.ok and time.monotonic() + grace < limit:
                    limit = time.monotonic() + grace
                    reason = f"did not return within {grace:g} s after rank {rank} had failed"
        return [outcomes[rank] for rank in range(self.world_size)]

    def _look(self, rank: int, seconds: float) -> Outcome | None:
        """The outcome of a rank that has reported or ended, else None."""
        process, channel = self._processes[rank], self._channels[rank]
        ended = not process.is_alive()  # read first: a report sent just before the end must not be missed
        try:
            if channel.poll():
                report = json.loads(channel.recv_bytes())
                if report["error"] is not None:
                    return Outcome(rank, None, report["error"], report["message"], report["traceback"], None, seconds)
                result = torch.load(self._result_path(rank), weights_only=True)
                self._result_path(rank).unlink()
                return Outcome(rank, result, seconds=seconds)
        except (EOFError, ConnectionResetError):
            process.join(_STOP_LIMIT_S)  # its end of the channel is closed, so the process is ending
            ended = True
        if not ended:
            return None
        return Outcome(rank, message="the process ended", exit_code=process.exitcode, seconds=seconds)

    def _kill(self, rank: int, reason: str, seconds: float) -> Outcome:
        process = self._processes[rank]
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)  # asks for the stacks, see serve
        time.sleep(0.2)
        stacks = stack_path(str(self._folder), rank)
        text = stacks.read_text() if stacks.exists() else ""
        process.kill()
        process.join(_STOP_LIMIT_S)
        return Outcome(rank, message=f"{reason}; stopped", traceback=text, exit_code=process.exitcode, seconds=seconds)

    def _result_path(self, rank: int) -> Path:
        assert self._folder is not None
        return result_path(str(self._folder), self._job, rank)

    def _stop(self, *, at_once: bool) -> None:
        for channel in self._channels:
            channel.close()  # a rank that waits for its next function reads the end of the channel and exits
        limit = time.monotonic() + _STOP_LIMIT_S
        for process in self._processes:
            if not at_once:
                process.join(max(0.0, limit - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join(_STOP_LIMIT_S)
            process.close()
        self._processes, self._channels = [], []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def preload(*modules: str) -> None:
    """Has ranks start with ``modules`` already imported: once in the server they are forked from, not in each rank.

    For libraries that take seconds to import.  Works before the first rank of this process starts; a module that does
    not exist is left out.
    """
    _PRELOADED.extend(module for module in modules if module not in _PRELOADED)


class RankPools:
    """One :class:`RankPool` for each world size, made when it is first asked for: the body of a pytest fixture.

    Example::

        @pytest.fixture(scope="session")
        def ranks():
            with RankPools() as pools:
                yield pools

        def test_something(ranks):
            results = ranks(2).run(something_on_each_rank, 1.5)
    """

    def __init__(self, *, threads: int = 1, timeout: float = 120.0) -> None:
        self._threads = threads
        self._timeout = timeout
        self._pools: dict[int, RankPool] = {}

    def __call__(self, world_size: int) -> RankPool:
        """The pool of ``world_size`` ranks."""
        if world_size not in self._pools:
            self._pools[world_size] = RankPool(world_size, threads=self._threads, timeout=self._timeout)
        return self._pools[world_size]

    def __enter__(self) -> RankPools:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes every pool."""
        for pool in self._pools.values():
            pool.close()


@overload
def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = ..., threads: int = ..., grace: float = ...,
    expect_failure: Literal[False] = False,
) -> list[Any]: ...  # fmt: skip


@overload
def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = ..., threads: int = ..., grace: float = ...,
    expect_failure: Literal[True],
) -> list[Outcome]: ...  # fmt: skip


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    threads: int = 1,
    grace: float = 5.0,
    expect_failure: bool = False,
) -> list[Any]:
    """Runs ``fn(rank, world_size, *args)`` in ``world_size`` new processes with a Gloo group.

    Args:
        fn: a function at the top level of a module.
        world_size: number of ranks.
        *args: what pickle can carry to the ranks.
        timeout: seconds, after the ranks have started, at which those that have not returned are stopped.
        threads: intra-op threads of each rank.
        grace: seconds that the other ranks get once one has failed.
        expect_failure: return an :class:`Outcome` for each rank, whatever it is, instead of results.

    Returns:
        What the ranks returned, or their outcomes, in rank order.

    Raises:
        RanksFailedError: if a rank raised, died or did not return in time, and this was not expected.
    """
    with RankPool(world_size, threads=threads, timeout=timeout) as pool:
        if expect_failure:
            return pool.outcomes(fn, *args, grace=grace)
        return pool.run(fn, *args, grace=grace)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables for processes started meanwhile: a spawned process takes its threads from its environment."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
