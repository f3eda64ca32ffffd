"""From measured rows of one GPU with emulated links to figures, verdicts and tables; needs no GPU.

Tables are Markdown, which a terminal shows well enough; with rich installed they get its layout.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.measure import hidden_share, interquartile_spread, median
from benchmarks.device.cases import JUDGED_ROWS, KERNEL_TARGETS, TARGETS, EmulatedTarget
from benchmarks.device.predictions import PREDICTED
from odysseus_kernels.testing.virtual_devices import link_of

__all__ = ["draw", "judge", "judge_kernels", "markdown", "print_document", "summarize", "write"]

Row = dict[str, Any]

COLUMNS = (
    "GEMM ms",
    "link ms",
    "link GB/s",
    "serial ms",
    "fused ms",
    "tiles ms",
    "limit ms",
    "fused/limit",
    "hidden",
    "host ms",
    "host/fused",
    "error",
)
PREDICTIONS = "Predicted by the cost model beside measured (in parentheses: measured / predicted)"
_LEAST_OF_NOMINAL = 0.9
"""Share of a paced link's nominal rate below which its rows are marked."""

HOST_LIMIT = 1.0
"""Of the host's time over the device's, for kernels by themselves."""

FOOTER = (
    "One rank of {world} on one GPU; its peers are silent and the links are EMULATED: paced:<GB/s> copies within the "
    "GPU's memory at that rate, both directions together; pcie copies from and to pinned host memory at the bus's "
    "speed. GEMM: the operator's products on whole operands by torch.mm (cuBLAS). link: the operator's copies, waits "
    "and sums with no products. serial: unfused on the same transport. limit: max(GEMM, link). hidden: (serial - "
    "fused) / min(GEMM, link). fused and tiles: with the number of pieces in a chunk that was fastest beforehand, as "
    'mode="auto" chooses it. serial in the backward pass of all_gather_linear makes a product for each chunk. '
    "link GB/s: all bytes over the link's time; a paced link that reached less than 0.9 of its rate is marked, and its "
    "row is not judged. Within one GPU its multiprocessors copy, which a real link would leave to the product. host "
    "ms: what the host takes to enqueue the fused call; host/fused above 1 keeps the device idle. "
    "Medians of {repeats} rounds by CUDA events, caches cold, the host ahead of the device; "
    "± is the distance of the quartiles over the median. error: largest relative Frobenius error of any variant."
)


def summarize(row: Row) -> Row:
    """Adds medians, the limit and the figures to a row of samples; figures whose variants have no time are None."""
    medians = {name: median(values) for name, values in row["samples_s"].items()}
    spreads = {name: interquartile_spread(values) for name, values in row["samples_s"].items()}
    gemm, link = (medians.get(name) for name in ("gemm", "link"))
    limit = max(gemm, link) if gemm is not None and link is not None else None
    figures: dict[str, float | None] = dict.fromkeys(("fused / limit", "tiles / limit", "hidden", "host / fused"))
    host_s = row["host_s"].get(_variant(row, "fused"))
    if host_s is not None and "fused" in medians:
        figures["host / fused"] = host_s / medians["fused"]
    if limit is not None and gemm is not None and link is not None:
        for name in ("fused", "tiles"):
            if name in medians:
                figures[f"{name} / limit"] = medians[name] / limit
        if "fused" in medians and "serial" in medians:
            figures["hidden"] = hidden_share(
                unfused=medians["serial"], fused=medians["fused"], gemm=gemm, communication=link
            )
    rate = None if link is None else row["link_bytes"] / link
    return {
        **row,
        "medians_s": medians,
        "spreads": spreads,
        "limit_s": limit,
        "figures": figures,
        "link_bytes_per_s": rate,
        "link_slow": rate is not None and rate < _LEAST_OF_NOMINAL * link_of(row["link"])[1],
    }


