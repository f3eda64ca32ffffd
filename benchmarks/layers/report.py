"""Tables and verdicts of ``--level layer`` and ``--level model``."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.cases import CONTRACT, NEVER_SLOWER
from benchmarks.common.measure import interquartile_spread, median, paired_ratio
from benchmarks.layers import original
from benchmarks.layers.cases import LAYER_TARGETS

__all__ = ["judge_layers", "print_layers", "summarize_layer"]

Row = dict[str, Any]

_MODES = re.compile(" (fused|auto) ")
MEMORY_LIMIT = 0.01
CHECKS_LIMIT = 0.005

FOOTER = """\
alone: the strategy's compute on one rank's share without any communication. A peer's is that of the nearest strategy.
x alone, x unfused: medians of the ratios within rounds. exposed: median of the differences within rounds.
hidden = 1 - exposed / exposed(unfused), on one transport; ? where the unfused one is no slower than alone.
checks: what it takes that the batch says how it was cut and the model compares it, by itself; part of the time.
error: largest relative Frobenius error of output, input gradient and weight gradients against the single process."""

BYTES_FOOTER = """\
Bytes that each rank sends in one step, counted by the recorder, beside the formula of planner/formulas.py for the same
collectives; = where they agree to the byte on every rank and for every operator. beside: positions and
masks, which the formulas leave out.
saved: storages that autograd keeps, parameters left out, beside the formula. peak: most bytes held in a step beside
outputs and gradients. kept: buffers of the transports. The largest over ranks, MiB."""


def summarize_layer(row: Row) -> Row:
    """Adds medians, spreads, and for every variant its ratio to its compute alone and what is exposed."""
    samples = row["samples_s"]
    figures: dict[str, Row] = {}
    for name, values in samples.items():
        found: Row = {"median_s": median(values), "spread": interquartile_spread(values)}
        found["tokens_per_s"] = row["tokens"] / found["median_s"]
        base = row["variants"][name]["alone"]
        if base in samples and base != name:
            found["over_alone"] = paired_ratio(values, samples[base])
            found["exposed_s"] = statistics.median(a - b for a, b in zip(values, samples[base], strict=True))
        figures[name] = found
    for name, found in figures.items():
        unfused = _MODES.sub(" unfused ", name)
        if unfused != name and "exposed_s" in found and unfused in figures:
            found["over_unfused"] = paired_ratio(samples[name], samples[unfused])
            exposed = figures[unfused].get("exposed_s", 0.0)
            found["hidden"] = 1 - found["exposed_s"] / exposed if exposed > 0 else None
    return {**row, "figures": figures}


def _family_and_mode(row: Row, name: str) -> tuple[str, str]:
    variant = row["variants"][name]
    return variant["strategy"], variant["mode"]


def judge_layers(rows: Sequence[Row]) -> list[Row]:
    """Each limit with the figure of this run; those whose cases or variants were not run are left out."""
    verdicts = []
    for target in LAYER_TARGETS:
        for row in rows:
            if (row["label"], row["level"], row["hidden"]) != (CONTRACT, "layer", target.hidden):
                continue
            if not {target.variant, target.base} <= set(row["variants"]):
                continue
            samples = row["samples_s"]
            known = target.variant in samples and target.base in samples
            measured = paired_ratio(samples[target.variant], samples[target.base]) if known else None
            what = f"{target.variant} / {target.base}"
            verdicts.append(_verdict(what, row["sizes"], target.limit, measured))
    found = [
        (figures["over_unfused"], name, row)
        for row in rows
        for name, figures in row["figures"].items()
        if "over_unfused" in figures
    ]
    for family, mode in sorted({_family_and_mode(row, name) for _, name, row in found}):
        own = [(ratio, name, row) for ratio, name, row in found if _family_and_mode(row, name) == (family, mode)]
        ratio, name, row = max(own, key=lambda entry: entry[0])
        missed = sum(entry[0] > NEVER_SLOWER for entry in own)
        where = f"worst of {len(own)}: {name}, {row['sizes']}"
        what = f"every {family}: {mode} / unfused"
        verdicts.append({**_verdict(what, where, NEVER_SLOWER, ratio), "missed": missed})
    counted = [(entry["equal"], name, row) for row in rows for name, entry in row["bytes"].items()]
    if counted:
        unequal = [f"{name}, {row['sizes']}" for equal, name, row in counted if not equal]
        where = f"not so: {'; '.join(unequal)}" if unequal else f"all {len(counted)}"
        verdicts.append(_verdict("bytes that differ from the formula, variants", where, 0, len(unequal)))
    kept = [
        (abs(entry["saved"] / sum(entry["formula"].values()) - 1), name, row)
        for row in rows
        for name, entry in row["memory"].items()
        if "formula" in entry
    ]
    if kept:
        worst, name, row = max(kept, key=lambda entry: entry[0])
        where = f"worst of {len(kept)}: {name}, {row['sizes']}"
        verdicts.append(_verdict("saved for backward: distance from the formula", where, MEMORY_LIMIT, worst))
    shares = [
        (sum(parts.values()) / row["figures"][name]["median_s"], name, row)
        for row in rows
        for name, parts in row.get("checks", {}).items()
    ]
    if shares:
        worst, name, row = max(shares, key=lambda entry: entry[0])
        where = f"worst of {len(shares)}: {name}, {row['sizes']}"
        verdicts.append(_verdict("descriptor and checks / step", where, CHECKS_LIMIT, worst))
    return verdicts


def _verdict(what: str, where: str, limit: float, measured: float | None) -> Row:
    reached = measured is not None and measured <= limit
    return {"what": what, "shape": where, "limit": limit, "measured": measured, "reached": reached}


def print_layers(console: Console, document: Row, *, note: str, judged: bool) -> None:
    """All tables of a run."""
    for row in document["rows"]:
        console.print(_times(row))
        for name, reason in row["refused"].items():
            console.print(f"  {name}: {reason}", style="dim", soft_wrap=True)
    for name, reason in document["absent"].items():
        console.print(f"  {name}: not here: {reason}", style="dim", soft_wrap=True)
    console.print(FOOTER, style="dim", soft_wrap=True)
    for row in document["rows"]:
        console.print(_bytes_and_memory(row))
    console.print(BYTES_FOOTER, style="dim", soft_wrap=True)
    for row in document["rows"]:
        if row["level"] == "layer":
            _print_original(console, row)
    _print_verdicts(console, document["targets"], note, judged)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", vertical="bottom", no_wrap=True)
    return table


def _times(row: Row) -> Table:
    what = "forward + backward" if row["level"] == "layer" else f"step, loss {row['loss']:.4f}"
    title = f"{row['level']} {row['label']}, {row['sizes']}, {row['world']} ranks: {what}"
    columns = ("time, ms", "tokens/s", "x alone", "exposed, ms", "x unfused", "hidden", "checks, µs", "error")
    table = _table(title, columns)
    for name in row["variants"]:
        if name in row["wrong"]:
            table.add_row(f"  {name}", "[red]WRONG[/red]", *[""] * 6, f"[red]{_error(row, name)}[/red]")
            continue
        found = row["figures"].get(name)
        if found is None:
            continue
        hidden = "" if "hidden" not in found else "?" if found["hidden"] is None else f"{found['hidden']:.0%}"
        table.add_row(
            f"  {name}",
            f"{found['median_s'] * 1e3:.1f}±{found['spread']:.0%}",
            f"{found['tokens_per_s']:,.0f}",
            f"{found['over_alone']:.3f}" if "over_alone" in found else "",
            f"{found['exposed_s'] * 1e3:.1f}" if "exposed_s" in found else "",
            f"{found['over_unfused']:.3f}" if "over_unfused" in found else "",
            hidden,
            f"{sum(row['checks'][name].values()) * 1e6:.0f}" if name in row.get("checks", {}) else "",
            _error(row, name),
        )
    return table


def _error(row: Row, name: str) -> str:
    errors = row["errors"].get(name)
    if not errors:
        return ""
    values = [math.inf if math.isnan(float(e)) else float(e) for e in errors.values()]
    return f"{max(values):.1e}"


def _mib(count: float) -> str:
    return f"{count / 2**20:.2f}"


def _by_collective(recorded: dict[str, int]) -> Counter[str]:
    sums: Counter[str] = Counter()
    for name, count in recorded.items():
        sums[name.rsplit(" ", 1)[1]] += count
    return sums


def _bytes_and_memory(row: Row) -> Table:
    collectives = sorted({c for entry in row["bytes"].values() for c in _by_collective(entry["recorded"])})
    columns = [c.replace("_", "-") for c in collectives]
    columns += ["sent", "formula", "", "beside", "saved", "formula", "peak", "gradients", "kept"]
    table = _table(f"{row['level']} {row['label']}, {row['sizes']}: bytes and memory, MiB", columns)
    for name in row["variants"]:
        sent, memory = row["bytes"].get(name), row["memory"].get(name)
        if memory is None:
            continue
        if sent is None:
            cells = [""] * (len(collectives) + 4)
        else:
            sums = _by_collective(sent["recorded"])
            cells = [_mib(sums[c]) if sums[c] else "" for c in collectives]
            cells += [_mib(sum(sums.values())), _mib(sum(sent["formula"].values()))]
            cells += ["=" if sent["equal"] else "[red]≠[/red]", _mib(sum(sent["beside"].values()))]
        formula = memory.get("formula")
        cells += [_mib(memory["saved"]) if memory["saved"] else "", _mib(sum(formula.values())) if formula else ""]
        cells += [_mib(memory["peak"]), _mib(memory["gradients"]), _mib(memory["reserved"])]
        table.add_row(f"  {name}", *cells)
    return table


def _print_original(console: Console, row: Row) -> None:
    """The published table with what was measured under each of its rows."""
    table = Table(
        title=f"\nThe original's table, and what was measured: {row['sizes']}, {row['world']} ranks",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    for column in original.COLUMNS:
        table.add_column(column, no_wrap=True)
    size = {"float64": 8, "float32": 4}.get(row["dtype"], 2)
    L, d, i, world = row["tokens"], row["hidden"], row["intermediate"], row["world"]
    share = (world - 1) / world
    notes = []
    for published in original.ORIGINAL:
        table.add_row(*(f"[bold]{cell}[/bold]" for cell in published.cells))
        claimed = [share * size * f(L, d, i) for f in (published.activations, published.weights)]
        cells = ["", f"{_mib(claimed[0])} MiB", "", f"{_mib(claimed[1])} MiB", "", ""]
        table.add_row("  claimed, x (N-1)/N", *cells)
        for name, sent in row["bytes"].items():
            variant = row["variants"][name]
            if (variant["strategy"], variant["ring"], variant["mode"]) != (published.strategy, 1, "fused"):
                continue
            counts = _calls(sent["recorded"])
            split = original.split_measured(sent["recorded"])
            kept = row["memory"][name]
            table.add_row(
                f"  {name}",
                counts["activations"],
                f"{_mib(split['activations'])} MiB",
                counts["weights"],
                f"{_mib(split['weights'])} MiB",
                f"{_mib(kept['saved'])} MiB",
                f"{_mib(kept['gradients'])} MiB grad",
            )
        notes.append(f"{published.cells[0]}: {published.wrong}.")
    console.print(table)
    for note in (*notes, original.STATEMENT):
        console.print(f"  {note}", style="dim", soft_wrap=True)


def _calls(recorded: dict[str, int]) -> dict[str, str]:
    """Which collectives carry activations, and which weights, by their share of the bytes."""
    short = {"all_gather": "AG", "reduce_scatter": "RS", "all_reduce": "AR", "all_to_all": "A2A", "send_recv": "ring"}
    parts: dict[str, Counter[str]] = {"activations": Counter(), "weights": Counter()}
    for name, count in recorded.items():
        for kind, moved in original.split_measured({name: count}).items():
            if moved:
                collective = name.rsplit(" ", 1)[1]
                parts[kind][short.get(collective, collective)] += moved
    return {kind: " ".join(f"{c} {_mib(n)}" for c, n in sorted(found.items())) for kind, found in parts.items()}


def _print_verdicts(console: Console, verdicts: Sequence[Row], note: str, judged: bool) -> None:
    if not verdicts:
        return
    title = "Must reach" if judged else "For orientation: the limits are for other settings than this run's"
    console.print(f"\n[bold]{title}[/bold]{f'  ({note})' if note else ''}")
    for verdict in verdicts:
        digits = 5 if 0 < verdict["limit"] < MEMORY_LIMIT else 3
        if verdict["measured"] is None:
            outcome, measured = "[red]no figure: wrong result[/red]", "-"
        else:
            outcome = "[green]reached[/green]" if verdict["reached"] else "[red]missed[/red]"
            measured = f"{verdict['measured']:.{digits}f}"
        exact = "bytes" in verdict["what"] or "saved" in verdict["what"]  # these hold for all shapes and ranks
        if not judged and not exact and verdict["measured"] is not None:
            outcome = ""
        elif verdict.get("missed"):
            outcome += f" in {verdict['missed']} of them"
        figure = f"  {measured:>6} (limit {verdict['limit']:.3f})"
        console.print(f"{figure} {outcome}  {verdict['what']}  [dim]{verdict['shape']}[/dim]", soft_wrap=True)
