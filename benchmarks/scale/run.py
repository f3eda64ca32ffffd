"""``--hosts 2`` of overlap.py: options, the ranks on their hosts, and what is made of their rows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from benchmarks.scale.hosts import (
    CONGESTION_CONTROL,
    FRAME_BYTES,
    HOSTS,
    INTERFACE,
    HostsError,
    ask_hosts,
    check_machine,
    parse_rate,
)
from odysseus_kernels.planner.scale import LINKS, parse_link, scaled_rate

if TYPE_CHECKING:
    from benchmarks.layers.ranks import LayerSettings

__all__ = [
    "HOSTS",
    "HostsError",
    "add_options",
    "ask_ranks",
    "check_options",
    "find_links",
    "link_rates",
    "on_hosts",
    "run",
    "run_rank",
]

Rows = list[dict[str, Any]]

_PIECES = 8
_RUN_LIMIT_S = 3600.0 * 4
_RATE_LIMIT_S = 120.0
_UNLIMITED = 1e10  # for what sends nothing
# Else the profiler greets for each call.
_QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the scale model; ``--link`` is there already (``emulated.py``), and names what stands for a link."""
    group = parser.add_argument_group("scale model: two hosts on this machine (Linux, root)")
    group.add_argument("--hosts", type=int, choices=(HOSTS,), help="hosts, of one core and one rank each")
    group.add_argument("--report-fd", type=int, help=argparse.SUPPRESS)


def check_options(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """Ends the program with usage where options do not go together; sets what the model has no choice of."""
    if parsed.hosts is None:
        modelled = [link for link in parsed.link if "@" in link]
        if modelled:
            parser.error(f"--link {modelled[0]}: expected --hosts {HOSTS} beside it")
        if parsed.link != parser.get_default("link") and parsed.device == "cpu":
            parser.error(f"--link {parsed.link[0]}: expected --hosts {HOSTS} or --device cuda beside it")
        return
    if parsed.link == parser.get_default("link"):
        parser.error(f"--hosts: expected --link beside it, such as --link {next(iter(LINKS))}@8 or --link 120mbit")
    try:
        for link in parsed.link:
            _check_link(link)
    except ValueError as error:
        parser.error(f"--link: {error}")
    fixed = {"ranks": HOSTS, "threads": 1, "dtype": "float32", "device": "cpu", "memory": False}
    for name, value in fixed.items():
        if getattr(parsed, name) != value:
            parser.error(f"--hosts: expected --{name} {value}, got {getattr(parsed, name)}")
    if parsed.level == "model":
        parser.error("--hosts: expected --level operator or layer, got model")
    if parsed.level == "layer" and parsed.pipeline is None:
        parsed.pipeline = _PIECES
    if "collective" not in parsed.transports:
        parser.error("--hosts: expected --transports collective, for hosts share no memory, got symmetric")
    parsed.transports = ["collective"]


def _check_link(text: str) -> None:
    if _is_rate(text):
        parse_rate(text)
    else:
        parse_link(text)


def _is_rate(text: str) -> bool:
    return text[:1].isdigit()


def on_hosts(settings: LayerSettings) -> LayerSettings:
    """Without memory, whose steps would wait for the link, and with the bytes that the link's interface counts."""
    return dataclasses.replace(settings, memory=False, interface=INTERFACE)


def run_rank(arguments: argparse.Namespace, measure: Callable[[int, int], Any]) -> int:
    """This process is the rank of a host: measures, and hands what rank 0 found to the launcher, as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        found = measure(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
    with os.fdopen(arguments.report_fd, "w", encoding="utf-8") as report:
        if int(os.environ["RANK"]) == 0:
            json.dump(found, report)
    return 0


def link_rates(links: Sequence[str], flops: float | None) -> list[dict[str, Any]]:
    """What is known of each link: ``label``, ``title``, ``bits_per_s`` and ``formula``, empty for a plain rate.

    Args:
        links: as on the command line.
        flops: F' of one thread; None where all links are plain rates.

    Raises:
        ValueError: an unknown link.
    """
    found = []
    for text in links:
        if _is_rate(text):
            rate, formula, label = parse_rate(text), "", f"{parse_rate(text) / 1e6:g} Mb/s"
        else:
            scaled = scaled_rate(text, flops=flops or 0.0)
            rate, formula, label = scaled.bytes_per_s * 8, scaled.formula, scaled.label
        title = f"scale model of {label}, {HOSTS} hosts"
        found.append({"label": label, "title": title, "bits_per_s": rate, "formula": formula})
    return found


def measure_thread_rate() -> float:
    """F': what one thread reaches in fp32 products with both hosts busy, the slower host's, FLOP/s.

    Raises:
        HostsError: the hosts could not be made, or gave no rates.
    """
    codes, text = ask_hosts(_UNLIMITED, ["-m", "benchmarks.scale.rate"], environment=_paths(), timeout=_RATE_LIMIT_S)
    if any(codes) or len(text.split()) != HOSTS:
        raise HostsError(f"the rate of a thread's products was not measured: exit codes {codes}, got {text!r}")
    return min(float(line) for line in text.split())


def find_links(links: Sequence[str]) -> tuple[float | None, list[dict[str, Any]]]:
    """F', if a link's rate follows from it, and :func:`link_rates` of ``links``.

    Raises:
        HostsError: hosts cannot be made here.
    """
    check_machine()
    flops = None if all(map(_is_rate, links)) else measure_thread_rate()
    return flops, link_rates(links, flops)


def ask_ranks(link: dict[str, Any], program: Path, command_line: Sequence[str]) -> Any:
    """Runs overlap.py, ``program``, on two hosts that ``link`` joins; returns what :func:`run_rank` handed over.

    Raises:
        HostsError: a rank failed.
    """
    print(f"{link['title']}: {link['bits_per_s'] / 1e6:.0f} Mb/s", file=sys.stderr, flush=True)
    command = [str(program), *command_line]
    codes, text = ask_hosts(link["bits_per_s"], command, environment={**_paths(), **_QUIET}, timeout=_RUN_LIMIT_S)
    if any(codes) or not text:
        raise HostsError(f"{link['title']}: ranks ended with {codes}; their messages are above")
    return json.loads(text)


def run(arguments: argparse.Namespace, program: Path, common: dict[str, Any]) -> dict[str, Any]:
    """Measures over every link and prints the tables; returns what is written.

    Args:
        arguments: of overlap.py.
        program: overlap.py, which is also what ranks run.
        common: what every document says.

    Raises:
        HostsError: hosts cannot be made here, or a rank failed.
    """
    from benchmarks.scale import report

    flops, links = find_links(arguments.link)
    parts = []
    for link in links:
        found: Rows = ask_ranks(link, program, arguments.command_line)
        rows = [report.summarize(row, link["bits_per_s"]) for row in found]
        carried = {"frame_bytes": FRAME_BYTES, "congestion_control": CONGESTION_CONTROL}
        parts.append({**link, **carried, "rows": rows})
    names = ("level", "strategies", "pipeline", "shapes", "variants", "link")
    given = {**common["arguments"], **{name: getattr(arguments, name) for name in names}}
    document = {**common, "kind": "scale", "arguments": given, "thread_flops": flops, "parts": parts}
    report.print_document(document)
    return document


def _paths() -> dict[str, str]:
    """Ranks import what this process does, installed or not."""
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
