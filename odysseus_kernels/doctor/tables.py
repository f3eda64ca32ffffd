"""The report for people: tables in a terminal, plain text without colours where it is piped."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from odysseus_kernels.doctor.report import Check, Facts, RankReport, Report, rank_numbers

__all__ = ["print_report"]

_PLAIN_WIDTH = 120
# Of these sections all ranks of a host tell the same, up to what changes between two looks.
_OF_HOSTS = ("host", "devices", "network", "shared memory")
_HIDDEN = {"machine", "container"}


def print_report(report: Report, file: TextIO) -> None:
    """Prints the report to ``file``."""
    console = Console(file=file, highlight=False)
    if console.is_terminal:
        _print(console, report)
        return
    console = Console(file=file, highlight=False, width=_PLAIN_WIDTH, no_color=True)
    with console.capture() as captured:
        _print(console, report)
    # Cells are padded to the width of their columns.
    file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _print(console: Console, report: Report) -> None:
    known = [rank for rank in report.ranks if rank.facts]
    for section in known[0].facts if known else ():
        _print_section(console, section, known)
    _print_transports(console, report)
    _print_pairs(console, report)
    _print_checks(console, report)
    _print_problems(console, report)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _show(console: Console, title: str, table: Table, note: str = "") -> None:
    console.print(title, style="bold")
    console.print(table)
    if note:
        console.print(note)
    console.print()


def _print_section(console: Console, section: str, known: list[RankReport]) -> None:
    groups = _by_host(known) if section in _OF_HOSTS else [((rank.rank,), rank.facts) for rank in known]
    table = _table("", "", "")
    table.show_header = False
    ranks: Sequence[int]
    names = dict.fromkeys(name for _, facts in groups for name in facts[section] if name not in _HIDDEN)
    for name in names:
        texts: dict[str, list[int]] = {}
        for ranks, facts in groups:
            texts.setdefault(_text(name, facts[section].get(name)), []).extend(ranks)
        for text, ranks in texts.items():
            if text:
                where = rank_numbers(ranks) if len(texts) > 1 else ""
                table.add_row(_label(name), escape(text), where)
    _show(console, section, table)


def _by_host(known: list[RankReport]) -> list[tuple[tuple[int, ...], Facts]]:
    """Each host's ranks, and what the first of them says in all sections of hosts."""
    hosts: dict[tuple[str, str], list[RankReport]] = {}
    for rank in known:
        hosts.setdefault((rank.facts["host"]["machine"], rank.facts["host"]["container"]), []).append(rank)
    return [(tuple(rank.rank for rank in ranks), ranks[0].facts) for ranks in hosts.values()]


