#!/usr/bin/env python
"""Ratios over all rounds of several runs: ``python benchmarks/pooled.py results/layer-*.json``.

On a shared machine the median of one run moves by more than what is measured.  Every ratio here is within a round, in
which both variants ran, so rounds of different runs can be taken together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Pooled", "pool"]

Document = dict[str, Any]


class Pooled(NamedTuple):
    """The time of one variant over that of another, in all rounds that had both.

    Attributes:
        sizes: the layer, and the ranks.
        variant, base: names of the two.
        low, median, high: quartiles of the ratios.
        rounds, runs: how many.
    """

    sizes: str
    variant: str
    base: str
    low: float
    median: float
    high: float
    rounds: int
    runs: int


def pool(documents: Sequence[Document]) -> list[Pooled]:
    """Each variant over its compute alone, over its unfused self, and fused Odysseus over torch's peers.

    Raises:
        ValueError: if the runs are of other kinds or not of one machine, number of threads and dtype.
    """
    settings = set()
    ratios: dict[tuple[str, str, str], list[list[float]]] = {}
    for document in documents:
        if document.get("kind") != "layer":
            raise ValueError(f'expected results of kind "layer", got {document.get("kind")!r}')
        arguments = document["arguments"]
        settings.add((document["machine"]["processor"], document["machine"]["instructions"], arguments["threads"]))
        for row in document["rows"]:
            where, samples = f"{row['sizes']}, {row['world']} ranks, {row['dtype']}", row["samples_s"]
            for variant, base in _pairs(row):
                found = [a / b for a, b in zip(samples[variant], samples[base], strict=True)]
                ratios.setdefault((where, variant, base), []).append(found)
    if len(settings) > 1:
        raise ValueError(f"expected runs of one machine with as many threads, got {sorted(settings)}")
    pooled = []
    for names, runs in ratios.items():
        together = [ratio for run in runs for ratio in run]
        low, middle, high = (
            statistics.quantiles(together, n=4, method="inclusive") if len(together) > 1 else together * 3
        )
        pooled.append(Pooled(*names, low, middle, high, len(together), len(runs)))
    return pooled


def _pairs(row: Document) -> list[tuple[str, str]]:
    """What is compared within a row: both have right results."""
    timed, variants = row["samples_s"], row["variants"]
    peers = [name for name, variant in variants.items() if variant["kind"] == "peer"]
    pairs = []
    for name, variant in variants.items():
        if variant["kind"] != "ours":
            continue
        pairs.append((name, variant["alone"]))
        if variant["mode"] == "fused":
            pairs.append((name, name.replace(" fused ", " unfused ")))
            pairs += [(name, peer) for peer in peers if variant["transport"] == "symmetric"]
    return [(name, base) for name, base in pairs if name in timed and base in timed]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table; 2 for files that cannot be taken together."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="files that overlap.py --level layer has written")
    arguments = parser.parse_args(argv)
    try:
        pooled = pool([json.loads(path.read_text()) for path in arguments.results])
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "variant", "over", "median", "quartiles", "rounds", "runs", box=None)
    for row in sorted(pooled):
        spread = f"{row.low:.2f}-{row.high:.2f}"
        table.add_row(row.sizes, row.variant, row.base, f"{row.median:.3f}", spread, str(row.rounds), str(row.runs))
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