def judge(rows: Sequence[Row]) -> list[Row]:
    """Each target with the worst figure of its rows; those without a row are left out.

    A row whose link was slower than asked for is not judged: it says nothing about the link that it names.
    """
    verdicts = []
    for target in TARGETS:
        found = [
            row
            for row in rows
            if row["judged"]
            and not row["link_slow"]
            and (row["operator"], row["phase"]) == (target.operator, target.phase)
        ]
        if found:
            verdicts.append(_verdict(target, found))
    return verdicts


def _verdict(target: EmulatedTarget, rows: Sequence[Row]) -> Row:
    figures = [(row["figures"][target.figure], row) for row in rows]
    measured = [(figure, row) for figure, row in figures if figure is not None]
    missed = len(rows) - sum(target.reached(figure) for figure, _ in measured)
    sign = 1 if target.at_most else -1
    worst, row = max(measured, key=lambda pair: sign * pair[0], default=(None, rows[0]))
    return {
        "what": f"{target.operator} {target.phase}: {target.figure}",
        "relation": "<=" if sign > 0 else ">=",
        "limit": target.limit,
        "measured": worst,
        "shape": f"{row['label']} {row['shape']} {row['link']}",
        "rows": len(rows),
        "rows_missed": missed,
        "reached": missed == 0,
    }


def judge_kernels(rows: Sequence[Row]) -> list[Row]:
    """Each kernel's target with the worst of its rows; those without a row are left out."""
    verdicts = []
    for target in KERNEL_TARGETS:
        found = [row for row in rows if row["kernel"] == target.kernel]
        if not found:
            continue
        missed = sum(row["share"] is None or row["share"] < target.limit for row in found)
        measured = [row for row in found if row["share"] is not None]
        worst = min(measured, key=lambda row: row["share"], default=None)
        verdicts.append(
            {
                "what": f"{target.kernel}: {target.what}",
                "relation": ">=",
                "limit": target.limit,
                "measured": None if worst is None else worst["share"],
                "shape": (worst or found[0])["shape"],
                "rows": len(found),
                "rows_missed": missed,
                "reached": missed == 0,
            }
        )
    return verdicts + _judge_hosts(rows)


def _judge_hosts(rows: Sequence[Row]) -> list[Row]:
    """Whether the host launches kernels faster than the device runs them."""
    found = [row for row in rows if row.get("host / kernel") is not None]
    if not found:
        return []
    worst = max(found, key=lambda row: row["host / kernel"])
    missed = sum(row["host / kernel"] > HOST_LIMIT for row in found)
    return [
        {
            "what": "kernels: host / kernel",
            "relation": "<=",
            "limit": HOST_LIMIT,
            "measured": worst["host / kernel"],
            "shape": f"{worst['kernel']} {worst['shape']}",
            "rows": len(found),
            "rows_missed": missed,
            "reached": missed == 0,
        }
    ]


# ---- text ------------------------------------------------------------------------------------------------------------


def _cells(row: Row) -> list[str]:
    times = {name: _time(row, name) for name in ("gemm", "link", "serial", "fused", "tiles")}
    rate = "" if row["link_bytes_per_s"] is None else f"{row['link_bytes_per_s'] / 1e9:.4g}"
    figures = row["figures"]
    ratio = figures["fused / limit"]
    hidden = figures["hidden"]
    return [
        f"{row['operator']} {row['phase']}",
        f"{row['label']} {row['shape']}",
        f"{row['link']} reached {rate}" if row["link_slow"] else row["link"],
        times["gemm"],
        times["link"],
        rate,
        times["serial"],
        times["fused"],
        times["tiles"],
        "" if row["limit_s"] is None else f"{row['limit_s'] * 1e3:.3f}",
        "" if ratio is None else f"{ratio:.3f}",
        "" if hidden is None else f"{hidden:.0%}",
        _host_ms(row["host_s"], _variant(row, "fused")),
        "" if figures["host / fused"] is None else f"{figures['host / fused']:.2f}",
        _error(row),
    ]


