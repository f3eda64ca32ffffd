"""What one GPU can tell about overlap: ``python benchmarks/overlap.py --device cuda``.

One rank runs the operators as they are; its peers are silent, and what they hold arrives over an *emulated* link.
Every row has the products alone (cuBLAS), the link alone, the operator unfused, fused and as one kernel of tiles, and
the limit that no overlap can beat: the longer of the first two.  A result that is wrong has no time.  Beside the
operators, the kernels are compared with the library.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine
from benchmarks.common.measure import EventTimer, host_seconds, median, take_turns
from benchmarks.common.rows import ROWS_FILE
from benchmarks.device import isolated, kernels
from benchmarks.device import report as emulated_report
from benchmarks.device.cases import DEFAULT_LINKS, WORLD, EmulatedCase, make_emulated_cases
from benchmarks.device.predictions import predicted_seconds
from benchmarks.device.workload import MODES, EmulatedWorkload, Emulation, emulate, fake_group
from odysseus_kernels import _ext
from odysseus_kernels.planner.scale import LINKS
from odysseus_kernels.testing.virtual_devices import link_of

__all__ = ["add_options", "measure_case", "run"]

SCHEMA = 1
KIND = "emulated"
ROUNDS, QUICK_ROUNDS = 15, 7
MEASURED = ("kernels", "links")
_CHOICE_ROUNDS = 3
_RESULTS = Path(__file__).resolve().parents[1] / "results"

Timed = Callable[[Callable[[], Any]], tuple[float, Any]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that only a run on one GPU has."""
    parser.add_argument(
        "--link",
        nargs="+",
        default=list(DEFAULT_LINKS),
        metavar="LINK",
        help='emulated links of a run on one GPU: "paced:<GB/s>" within its memory, "pcie" from and to pinned memory; '
        f"with --hosts, what joins them, one run for each: {', '.join(LINKS)} with @ and the modelled number of ranks "
        "behind it, or a rate: 120mbit, 1gbit, or a number of Mb/s",
    )
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no row on GPUs after so long"
    )
    parser.add_argument(
        "--row-limit",
        type=float,
        metavar="SECONDS",
        help="measure each row on one GPU in a process of its own, or on several by ranks that are started anew behind "
        "a row that failed; a row is ended after so long, and written to a file as it ends",
    )
    parser.add_argument(
        "--measure", nargs="+", choices=MEASURED, default=list(MEASURED), help="what a run on one GPU measures"
    )


def why_unusable() -> str:
    """One line that says why nothing can be measured here; empty where it can."""
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is false"
    if not _ext.has_cuda():
        return _ext.why_no_cuda()
    return str(_ext.load().cuda.why_unavailable())


# ---- one row ---------------------------------------------------------------------------------------------------------


