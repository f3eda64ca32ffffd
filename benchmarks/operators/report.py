"""From measured rows to what people and programs read: figures, verdicts, tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.common.cases import CONTRACT, NEVER_SLOWER
from benchmarks.common.measure import hidden_share, interquartile_spread, median, paired_ratio
from benchmarks.operators.cases import TARGETS, Target
from benchmarks.operators.predictions import PREDICTED
from benchmarks.operators.torch_fused import TORCH_FUSED

if TYPE_CHECKING:  # figures and verdicts do without
    from rich.console import Console
    from rich.table import Table

__all__ = ["MEMORY_LIMIT_CHUNKS", "judge", "judge_memory", "print_memory", "print_time", "summarize"]

WIDTH = 240
"""Most columns of a table; tables are as wide as what they hold, so that a file has all that a terminal shows."""

MEMORY_LIMIT_CHUNKS = 2.0

_FUSED = "fused symmetric"

Row = dict[str, Any]

TIME_FOOTER = """\
GEMM: the operator's matrix products alone, one torch.mm for each, on every rank at once. comm: the same bytes alone.
torch: torch.distributed collectives and torch.mm, NCCL with its own settings on GPUs. torch fused: torch.ops.symm_mem.
sym, coll: symmetric and collective transport.
Each time is the median over the rounds of the slowest rank's; ± is the distance of the quartiles over the median.
Each ratio is the median of the ratios within rounds.
hidden = (unfused - fused) / min(GEMM, comm), of medians, on one transport; ? where the quartiles of fused or unfused
are further apart than all that could be hidden, so that this run cannot tell.
error: largest relative Frobenius error of any variant's output or gradient against fp64 on unsharded data."""

HOST_FOOTER = """\
host: what the slowest rank's host takes to enqueue the fused call of the symmetric transport; host/fused above 1 keeps
the devices idle.  predicted: by the cost model, in parentheses measured / predicted."""

HOST_LIMIT = 1.0
"""Of the host's time over the devices': a host that enqueues more slowly than devices work leaves them idle."""

MEMORY_FOOTER = """\
extra: most bytes held at one moment beside inputs, outputs and gradients (allocations through torch, plus buffers
that the transport keeps), the largest over ranks, in chunks; a chunk is what one rank contributes: L/N rows, or n/N
of a weight. Buffers inside Gloo are not counted, so coll and torch are lower bounds.
largest: biggest single allocation. process: by how much the operating system's peak of the process grew beyond the
results; it also sees what neither torch nor the transport reports, but not shared memory that was there before."""


def summarize(row: Row) -> Row:
    """Adds medians, spreads, ratios and hidden shares to a row of samples."""
    samples = row["samples_s"]
    medians = {name: median(values) for name, values in samples.items()}
    ratios = {}
    for name in samples:
        for base in samples:
            if name != base and not name.startswith("communication") and not base.startswith("communication"):
                ratios[f"{name} / {base}"] = {
                    "paired": paired_ratio(samples[name], samples[base]),
                    "of_medians": medians[name] / medians[base],
                }
    hidden = {}
    for transport in ("symmetric", "collective"):
        names = (f"unfused {transport}", f"fused {transport}", "gemm", f"communication {transport}")
        if all(name in medians for name in names):
            unfused, fused, gemm, communication = (medians[name] for name in names)
            hidden[transport] = hidden_share(unfused=unfused, fused=fused, gemm=gemm, communication=communication)
    spreads = {name: interquartile_spread(values) for name, values in samples.items()}
    enqueued = row.get("host_s", {}).get(_FUSED)
    host = enqueued / medians[_FUSED] if enqueued is not None and _FUSED in medians else None
    return {**row, "medians_s": medians, "spreads": spreads, "ratios": ratios, "hidden": hidden, "host / fused": host}


def judge(rows: Sequence[Row]) -> list[Row]:
    """Each target of the contract with the figure of this run; those whose rows were not run are left out."""
    verdicts = []
    for target in TARGETS:
        for row in rows:
            if (row["label"], row["operator"], row["backward"]) == (CONTRACT, target.operator, target.backward):
                verdicts.append(_verdict(row, target))
    for transport in ("symmetric", "collective"):
        name = f"fused {transport} / unfused {transport}"
        found = [(row["ratios"][name]["paired"], row) for row in rows if name in row["ratios"]]
        if found:
            worst, row = max(found, key=lambda pair: pair[0])
            slower = sum(ratio > NEVER_SLOWER for ratio, _ in found)
            verdicts.append(
                {
                    "what": f"every row: {name}",
                    "shape": f"worst of {len(found)}: {row['operator']} {row['label']} {row['part']}",
                    "limit": NEVER_SLOWER,
                    "measured": worst,
                    "of_medians": row["ratios"][name]["of_medians"],
                    "reached": slower == 0,
                    "rows_missed": slower,
                }
            )
    return verdicts + _judge_hosts(rows)