def _predicted_cells(row: Row) -> list[str]:
    cells = [f"{row['operator']} {row['phase']}", f"{row['label']} {row['shape']}", row["link"]]
    for name in PREDICTED:
        cells += _beside(row["predicted_s"][name], row["medians_s"].get(name), _time(row, name))
    return cells


def _time(row: Row, name: str) -> str:
    if name in row["wrong"]:
        return "WRONG"
    if name not in row["medians_s"]:
        return "-" if name in row["impossible"] else ""
    return f"{row['medians_s'][name] * 1e3:.3f}±{row['spreads'][name]:.0%}"


def _variant(row: Row, mode: str) -> str:
    """Name of the call that was timed for ``mode``, see ``EmulatedWorkload.calls``."""
    pieces = row["pieces"].get(mode, "auto")
    return mode if pieces == "auto" else f"{mode}/{pieces}"


def _host_ms(host_s: dict[str, float], name: str) -> str:
    return f"{host_s[name] * 1e3:.3f}" if name in host_s else ""


def _error(row: Row) -> str:
    errors = [error for found in row["errors"].values() for error in found.values()]
    return f"{max(errors, key=lambda e: (e != e, e)):.1e}" if errors else ""  # a NaN is the worst


def _kernel_cells(row: Row) -> list[str]:
    share = "WRONG" if row["share"] is None else f"{row['share']:.3f}"
    tried = row.get("tried_s", {})
    host_ms = _host_ms(row["host_s"], "kernel")
    chosen = min(tried, key=tried.__getitem__) if tried else ""
    return [row["kernel"], row["shape"], row["speed"], row["library"], share, host_ms, chosen]


def _predicted_kernel_cells(row: Row) -> list[str]:
    cells = [row["kernel"], row["shape"]]
    for name in ("kernel", "library"):
        cells += _beside(row["predicted_s"][name], row["medians_s"].get(name), "WRONG")
    return cells


def _beside(predicted: float, measured: float | None, otherwise: str) -> list[str]:
    """Milliseconds of a prediction, and of what was measured or why nothing was."""
    ratio = otherwise if measured is None else f"{measured * 1e3:.3f} ({measured / predicted:.2f})"
    return [f"{predicted * 1e3:.3f}", ratio]


def _target_cells(verdict: Row) -> list[str]:
    measured = "no figure" if verdict["measured"] is None else f"{verdict['measured']:.3f}"
    missed = f"missed in {verdict['rows_missed']} of {verdict['rows']}"
    outcome = f"reached in all {verdict['rows']}" if verdict["reached"] else missed
    limit = f"{verdict['relation']} {verdict['limit']}"
    return [verdict["what"], limit, measured, outcome, verdict["shape"]]


def _tables(document: Row) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    if document["rows"]:
        names = ["operator", "shape", "emulated link", *COLUMNS]
        yield "Operators over emulated links", names, [_cells(row) for row in document["rows"]]
    predicted = [row for row in document["rows"] if row.get("predicted_s")]
    if predicted:
        names = ["operator", "shape", "emulated link"]
        for name in PREDICTED:
            names += [f"{name} predicted ms", "measured"]
        yield PREDICTIONS, names, [_predicted_cells(row) for row in predicted]
    if document["kernels"]:
        names = ["kernel", "shape", "kernel's", "library's", "kernel/library", "host ms", "tiles"]
        yield "Kernels", names, [_kernel_cells(row) for row in document["kernels"]]
    predicted = [row for row in document["kernels"] if row.get("predicted_s")]
    if predicted:
        names = ["kernel", "shape", "kernel predicted ms", "measured", "library predicted ms", "measured"]
        title = f"Kernels: {PREDICTIONS[0].lower()}{PREDICTIONS[1:]}"
        yield title, names, [_predicted_kernel_cells(row) for row in predicted]
    if document["targets"]:
        names = ["must reach (worst row)", "limit", "measured", "outcome", "worst row"]
        yield "Targets", names, [_target_cells(verdict) for verdict in document["targets"]]


