"""Rates of a machine from layers that were timed on it: products, attention, what a layer costs besides, and the link.

With n layers, F_p operations in products and F_a in attention, what is kept for backward passing the memory at its
rate, a step without communication takes

    F_p / product rate + F_a / attention rate + n · overhead + memory pass

One shape gives one rate, of which attention keeps its usual part; two give both; three or more the overhead as well.
The fit is of relative errors, and a term that would be negative is left out.  What the link reaches is the bytes of an
unfused step over what it took longer than its compute alone.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from odysseus_kernels.planner.cost_model import MEMORY_SHARE, PRODUCT_SHARE
from odysseus_kernels.planner.formulas import LayerShape
from odysseus_kernels.planner.planning.machines import Machine
from odysseus_kernels.planner.planning.models import ModelSizes
from odysseus_kernels.planner.planning.split_memory import layer_saved
from odysseus_kernels.planner.planning.splits import Split

__all__ = ["LayerRates", "layer_rates", "reached_link", "row_model"]

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LayerRates:
    """What layers reach.

    Attributes:
        product: of their products, FLOP/s.
        attention: of attention, FLOP/s.
        overhead_s: of each layer, forward and backward.
        shapes: how many different ones were timed.
    """

    product: float
    attention: float
    overhead_s: float
    shapes: int


def row_model(row: Row) -> ModelSizes:
    """The model of a row of ``--level layer`` or ``model``; a layer has no head, and no vocabulary."""
    shape = LayerShape(row["hidden"], row["intermediate"], row["heads"], row["kv_heads"], row["hidden"] // row["heads"])
    return ModelSizes(row["level"], shape, row["layers"], row["vocabulary"] if row["level"] == "model" else 0)


def layer_rates(rows: Sequence[Row], machine: Machine, element_size: int) -> LayerRates | None:
    """Rates from the variants without communication of rows of ``--level layer`` or ``model``; None without any.

    Args:
        rows: as they stand in a results file.
        machine: whose memory rate and share of attention are taken.
        element_size: bytes of activations.
    """
    terms: list[tuple[float, float, float]] = []
    seconds: list[float] = []
    shapes = set()
    memory_rate = machine.device.memory_bytes_per_s * MEMORY_SHARE
    for row in rows:
        model = row_model(row)
        attention = model.layers * 7.0 * row["tokens"] ** 2 * model.layer.query / row["world"]
        for name, variant in row["variants"].items():
            if variant["kind"] != "alone" or not row["samples_s"].get(name):
                continue
            ring = variant["ring"]
            split = Split(variant["strategy"], row["world"] // ring, ring)
            kept = model.layers * layer_saved(model, split, tokens=row["tokens"], element_size=element_size)
            took = statistics.median(row["samples_s"][name]) - 2 * kept / memory_rate
            if took <= 0:
                continue
            terms.append((row["flops_per_rank"] - attention, attention, float(model.layers)))
            seconds.append(took)
            shapes.add((row["tokens"], model))
    if not terms:
        return None
    return _fit(np.array(terms), np.array(seconds), machine, len(shapes))


def _fit(terms: Any, seconds: Any, machine: Machine, shapes: int) -> LayerRates:
    for count in range(min(shapes, 3), 1, -1):  # the overhead is left out first; without both rates, one for all
        found, *_ = np.linalg.lstsq(terms[:, :count] / seconds[:, None], np.ones(len(seconds)), rcond=None)
        if (found > 0).all():
            product, attention, *overhead = found.tolist()
            return LayerRates(1 / product, 1 / attention, sum(overhead), shapes)
    # Attention at its usual part of what products reach.
    part = machine.attention_share / PRODUCT_SHARE
    rate = statistics.median((terms[:, 0] + terms[:, 1] / part) / seconds)
    return LayerRates(rate, rate * part, 0.0, shapes)


def reached_link(rows: Sequence[Row]) -> float | None:
    """Bytes/s that unfused layers reach on a link whose rate was set, the median of all; None where none is found."""
    found = []
    for row in rows:
        for entry in row["entries"]:
            variant = row.get("variants", {}).get(entry["name"], {})
            if variant.get("mode") == "unfused" and entry["bytes"] and entry["alone_s"]:
                waited = entry["median_s"] - entry["alone_s"]
                if waited > 0:
                    found.append(entry["bytes"] / waited)
    return statistics.median(found) if found else None