def _judge_hosts(rows: Sequence[Row]) -> list[Row]:
    """Whether hosts keep ahead of their devices, in the rows of devices."""
    enqueued = [(row["host / fused"], row) for row in rows if row["host / fused"] is not None]
    if not enqueued:
        return []
    worst, row = max(enqueued, key=lambda pair: pair[0])
    missed = sum(ratio > HOST_LIMIT for ratio, _ in enqueued)
    return [
        {
            "what": f"every row: host / {_FUSED}",
            "shape": f"worst of {len(enqueued)}: {row['operator']} {row['label']} {row['part']}",
            "limit": HOST_LIMIT,
            "measured": worst,
            "of_medians": worst,
            "reached": missed == 0,
            "rows_missed": missed,
        }
    ]


def _verdict(row: Row, target: Target) -> Row:
    ratio = row["ratios"].get(f"{target.variant} / {target.base}")
    return {
        "what": f"{row['operator']} {row['part']}: {target.variant} / {target.base}",
        "shape": row["shape"],
        "limit": target.limit,
        "measured": ratio["paired"] if ratio else None,
        "of_medians": ratio["of_medians"] if ratio else None,
        "reached": bool(ratio) and ratio["paired"] <= target.limit,
    }


def judge_memory(rows: Sequence[Row]) -> list[Row]:
    """The contract's memory: at most two chunks with the fused operators on the symmetric transport."""
    verdicts = []
    for row in rows:
        found = row["bytes"].get(_FUSED)
        if found is None:
            continue
        chunks = found["extra"] / row["chunk_bytes"]
        whole = row["operator"] == "zero3_linear" and found["largest_allocation"] >= row["gathered_bytes"]
        verdicts.append(
            {
                "what": f"{row['operator']} {row['part']}: chunks held beside inputs, outputs, gradients",
                "shape": row["shape"],
                "limit": MEMORY_LIMIT_CHUNKS,
                "measured": chunks,
                "holds_weight_whole": whole,
                "reached": chunks <= MEMORY_LIMIT_CHUNKS and not whole,
            }
        )
    return verdicts


def print_time(
    console: Console, rows: Sequence[Row], verdicts: Sequence[Row], *, note: str, judged: bool = True
) -> None:
    """Two tables, of times and of ratios, and the section of targets."""
    columns = (
        "GEMM",
        "comm\nsym",
        "\ncoll",
        "unfused\nsym",
        "fused\nsym",
        "unfused\ncoll",
        "fused\ncoll",
        "torch",
        "torch\nfused",
    )
    names = (
        "gemm",
        *(f"communication {t}" for t in ("symmetric", "collective")),
        *(f"{mode} {t}" for t in ("symmetric", "collective") for mode in ("unfused", "fused")),
        "torch",
        TORCH_FUSED,
    )
    times = _table("time, ms", columns)
    for row in _with_headings(times, rows):
        times.add_row(*_label(row), *(_time(row, name) for name in names))
    ratios = _table(
        "ratio",
        (
            "fused/GEMM\nsym",
            "\ncoll",
            "fused/unfused\nsym",
            "\ncoll",
            "fused sym/\nunfused coll",
            "\ntorch fused",
            "hidden\nsym",
            "\ncoll",
            "error",
        ),
    )
    pairs = (
        ("fused symmetric", "gemm"),
        ("fused collective", "gemm"),
        ("fused symmetric", "unfused symmetric"),
        ("fused collective", "unfused collective"),
        ("fused symmetric", "unfused collective"),
        ("fused symmetric", TORCH_FUSED),
    )
    for row in _with_headings(ratios, rows):
        cells = [_ratio(row, f"{a} / {b}") for a, b in pairs]
        cells += [_hidden(row, transport) for transport in ("symmetric", "collective")]
        ratios.add_row(*_label(row), *cells, _error(row))
    console.print(times, ratios)
    console.print(TIME_FOOTER, style="dim", soft_wrap=True)
    if any(row.get("predicted_s") for row in rows):
        console.print(_devices(rows))
        console.print(HOST_FOOTER, style="dim", soft_wrap=True)
    for reason in _no_torch_fused(rows):
        console.print(reason, style="dim", soft_wrap=True, markup=False)
    _print_targets(console, verdicts, note, "{:.3f}", judged)


def _devices(rows: Sequence[Row]) -> Table:
    """What the host took, and predictions beside what was measured, in milliseconds: rows of devices."""
    names = ("GEMM", "comm\nsym", "unfused\nsym", "fused\nsym")
    columns = [column for name in names for column in (f"{name}\npredicted", "measured")]
    table = _table("host and predictions, ms", ("host\nfused sym", "host/fused", *columns))
    for row in _with_headings(table, [row for row in rows if row.get("predicted_s")]):
        host, ratio = row["host_s"].get(_FUSED), row["host / fused"]
        cells = ["" if host is None else f"{host * 1e3:.3f}", "" if ratio is None else f"{ratio:.2f}"]
        for name in PREDICTED:
            predicted, measured = row["predicted_s"][name], row["medians_s"].get(name)
            beside = "" if measured is None else f"{measured * 1e3:.3f} ({measured / predicted:.2f})"
            cells += [f"{predicted * 1e3:.3f}", beside]
        table.add_row(*_label(row), *cells)
    return table