def _notes(document: Row) -> list[str]:
    given = document["arguments"]
    notes = [FOOTER.format(world=given["ranks"], repeats=given["repeats"])] if document["rows"] else []
    notes.append(f"Operators are judged where chunks have at least {JUDGED_ROWS} rows and the link reached its rate.")
    slow = sum(row["judged"] and row["link_slow"] for row in document["rows"])
    if slow:
        notes.append(f"Not judged: {slow} rows whose link was slower than it says.")
    reasons = {(name, why) for row in document["rows"] for name, why in row["impossible"].items()}
    notes += [f"{name} -: {why}" for name, why in sorted(reasons)]
    notes += [f"Failed: {row['name']}: {row['failed']}" for row in document["failed"]]
    if document["not_run"]:
        notes.append(f"Not run for lack of time: {len(document['not_run'])} rows, the first {document['not_run'][0]}")
    return [*notes, *document["notes"]]


def _headline(document: Row) -> str:
    place, versions = document["machine"], document["versions"]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    queues = f"CUDA_DEVICE_MAX_CONNECTIONS {document['arguments']['CUDA_DEVICE_MAX_CONNECTIONS']}"
    return f"{document['date']}; {', '.join(place.get('gpus', []))}; {listed}; commit {document['commit']}; {queues}"


def markdown(document: Row) -> str:
    """The document as Markdown."""
    lines = [_headline(document), ""]
    for title, names, rows in _tables(document):
        aligned = ["---" if index < 3 else "---:" for index in range(len(names))]
        lines += [f"## {title}", ""]
        lines += ["| " + " | ".join(cells) + " |" for cells in (names, aligned, *rows)]
        lines.append("")
    return "\n".join([*lines, *(f"{note}\n" for note in _notes(document))])


def print_document(document: Row) -> None:
    """The tables, with rich's layout where rich is installed."""
    if importlib.util.find_spec("rich") is None:
        print(markdown(document))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=240, highlight=False, markup=False)
    console.print(_headline(document), soft_wrap=True)
    for title, names, rows in _tables(document):
        table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False)
        for index, name in enumerate(names):
            table.add_column(Text(name), justify="left" if index < 3 else "right", no_wrap=True)
        for cells in rows:
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
    for note in _notes(document):
        console.print(note, style="dim", soft_wrap=True)


def draw(document: Row, path: str) -> bool:
    """A PNG of fused, tiles and serial over the limit; says whether matplotlib is there to draw it."""
    if importlib.util.find_spec("matplotlib") is None or not document["rows"]:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in document["rows"] if row["limit_s"]]
    figure, axis = plt.subplots(figsize=(10, 2 + 0.5 * len(rows)))
    for index, (name, color) in enumerate((("serial", "#9dc3e6"), ("fused", "#1f4e79"), ("tiles", "#c55a11"))):
        found = [(place, row) for place, row in enumerate(rows) if name in row["medians_s"]]
        ratios = [row["medians_s"][name] / row["limit_s"] for _, row in found]
        axis.barh([place + (index - 1) * 0.27 for place, _ in found], ratios, 0.25, label=name, color=color)
    axis.axvline(1.0, color="black", linewidth=1, linestyle="--")
    names = [f"{row['operator']} {row['phase']}\n{row['label']} {row['shape']} {row['link']}" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("time / max(GEMM, link)")
    axis.set_title(f"{', '.join(document['machine'].get('gpus', []))}: one rank of many, EMULATED links", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def write(document: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the JSON file, the table, and the plot where matplotlib is; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    path = folder / f"{document['kind']}-{stamp}.json"
    path.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")
    table = path.with_suffix(".md")
    table.write_text(markdown(document))
    image = path.with_suffix(".png")
    return [path, table, *([image] if draw(document, str(image)) else [])]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: errors that are one become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
