#!/usr/bin/env python
"""How much communication the fused operators hide: ``python benchmarks/overlap.py``.

Starts its own ranks, or is one when torchrun started it.  Every row has the operator's products alone, its
communication alone, and the operator unfused and fused on each transport, beside a twin of raw torch collectives.  A
result that is wrong has no time.  Writes all samples to benchmarks/results/<machine>/ and a plot beside them.

``--level layer`` and ``--level model`` measure a decoder layer, or a small whole model, under every strategy, beside
its compute without communication and what a user would pick instead (``layers.py``).

``--hosts 2 --link h100-nvlink@8`` runs two ranks on two hosts made on this machine, whose link is as slow against one
thread as NVLink is against an H100 of eight: a scale model (``scale/``, docs/scale_model.md).

``--timeline`` draws who computes, waits, sends and receives when, in an operator and a layer (``timeline/``); also with
``--hosts``.

With ``--device cuda`` and a single GPU, one rank of eight is measured against emulated links instead, in bfloat16
(``emulated.py``): --ranks, --threads, --dtype, --transports and --full are for real ranks.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script runs from a checkout, installed or not

# What draws and prints is imported where it is used: runs on GPUs do without rich and matplotlib.
from benchmarks.common import machine
from benchmarks.common.cases import Size
from benchmarks.common.rows import ROWS_FILE
from benchmarks.device import emulated
from benchmarks.layers import run as layer_run
from benchmarks.operators.cases import make_cases
from benchmarks.operators.workload import TRANSPORTS
from benchmarks.scale import run as scale_run
from benchmarks.timeline import run as timeline_run
from odysseus_kernels.testing.spawn import RankPool, RanksFailedError

if TYPE_CHECKING:
    from benchmarks.layers.ranks import LayerSettings
    from benchmarks.operators.apart import Apart
    from benchmarks.operators.workload import Settings

SCHEMA = 1
RUN_LIMIT_S = 3600.0 * 4
_RESULTS = Path(__file__).resolve().parent / "results"
_QUIET_LOAD = 0.7
_CONTRACT = "2 ranks with 1 thread each, float32"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program with usage on a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start (ignored under torchrun)")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads of each rank")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument(
        "--repeats", type=int, help="rounds that are measured (default 9; 5 with --quick; more on a GPU)"
    )
    parser.add_argument("--cases", default="", metavar="REGEX", help="only rows whose name this is found in")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--output", type=Path, help="folder of the results (default benchmarks/results/<machine>)")
    emulated.add_options(parser)
    layer_run.add_options(parser)
    scale_run.add_options(parser)
    timeline_run.add_options(parser)
    parser.set_defaults(load_before=os.getloadavg()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="short shapes, fewer rounds: under a minute on two cores")
    size.add_argument("--full", action="store_true", help="the models' true widths: long, and gigabytes for each rank")
    parsed = parser.parse_args(arguments)
    parsed.command_line = list(sys.argv[1:] if arguments is None else arguments)
    parsed.size = "quick" if parsed.quick else "full" if parsed.full else "default"
    timeline_run.check_options(parser, parsed)
    scale_run.check_options(parser, parsed)
    layer_run.check_options(parser, parsed)
    alone = parsed.device == "cuda" and "RANK" not in os.environ and torch.cuda.device_count() < 2
    parsed.emulated = alone and not parsed.memory
    if parsed.row_limit is not None and not parsed.emulated and (parsed.level != "operator" or parsed.memory):
        parser.error("--row-limit: it is for times of operators")
    if parsed.measure != parser.get_default("measure") and parsed.device == "cpu":
        parser.error("--measure: expected --device cuda beside it")
    if parsed.repeats is None and not parsed.emulated:
        parsed.repeats = 5 if parsed.quick else 9
    for name in ("ranks", "threads", "repeats"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    return parsed


def make_settings(arguments: argparse.Namespace, world_size: int) -> Settings | LayerSettings:
    """What ranks are told.  ValueError if no row or nothing to time is left."""
    if arguments.level != "operator":
        settings = layer_run.make_layer_settings(arguments, world_size)
        return scale_run.on_hosts(settings) if arguments.hosts else settings
    from benchmarks.operators.workload import Settings, check_variants

    check_variants(arguments.variants, arguments.transports)
    size: Size = arguments.size
    return Settings(
        rows=tuple(make_cases(world_size, size, arguments.cases)),
        dtype=arguments.dtype,
        device=arguments.device,
        repeats=arguments.repeats,
        transports=tuple(arguments.transports),
        memory=arguments.memory,
        count_bytes=arguments.hosts is not None,
        variants=arguments.variants,
    )


def describe_run(arguments: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """What is written of every run: where, when, and with which options."""
    names = ("threads", "dtype", "repeats", "cases", "transports", "device", "size")
    given = {"ranks": world_size, **{name: getattr(arguments, name) for name in names}}
    return {
        "schema": SCHEMA,
        "kind": "memory" if arguments.memory else "overlap",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe_machine(arguments.device),
        "load_before": round(arguments.load_before, 2),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "arguments": given,
    }


def make_document(arguments: argparse.Namespace, world_size: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is written to the JSON file."""
    from benchmarks.operators import report

    common = describe_run(arguments, world_size)
    if arguments.level != "operator":
        return layer_run.make_layer_document(arguments, rows, common)
    if arguments.memory:
        rows, verdicts = list(rows), report.judge_memory(rows)
    else:
        rows = [report.summarize(row) for row in rows]
        verdicts = report.judge(rows)
    return {**common, "rows": rows, "targets": verdicts}


