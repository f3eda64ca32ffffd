"""The command line of ``doctor``.

    python -m odysseus_kernels doctor                                # starts ranks of its own: two, or one for each GPU
    torchrun --nproc-per-node 8 -m odysseus_kernels doctor --json    # ranks that are there already, on any hosts

Exit status: 0 if what should work here works, 1 if something does not, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from odysseus_kernels.config import launched_rank
from odysseus_kernels.local_ranks import started_ranks

if TYPE_CHECKING:
    from odysseus_kernels.doctor.report import Report

__all__ = ["add_doctor", "run_doctor"]

HEALTHY, ILL, USAGE = 0, 1, 2
_MOST_RANKS = 64
# A rank's waits follow one another: to meet, by each transport, in a pair (two), for the others' reports, and for the
# verdict.
_WAITS = 8
# To import torch and to compute, on a machine that is busy with something else.
_START_S = 60.0
# The first rank has spoken; the others have nothing more to say.
_GRACE_S = 5.0


def add_doctor(commands: Any) -> None:
    """Adds ``doctor`` to the subcommands."""
    doctor = commands.add_parser(
        "doctor", help="what this machine has, whether every operator is right on it, and what to do where it is not",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    doctor.add_argument("--ranks", type=int, help="processes to start (default: one for each GPU, at least 2)")
    doctor.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where ranks compute")
    doctor.add_argument("--timeout", type=float, default=30.0, help="seconds to wait for a rank (default 30)")
    doctor.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print JSON instead of tables, or write it to FILE as well"
    )
    doctor.add_argument("--meet", help=argparse.SUPPRESS)  # file over which ranks that were started here meet
    doctor.add_argument("--rank", type=int, help=argparse.SUPPRESS)


def run_doctor(options: argparse.Namespace, given: list[str]) -> int:
    """Runs the command; returns the exit status."""
    if not options.timeout > 0 or options.timeout > 1e6:
        return _usage(f"--timeout: expected seconds from above 0 to 1e6, got {options.timeout:g}")
    if options.ranks is not None and not 1 <= options.ranks <= _MOST_RANKS:
        return _usage(f"--ranks: expected 1 to {_MOST_RANKS}, got {options.ranks}")
    if options.meet is None and launched_rank() is None:
        return _start_ranks(options, given)
    if options.meet is None and options.ranks is not None:
        return _usage("--ranks: expected none where a launcher has started the ranks")
    return _examine(options)


def _usage(text: str) -> int:
    print(text, file=sys.stderr)
    return USAGE


def _start_ranks(options: argparse.Namespace, given: list[str]) -> int:
    """Starts the ranks as processes of this command; the first of them speaks, or this one where it cannot."""
    ranks = options.ranks or _default_ranks(options.device)
    given = given if options.ranks else [*given, "--ranks", str(ranks)]
    with tempfile.TemporaryDirectory(prefix="odysseus-doctor-") as folder:
        meet = str(Path(folder, "meet"))
        command = [sys.executable, "-m", "odysseus_kernels", *given, "--meet", meet]
        with started_ranks(command, ranks) as processes:
            first, others = processes[0], processes[1:]
            if _ended(first, _limit_s(options)) in (HEALTHY, ILL):
                deadline = time.monotonic() + _GRACE_S
                for process in others:
                    _ended(process, deadline - time.monotonic())
            if first.returncode in (HEALTHY, ILL):
                return int(first.returncode)
            return _speak_instead(options, meet, ranks, first.returncode)


def _limit_s(options: argparse.Namespace) -> float:
    return float(_START_S + _WAITS * options.timeout)


def _ended(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """Its status, or None where it does not end within ``limit_s``."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(limit_s, 0))
    return process.returncode


def _default_ranks(device: str) -> int:
    import torch

    return max(2, torch.cuda.device_count() if device != "cpu" else 0)


def _speak_instead(options: argparse.Namespace, meet: str, ranks: int, code: int | None) -> int:
    """The report that the first rank did not make."""
    from torch.distributed import FileStore

    from odysseus_kernels.doctor.examination import so_far
    from odysseus_kernels.doctor.problems import find_problems
    from odysseus_kernels.doctor.report import Problem, Report

    reports = tuple(so_far(FileStore(meet, -1), rank) for rank in range(ranks))
    if code is None:
        how = f"did not end within {_limit_s(options):g} s"
    else:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    doing = f"; it was last at: {reports[0].stage}" if reports[0].stage else ""
    remedy = "see what it printed above, and look for the out-of-memory killer (dmesg)"
    lost = Problem("error", f"The first rank {how}{doing}", remedy, (0,))
    report = Report(reports, (lost, *find_problems(reports)))
    _print(report, options.json, sys.stdout)
    return ILL


def _examine(options: argparse.Namespace) -> int:
    """One rank's part."""
    import torch
    import torch.distributed as dist

    from odysseus_kernels.doctor.examination import Examination, termination_raises

    launched = launched_rank()
    if options.meet or launched is None:
        rank, world, local = options.rank, options.ranks, options.rank
    else:
        rank, world, local = launched
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    with _own_output() as output, termination_raises():
        try:
            store = _store(options.meet, rank, world, options.timeout)
        except (RuntimeError, ValueError, OSError) as error:
            where = "the store that the launcher named (MASTER_ADDR, MASTER_PORT)"
            print(f"rank {rank} could not reach {where}: {error}", file=sys.stderr)
            return ILL
        examination = Examination(store, rank, world, local, options.device, options.timeout)
        examination.run()
        status = ILL
        if rank == 0:
            report = examination.collect()
            status = HEALTHY if report.healthy else ILL
            _print(report, options.json, output)
            with contextlib.suppress(RuntimeError):  # the store has ended with the process that served it
                examination.announce(status)
        else:
            status = examination.status(ILL)
        with contextlib.suppress(RuntimeError, ValueError):  # never initialised, or a peer is gone
            dist.destroy_process_group()
    return status


def _store(meet: str | None, rank: int, world: int, timeout_s: float) -> Any:
    import torch.distributed as dist

    if meet is not None:
        return dist.FileStore(meet, world)
    limit = datetime.timedelta(seconds=timeout_s)
    return next(iter(dist.rendezvous("env://", rank, world, timeout=limit)))[0]


@contextlib.contextmanager
def _own_output() -> Iterator[TextIO]:
    """Standard output for the report alone: what libraries print there goes to standard error meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(kept, "w", encoding=sys.stdout.encoding, errors="replace", closefd=False) as output:
            yield output
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _print(report: Report, json_to: str | None, output: TextIO) -> None:
    if json_to == "-":
        print(report.to_json(), file=output, flush=True)
        return
    if json_to is not None:
        Path(json_to).write_text(report.to_json() + "\n")
    try:
        from odysseus_kernels.doctor.tables import print_report
    except ImportError as error:  # a report without its tables says more than none
        print(f"no tables ({error}): pip install rich", file=sys.stderr)
        print(report.to_json(), file=output, flush=True)
        return
    print_report(report, output)
    output.flush()
