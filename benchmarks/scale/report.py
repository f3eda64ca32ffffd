"""Figures and tables of the scale model: every variant's time beside what the link and the compute allow."""

from __future__ import annotations

import math
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.measure import interquartile_spread, median

__all__ = ["print_document", "summarize"]

Row = dict[str, Any]

WIDTH = 200

FOOTER = """\
time: median over the rounds of the slower rank's; ± is the distance of the quartiles over the median.
alone: the compute of one rank without communication (of a peer: of the strategy nearest to it; of operators: products).
wire: bytes that the recorder counts on the rank that sends most / the set rate (of a peer: bytes of the nearest
strategy's formula with gathered inputs kept). limit = max(alone, wire), where both are known. x limit: median of the
ratios within rounds. interface: bytes that the link's end has sent, with headers; Gloo's own reduce-scatter, which
peers call, sends twice what it has to. A link that has rested passes a first burst at once: what sends less than that
can be faster than wire. Gloo's messages, TCP and the pair of interfaces run on the same two cores as the products."""


def summarize(row: Row, bits_per_s: float) -> Row:
    """Adds ``entries``: for each variant its median, its compute alone, its time on the wire, and the limit.

    Args:
        row: of either level, as ranks hand it back.
        bits_per_s: of the link.
    """
    entries = []
    is_layer = "variants" in row
    for name, values in row["samples_s"].items():
        base = row["variants"][name]["alone"] if is_layer else "gemm"
        count = _bytes(row, name)
        if name == base:
            continue
        wire = None if count is None else count * 8 / bits_per_s
        without_compute = name.startswith("communication")
        alone = None if without_compute else row["samples_s"].get(base)
        entry: Row = {
            "name": name,
            "median_s": median(values),
            "spread": interquartile_spread(values),
            "bytes": count,
            "interface_bytes": row.get("interface_bytes", {}).get(name),
            "alone_s": None if alone is None else median(alone),
            "wire_s": wire,
        }
        if wire is not None and (without_compute or alone is not None):
            floor = [max(wire, seconds) for seconds in alone or [0.0] * len(values)]
            entry["limit_s"] = median(floor)
            entry["over_limit"] = statistics.median(a / b for a, b in zip(values, floor, strict=True))
        entries.append(entry)
    return {**row, "entries": entries}


def _bytes(row: Row, name: str) -> int | None:
    """Bytes that one rank sends, of payload."""
    if "variants" not in row:
        sent = row["bytes"]
        found = sent.get(name) or next(iter(sent.values()), None)  # the collectives alone move the same
        return None if name == "gemm" else found
    if name in row["peer_bytes"]:
        return int(row["peer_bytes"][name])
    entry = row["bytes"].get(name)
    return None if entry is None else sum(entry["recorded"].values()) + sum(entry["beside"].values())


def describe(row: Row) -> str:
    """The row in words."""
    if "variants" in row:
        what = "layer" if row.get("layers", 1) == 1 else f"{row['layers']} layers"
        return f"{what} {row['label']}, {row['sizes']}: forward + backward"
    return f"{row['operator']} {row['label']}, {row['shape']}: {row['part']}"


def print_document(document: Row) -> None:
    """The tables of every link."""
    console = Console(width=WIDTH, highlight=False)
    given, place = document["arguments"], document["machine"]
    console.print(
        f"{given['ranks']} hosts of one core and one thread, {given['dtype']}; {place['processor']}, {place['cores']} "
        f"cores; torch {document['versions']['torch']}, commit {document['commit']}; {given['repeats']} rounds; load "
        f"{document['load_before']} before this run",
        soft_wrap=True,
    )
    for part in document["parts"]:
        if part["formula"]:
            console.print(f"\n{part['label']}: {part['formula']}", soft_wrap=True)
        for row in part["rows"]:
            console.print(_table(part, row))
            for name, reason in row.get("refused", {}).items():
                console.print(f"  {name}: {reason}", style="dim", soft_wrap=True)
    console.print(FOOTER, style="dim", soft_wrap=True)


def _table(part: Row, row: Row) -> Table:
    title = f"\n{part['title']} ({part['bits_per_s'] / 1e6:.0f} Mb/s): {describe(row)}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    columns = ("time, ms", "alone, ms", "wire, ms", "limit, ms", "x limit", "sent, MiB", "interface, MiB", "error")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name in row["wrong"]:
        table.add_row(f"  {name}", "[red]WRONG[/red]", *[""] * 6, f"[red]{_error(row, name)}[/red]")
    for entry in row["entries"]:
        table.add_row(
            f"  {entry['name']}",
            f"{entry['median_s'] * 1e3:.1f}±{entry['spread']:.0%}",
            _milliseconds(entry["alone_s"]),
            _milliseconds(entry["wire_s"]),
            _milliseconds(entry.get("limit_s")),
            f"{entry['over_limit']:.3f}" if "over_limit" in entry else "",
            _mib(entry["bytes"]),
            _mib(entry["interface_bytes"]),
            _error(row, entry["name"]),
        )
    return table


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.2f}"


def _error(row: Row, name: str) -> str:
    errors = row["errors"].get(name)
    if not errors:
        return ""
    return f"{max(math.inf if math.isnan(float(e)) else float(e) for e in errors.values()):.1e}"