def print_document(document: dict[str, Any]) -> None:
    """The tables, as wide on a terminal as in a file; where rich is missing, a line that says so."""
    if importlib.util.find_spec("rich") is None:
        print("rich is not installed: no tables; all figures and verdicts are in the JSON file")
        return
    from rich.console import Console

    from benchmarks.operators import report

    console = Console(width=report.WIDTH, highlight=False)
    given, place = document["arguments"], document["machine"]
    console.print(
        f"{given['ranks']} ranks with {given['threads']} thread(s) each, {given['dtype']}, {given['device']}; "
        f"{place['processor']}, {place['cores']} cores, {place['memory_gib']} GiB; "
        f"torch {document['versions']['torch']}, commit {document['commit']}"
        + ("" if document["kind"] == "memory" else f"; {given['repeats']} rounds"),
        soft_wrap=True,
    )
    notes = []
    if document["kind"] != "memory":  # limits of memory hold for all shapes and ranks
        if given["size"] == "quick":
            notes.append("quick: shapes are shorter than the contract's")
        if (given["ranks"], given["threads"], given["dtype"]) != (2, 1, "float32"):
            notes.append(f"limits are for {_CONTRACT}")
        if given["ranks"] * given["threads"] > place["cores"] and given["device"] == "cpu":
            notes.append("more threads than cores: ranks disturb one another")
        if document["load_before"] > _QUIET_LOAD:
            notes.append(f"the machine was busy: load {document['load_before']} before this run")
    note = "; ".join(notes)
    if document["kind"] == "memory":
        report.print_memory(console, document["rows"], document["targets"], note=note)
        return
    contract = (given["ranks"], given["threads"], given["dtype"]) == (2, 1, "float32")
    judged = contract and given["size"] != "quick"
    if document["kind"] != "overlap":
        layer_run.print_document(console, document, note=note, judged=judged)
        return
    report.print_time(console, document["rows"], document["targets"], note=note, judged=judged)