def print_memory(console: Console, rows: Sequence[Row], verdicts: Sequence[Row], *, note: str) -> None:
    """Extra memory of each variant in chunks, and the section of targets."""
    names = ("unfused symmetric", "fused symmetric", "unfused collective", "fused collective", "torch")
    columns = ("chunk\nMiB", "unfused\nsym", "fused\nsym", "unfused\ncoll", "fused\ncoll", "\ntorch")
    table = _table("extra, chunks", (*columns, "largest\nfused sym", "process\nfused sym", "\ntorch"))
    for row in _with_headings(table, rows):
        chunk, found = row["chunk_bytes"], row["bytes"]
        shown = [(name, "extra") for name in names]
        shown += [(_FUSED, "largest_allocation"), (_FUSED, "process_growth"), ("torch", "process_growth")]
        cells = [
            f"{found[name][what] / chunk:.2f}" if found.get(name, {}).get(what, -1) >= 0 else "" for name, what in shown
        ]
        table.add_row(*_label(row), f"{chunk / 2**20:.1f}", *cells)
    console.print(table)
    console.print(MEMORY_FOOTER, style="dim", soft_wrap=True)
    _print_targets(console, verdicts, note, "{:.2f}")


def _print_targets(console: Console, verdicts: Sequence[Row], note: str, form: str, judged: bool = True) -> None:
    if not verdicts:
        return
    # Limits hold for the shapes and ranks that they were set for; other settings show figures, not verdicts.
    title = "Must reach" if judged else "For orientation: the limits are for other settings than this run's"
    console.print(f"\n[bold]{title}[/bold]{f'  ({note})' if note else ''}")
    for verdict in verdicts:
        if verdict["measured"] is None:
            outcome, measured = "[red]no figure: wrong result[/red]", "-"
        else:
            outcome = "[green]reached[/green]" if verdict["reached"] else "[red]missed[/red]"
            measured = form.format(verdict["measured"])
        if not judged and verdict["measured"] is not None:
            outcome = ""
        elif verdict.get("rows_missed"):
            outcome += f" in {verdict['rows_missed']} rows"
        if verdict.get("holds_weight_whole"):
            outcome += ", holds the weight whole"
        limit = form.format(verdict["limit"])
        line = f"  {measured:>6} (limit {limit}) {outcome}  {verdict['what']}  [dim]{verdict['shape']}[/dim]"
        console.print(line, soft_wrap=True)


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("", ""):
        table.add_column(column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", vertical="bottom", no_wrap=True)
    return table


def _with_headings(table: Table, rows: Sequence[Row]) -> Iterator[Row]:
    """Yields rows, with a heading in the table before each operator's first."""
    previous = None
    for row in rows:
        if row["operator"] != previous:
            table.add_row(f"[bold]{row['operator']}[/bold]")
            previous = row["operator"]
        yield row


def _label(row: Row) -> tuple[str, str]:
    return f"  {row['label']} {'fwd+bwd' if row['backward'] else 'fwd'}", row["shape"]


def _time(row: Row, name: str) -> str:
    if name in row["wrong"]:
        return "[red]WRONG[/red]"
    if name not in row["medians_s"]:
        return ""
    return f"{row['medians_s'][name] * 1e3:.1f}±{row['spreads'][name]:.0%}"


def _no_torch_fused(rows: Sequence[Row]) -> list[str]:
    """Why rows have no time of torch's own fused operators, each reason once."""
    return sorted({f"torch fused: {row['no_torch_fused']}" for row in rows if row.get("no_torch_fused")})


def _ratio(row: Row, name: str) -> str:
    return f"{row['ratios'][name]['paired']:.3f}" if name in row["ratios"] else ""


def _hidden(row: Row, transport: str) -> str:
    if transport not in row["hidden"]:
        return ""
    medians, spreads = row["medians_s"], row["spreads"]
    noise = max(medians[name] * spreads[name] for name in (f"fused {transport}", f"unfused {transport}"))
    hideable = min(medians["gemm"], medians[f"communication {transport}"])
    return f"{row['hidden'][transport]:.0%}" if noise <= hideable else "?"


def _error(row: Row) -> str:
    if row["wrong"]:
        worst = {name: max(row["errors"][name].values(), key=_size) for name in row["wrong"]}
        return "[red]WRONG " + ", ".join(f"{name} {error:.1e}" for name, error in worst.items()) + "[/red]"
    return f"{max((e for found in row['errors'].values() for e in found.values()), key=_size):.1e}"


def _size(error: float) -> float:
    return math.inf if math.isnan(error) else error