def _label(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _text(name: str, value: Any) -> str:
    shown: Mapping[str, Callable[[Any], str]] = {"interfaces": _interfaces, "gpus": _gpus}
    if name in shown:
        return shown[name](value)
    if name.startswith("why_"):
        return value or ""  # nothing to say where nothing is missing
    if value is None:
        return "unlimited" if name.endswith("_bytes") else "-"
    if name.endswith("_bytes"):
        return _bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {one}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(str(one) for one in value)
    return str(value)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _interfaces(interfaces: list[dict[str, Any]] | None) -> str:
    lines = []
    for one in interfaces or []:
        speed = f", {one['megabits_per_s'] / 1000:g} Gb/s" if one["megabits_per_s"] else ""
        lines.append(f"{one['name']}: {one['ipv4'] or 'no IPv4 address'}, {one['state'] or 'state unknown'}{speed}")
    return "\n".join(lines)


def _gpus(gpus: list[dict[str, Any]] | None) -> str:
    lines = [
        f"{index}: {gpu['name']}, {_bytes(gpu['memory_bytes'])}, compute capability {gpu['compute_capability']}"
        + ("" if gpu["rates_known"] else ", rates not known to the planner")
        for index, gpu in enumerate(gpus or [])
    ]
    return "\n".join(lines) or "no NVIDIA GPU"


def _print_transports(console: Console, report: Report) -> None:
    table = _table("transport", "available", "received by a rank", "latency", "carried by", "slowest")
    for transport in dict.fromkeys(state.transport for rank in report.ranks for state in rank.transports):
        states = [state for rank in report.ranks for state in rank.transports if state.transport == transport]
        rates = [(rate, rank.rank) for rank in report.ranks for rate in rank.rates if rate.transport == transport]
        why_not = next((state.why_not for state in states if not state.available), "")
        row = ["no: " + escape(why_not) if why_not else "yes", "", "", "", ""]
        if rates:
            slowest, rank = min(rates, key=lambda one: one[0].bytes_per_s)
            latency = max(rate.latency_s for rate, _ in rates)
            row[1:] = [
                f"{slowest.bytes_per_s / 1e9:.3g} GB/s",
                f"{latency * 1e6:.0f} µs",
                slowest.carried,
                f"rank {rank}",
            ]
        table.add_row(transport, *row)
    if table.row_count:
        sizes = {rate.shard_bytes for rank in report.ranks for rate in rank.rates}
        note = (
            f"all-gathers of {_bytes(max(sizes))} a rank, for latencies of 4 KiB; medians of the slowest rank"
            if sizes
            else ""
        )
        _show(console, "transports", table, note)


def _print_pairs(console: Console, report: Report) -> None:
    pairs = [pair for rank in report.ranks for pair in rank.pairs]
    count = len(report.ranks) * (len(report.ranks) - 1) // 2
    if count < 2:  # the table of transports says it
        return
    table = _table("transport", "slowest pair", "", "median", "fastest", "pairs")
    for transport in dict.fromkeys(pair.transport for pair in pairs):
        own = sorted((pair for pair in pairs if pair.transport == transport), key=lambda pair: pair.bytes_per_s)
        rates = [pair.bytes_per_s for pair in own]
        figures = (rates[0], statistics.median(rates), rates[-1])
        low, middle, high = (f"{rate / 1e9:.3g} GB/s" for rate in figures)
        slowest = rank_numbers((own[0].first, own[0].second))
        table.add_row(transport, low, slowest, middle, high, f"{len(own)} of {count}")
    if table.row_count:
        note = "what each of two ranks receives from the other, one pair after another; all pairs are in --json"
        _show(console, "between every two ranks", table, note)


def _print_checks(console: Console, report: Report) -> None:
    cells: dict[str, dict[str, list[tuple[Check, int]]]] = {}
    columns: dict[str, None] = {}
    for rank in report.ranks:
        for check in rank.checks:
            column = f"{check.transport} {check.mode}"
            columns.setdefault(column)
            cells.setdefault(check.operator, {}).setdefault(column, []).append((check, rank.rank))
    if not cells:
        return
    table = _table("operator", *columns)
    for operator, row in cells.items():
        table.add_row(operator, *(_cell(row.get(column, [])) for column in columns))
    allowed = max(check.allowed for rank in report.ranks for check in rank.checks)
    _show(
        console,
        "self-test, forward and backward in fp32: largest error beside fp64 on unsharded data",
        table,
        f"relative Frobenius errors of outputs and gradients, all ranks; rounding explains {allowed:.1e}",
    )


def _cell(checks: list[tuple[Check, int]]) -> str:
    if not checks:
        return "not run"
    failed = [rank for check, rank in checks if check.failure]
    if failed:
        return f"[red]no result[/red] ({rank_numbers(failed)})"
    error = max(check.error or 0.0 for check, _ in checks)
    wrong = [rank for check, rank in checks if not check.passed]
    carried = sorted({one for check, _ in checks for one in check.carried if one != check.transport})
    by = f" by {', '.join(carried)}" if carried else ""
    return f"[red]{error:.1e} WRONG[/red] ({rank_numbers(wrong)})" if wrong else f"{error:.1e}{by}"


def _print_problems(console: Console, report: Report) -> None:
    ranks = f"{len(report.ranks)} rank{'s' if len(report.ranks) > 1 else ''}"
    if not report.problems:
        console.print(f"no problems on {ranks}")
        return
    console.print(f"problems on {ranks}", style="bold")
    table = Table.grid(padding=(0, 1, 0, 0))
    for number, problem in enumerate(report.problems, 1):
        where = f" ({rank_numbers(problem.ranks)})" if problem.ranks else ""
        colour = "red" if problem.severity == "error" else "yellow"
        table.add_row(f"{number}.", f"[{colour}]{problem.severity}[/{colour}]{where}: {escape(problem.what)}")
        table.add_row("", f"what to do: {escape(problem.remedy)}")
    console.print(table)
    if report.healthy:
        console.print("everything works; the warnings say what could work better")