def write(document: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the JSON file and, for times, the plot, or says that matplotlib is missing; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    path = folder / f"{document['kind']}-{stamp}.json"
    path.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")
    if document["kind"] == "memory":
        return [path]
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plot")
        return [path]
    from benchmarks.layers import plot as layer_plot
    from benchmarks.operators import plot
    from benchmarks.scale import plot as scale_plot

    image = path.with_suffix(".png")
    draw = {"overlap": plot.draw, "scale": scale_plot.draw}.get(document["kind"], layer_plot.draw)
    draw(document, image)
    return [path, image]


def measure_rows(rank: int, world_size: int, settings: Settings | LayerSettings) -> list[dict[str, Any]]:
    """What each rank runs."""
    from benchmarks.operators.run import run_rows
    from benchmarks.operators.workload import Settings

    if isinstance(settings, Settings):
        return run_rows(rank, world_size, settings)
    from benchmarks.layers.ranks import run_layer_rows

    return run_layer_rows(rank, world_size, settings)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: errors that are one become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def finish(
    arguments: argparse.Namespace, world_size: int, rows: Sequence[dict[str, Any]], apart: Apart | None = None
) -> int:
    """Prints and writes; returns the exit status: 1 if any result was wrong, or a row of a run apart failed."""
    document = make_document(arguments, world_size, rows)
    if apart is not None:
        document |= {"failed": apart.failed, "not_run": apart.not_run, "interrupted": apart.interrupted}
    print_document(document)
    folder = arguments.output or _RESULTS / machine.machine_tag(arguments.device)
    print("\n" + "\n".join(f"wrote {os.path.relpath(path)}" for path in write(document, folder)))
    wrong = any(row.get("wrong") for row in document["rows"])
    return int(wrong or (apart is not None and bool(apart.failed or apart.interrupted)))


def run_apart(arguments: argparse.Namespace, pool: RankPool, settings: Settings) -> int:
    """Rows of real ranks, each with a limit of its own: a hang costs one, and what ended is in a file already."""
    from benchmarks.operators.apart import measure_apart
    from benchmarks.overlap import measure_rows as run

    folder = arguments.output or _RESULTS / machine.machine_tag(arguments.device)
    folder.mkdir(parents=True, exist_ok=True)
    path, deadline = folder / ROWS_FILE.format("links"), time.monotonic() + arguments.budget
    done = measure_apart(pool, run, settings, path, limit_s=arguments.row_limit, deadline=deadline)
    for row in done.failed:
        print(f"{row['name']}: failed: {row['failed']}", file=sys.stderr, flush=True)
    if done.not_run:
        why = "interrupted" if done.interrupted else "for lack of time"
        print(f"not run, {why}: {len(done.not_run)} rows, the first {done.not_run[0]}", file=sys.stderr, flush=True)
    if not done.rows:
        return 1
    return finish(arguments, pool.world_size, done.rows, done)


def run_under_torchrun(arguments: argparse.Namespace) -> int:
    """This process is one rank."""
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo" if arguments.device == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        rows = measure_rows(rank, world_size, make_settings(arguments, world_size))
        return finish(arguments, world_size, rows) if rank == 0 else 0
    finally:
        dist.destroy_process_group()


def run_scale_model(arguments: argparse.Namespace) -> int:
    """This process is a rank on one of the hosts, or starts them."""
    settings = make_settings(arguments, scale_run.HOSTS)
    if arguments.report_fd is not None:
        return scale_run.run_rank(arguments, lambda rank, size: measure_rows(rank, size, settings))
    count = len(settings.rows)
    print(f"{count} rows on {scale_run.HOSTS} hosts; {arguments.size} shapes", file=sys.stderr, flush=True)
    document = scale_run.run(arguments, Path(__file__).resolve(), describe_run(arguments, scale_run.HOSTS))
    folder = arguments.output or _RESULTS / machine.machine_tag(arguments.device)
    print("\n" + "\n".join(f"wrote {os.path.relpath(path)}" for path in write(document, folder)))
    return int(any(row["wrong"] for part in document["parts"] for row in part["rows"]))


def main() -> int:
    """Runs the benchmark; times decide nothing about the exit status, wrong results do."""
    arguments = parse()
    if arguments.timeline is not None:
        ranks = int(os.environ.get("WORLD_SIZE", arguments.ranks))
        return timeline_run.run(arguments, Path(__file__).resolve(), describe_run(arguments, ranks), _RESULTS)
    if arguments.hosts:
        try:
            return run_scale_model(arguments)
        except (ValueError, scale_run.HostsError) as error:
            print(error, file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    if "RANK" in os.environ:
        return run_under_torchrun(arguments)
    if arguments.emulated:
        return emulated.run(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false", file=sys.stderr)
        return 2
    try:
        settings = make_settings(arguments, arguments.ranks)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    count = len(settings.rows)
    print(f"{count} rows on {arguments.ranks} ranks; {arguments.size} shapes", file=sys.stderr, flush=True)
    backend = "gloo" if arguments.device == "cpu" else "cpu:gloo,cuda:nccl"
    # Else the profiler, which counts memory, greets for each call and warns of what was allocated before.
    quiet = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment = quiet if arguments.memory or arguments.level != "operator" else {}
    # Ranks import what they run by its module's name, which this file has not while it is the program.
    from benchmarks.overlap import measure_rows as run

    pool = RankPool(
        arguments.ranks, threads=arguments.threads, timeout=RUN_LIMIT_S, backend=backend, environment=environment
    )
    with pool:
        if arguments.row_limit is not None:
            return run_apart(arguments, pool, settings)
        try:
            rows = pool.run(run, settings)[0]
        except RanksFailedError as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130  # as a shell reports it; nothing is written, because half a run is no result
    return finish(arguments, arguments.ranks, rows)


if __name__ == "__main__":
    sys.exit(main())