def measure_case(
    case: EmulatedCase,
    emulation: Emulation,
    *,
    rounds: int,
    timed: Timed,
    synchronize: Callable[[], None],
    seed: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Samples and errors of all variants of one row.

    Args:
        case: the row.
        emulation: of the link that the row is for.
        rounds: rounds that are measured.
        timed: makes a call and returns (seconds, result); an :class:`EventTimer` is also told to stay ahead.
        synchronize: waits for the device; raises if a wait there gave up.
        seed: of the inputs.
        **options: for :class:`EmulatedWorkload`.
    """
    work = EmulatedWorkload(case, emulation, seed=seed, **options)
    calls = work.calls()
    host_s = host_seconds(calls, synchronize)
    work.fill()
    if isinstance(timed, EventTimer):
        timed.stay_ahead(max(host_s.values()))
    calls, pieces = _with_best_pieces(calls, timed, synchronize)
    errors: dict[str, dict[str, float]] = {}
    for name in MODES:
        if name in calls:
            work.spoil()
            results = calls[name]()
            synchronize()
            errors[name] = work.errors(results)
            if case.scatters:
                errors[name]["sent"] = work.sent_error()

    def check(name: str, results: Sequence[torch.Tensor]) -> None:
        if name in errors:
            for what, error in work.errors(results).items():
                errors[name][what] = max(errors[name][what], error, key=lambda e: (e != e, e))

    right = {name: call for name, call in calls.items() if not _is_wrong(errors.get(name, {}), work.tolerance)}
    samples = take_turns(right, rounds=rounds, barrier=lambda: None, synchronize=synchronize, last=check, timed=timed)
    wrong = [name for name, found in errors.items() if _is_wrong(found, work.tolerance)]
    return {
        **dataclasses.asdict(case),
        "name": case.name,
        "shape": case.shape,
        "rows": case.rows,
        "judged": case.judged,
        "flops": case.flops,
        "link_bytes": case.link_bytes,
        "link_is": "emulated",
        "tolerance": work.tolerance,
        "errors": errors,
        "wrong": wrong,
        "impossible": work.impossible,
        "pieces": pieces,
        "host_s": host_s,
        # A time of a wrong result is no time.
        "samples_s": {name: values for name, values in samples.items() if name not in wrong},
    }


def _with_best_pieces(
    calls: Mapping[str, Callable[[], Any]], timed: Timed, synchronize: Callable[[], None]
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Of each mode's variants the fastest, under the mode's name, and in how many pieces it cuts a chunk.

    They are chosen by samples of their own, as ``mode="auto"`` does, not by those that are reported.
    """
    variants = {name: call for name, call in calls.items() if name.partition("/")[0] in MODES}
    samples = take_turns(variants, rounds=_CHOICE_ROUNDS, barrier=lambda: None, synchronize=synchronize, timed=timed)
    chosen = {name: call for name, call in calls.items() if name not in variants}
    pieces = {}
    for mode in MODES:
        names = [name for name in variants if name.partition("/")[0] == mode]
        if names:
            best = min(names, key=lambda name: median(samples[name]))
            chosen[mode], pieces[mode] = calls[best], best.partition("/")[2] or "auto"
    return chosen, pieces


def _is_wrong(errors: dict[str, float], tolerance: float) -> bool:
    return not all(error <= tolerance for error in errors.values())


# ---- a run -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Run:
    """What a run has so far."""

    device: torch.device
    rounds: int
    deadline: float
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failed: list[dict[str, str]] = dataclasses.field(default_factory=list)
    not_run: list[str] = dataclasses.field(default_factory=list)

    def measure(self, cases: Sequence[EmulatedCase]) -> None:
        """All rows, link by link within each length, so that the last ones are missing if time runs out."""
        timer = EventTimer(self.device)
        with fake_group(WORLD) as group:
            for link, same in itertools.groupby(cases, key=lambda case: case.link):
                left = list(same)
                while left:  # an emulation in which a row failed may be broken: the next row gets a new one
                    try:
                        with emulate(self.device, group, link, left) as emulation:
                            while left and self._one(left.pop(0), emulation, timer):
                                pass
                    except Exception as error:  # noqa: BLE001  # whatever failed, other links may do better
                        text = f"the link could not be emulated: {error}"
                        self.failed += [{"name": case.name, "failed": text} for case in left]
                        left.clear()

    def _one(self, case: EmulatedCase, emulation: Emulation, timer: EventTimer) -> bool:
        """Measures a row; false if it failed."""
        if time.monotonic() > self.deadline:
            self.not_run.append(case.name)
            return True
        begin = time.monotonic()

        def synchronize() -> None:
            torch.cuda.synchronize(self.device)

        try:
            row = measure_case(case, emulation, rounds=self.rounds, timed=timer, synchronize=synchronize)
            emulation.transport.synchronize()
        except Exception as error:  # noqa: BLE001  # Triton's errors have no other base; the next row may do better
            self.failed.append({"name": case.name, "failed": f"{type(error).__name__}: {error}"})
            print(f"{case.name}: {error}", file=sys.stderr, flush=True)
            return False
        self.rows.append(_summary(case, row, self.device))
        with contextlib.suppress(RuntimeError):  # the device may be what failed; the next row will say so
            torch.cuda.empty_cache()
        print(f"{case.name} ({time.monotonic() - begin:.1f} s)", file=sys.stderr, flush=True)
        return True


def _summary(case: EmulatedCase, row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A row as it is written: with figures, and what was predicted for it."""
    row["predicted_s"] = predicted_seconds(case, torch.cuda.get_device_name(device), row["pieces"])
    return emulated_report.summarize(row)


def measure_alone(case: EmulatedCase, rounds: int) -> dict[str, Any]:
    """One row on the current device, in a process that measures no other; and how its copies ran."""
    device = torch.device("cuda", torch.cuda.current_device())

    def synchronize() -> None:
        torch.cuda.synchronize(device)

    with fake_group(WORLD) as group, emulate(device, group, case.link, [case]) as emulation:
        row = measure_case(case, emulation, rounds=rounds, timed=EventTimer(device), synchronize=synchronize)
        emulation.transport.synchronize()
        return {"row": _summary(case, row, device), "copies": _how_copies_ran()}


def _measure_separately(
    arguments: argparse.Namespace, cases: Sequence[EmulatedCase], folder: Path, done: _Run, measured: kernels.Measured
) -> None:
    """All rows, each in a process of its own."""
    jobs, rounds, quick = [], done.rounds, arguments.quick
    if "kernels" in arguments.measure:
        jobs += [
            isolated.Job(name, kernels.measure_named, (name, rounds, quick)) for name in kernels.problem_names(quick)
        ]
    if "links" in arguments.measure:
        jobs += [isolated.Job(case.name, measure_alone, (case, rounds)) for case in cases]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ROWS_FILE.format("-".join(arguments.measure))
    copies = set()
    try:
        for outcome in isolated.measure_each(
            jobs, path, limit_s=arguments.row_limit, deadline=done.deadline, preload=[__name__]
        ):
            print(
                f"{outcome.name}: {outcome.failed or 'measured'} ({outcome.seconds:.1f} s)", file=sys.stderr, flush=True
            )
            if outcome.failed:
                done.failed.append({"name": outcome.name, "failed": outcome.failed})
            elif "row" in outcome.result:
                done.rows.append(outcome.result["row"])
                copies.add(outcome.result["copies"])
            else:
                measured.rows.append(outcome.result)
    finally:
        done.not_run += isolated.read_rows(path)[1]
        measured.notes += [kernels.note_multicast(0), *sorted(copies)]


def make_document(arguments: argparse.Namespace, done: _Run, measured: kernels.Measured) -> dict[str, Any]:
    """Everything that is written to the JSON file."""
    return {
        "schema": SCHEMA,
        "kind": kind_of(arguments),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe_machine("cuda"),
        "versions": versions(),
        "commit": machine.commit(),
        "arguments": {
            "ranks": WORLD,
            "dtype": "bfloat16",
            "repeats": done.rounds,
            "links": list(arguments.link),
            "cases": arguments.cases,
            "quick": arguments.quick,
            # Queues of the device: with few of them, streams wait for one another.
            "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "default"),
        },
        "rows": done.rows,
        "kernels": measured.rows,
        "targets": emulated_report.judge(done.rows) + emulated_report.judge_kernels(measured.rows),
        "failed": done.failed + measured.failed,
        "not_run": done.not_run + measured.not_run,
        "notes": measured.notes,
    }


def kind_of(arguments: argparse.Namespace) -> str:
    """Of the document, by what was measured."""
    return KIND if "links" in arguments.measure else "library"


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {**machine.versions(), "cuda": str(torch.version.cuda)}
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "not installed"
    return found


def _how_copies_ran() -> str:
    """Whether copy engines made the copies; known once some were tried."""
    reason = _ext.load().cuda.why_no_batch_copies()
    return f"Copies do not run on copy engines: {reason}" if reason else "Copies run on copy engines."


def _measure_here(
    arguments: argparse.Namespace, cases: Sequence[EmulatedCase], done: _Run, measured: kernels.Measured
) -> None:
    """All rows in this process."""
    if "kernels" in arguments.measure:
        options: dict[str, Any] = {"rounds": done.rounds, "quick": arguments.quick, "deadline": done.deadline}
        kernels.measure(done.device, measured=measured, **options)
    try:
        if "links" in arguments.measure:
            done.measure(cases)
    finally:
        measured.notes.append(_how_copies_ran())


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints, writes; 0, 1 if a result was wrong or a row failed, 2 if nothing can be measured."""
    try:
        for link in arguments.link:
            link_of(link)
        cases = make_emulated_cases(arguments.link, arguments.cases, quick=arguments.quick)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    reason = why_unusable()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    rounds = arguments.repeats or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    done = _Run(torch.device("cuda", torch.cuda.current_device()), rounds, time.monotonic() + arguments.budget)
    measured, interrupted = kernels.Measured(), False
    folder = arguments.output or _RESULTS / machine.machine_tag("cuda")
    try:
        if arguments.row_limit is not None:
            _measure_separately(arguments, cases, folder, done, measured)
        else:
            _measure_here(arguments, cases, done, measured)
    except KeyboardInterrupt:
        interrupted = True
        named = {row["name"] for row in (*done.rows, *done.failed)} | set(done.not_run)
        if "links" in arguments.measure:
            done.not_run += [case.name for case in cases if case.name not in named]
        measured.notes.append("INTERRUPTED: these are the rows that were there.")
        print("interrupted: what was measured so far is kept", file=sys.stderr, flush=True)
    document = make_document(arguments, done, measured)
    emulated_report.print_document(document)
    paths = emulated_report.write(document, folder)
    print("\n" + "\n".join(f"wrote {path}" for path in paths))
    wrong = any(row["wrong"] for row in document["rows"]) or any(row["share"] is None for row in document["kernels"])
    return int(bool(interrupted or wrong or document["failed"]))


def main() -> int:
    """The command line of a run on one GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one sequence length and fewer rounds")
    parser.add_argument("--repeats", type=int, help=f"rounds that are measured (default {ROUNDS}; {QUICK_ROUNDS})")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only rows whose name this is found in")
    parser.add_argument("--output", type=Path, help="folder of the results (default benchmarks/results/<machine>)")
    add_options(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
