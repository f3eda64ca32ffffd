"""Rates of compute and link from a results file of ``benchmarks/overlap.py``, in place of a data sheet's.

============  ===================================================  =====================================================
kind          compute                                              link
============  ===================================================  =====================================================
``overlap``   operations of a row over its product alone (gemm)    bytes of a forward row over its communication alone
``emulated``  the same                                             none: its link is emulated
``layer``,    of products and of attention, and what a layer       none
``model``     costs besides: ``calibration.py``, from compute
              alone
``scale``     the same; without layers what one thread reaches     what unfused layers reach of the rate that it was set
                                                                   to; without layers that rate
============  ===================================================  =====================================================

Of operators the median over rows.  The model takes shares of rates (``cost_model.PRODUCT_SHARE``); what is measured is
what was reached, and is divided by them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from odysseus_kernels.planner.cost_model import LINK_SHARE, PRODUCT_SHARE
from odysseus_kernels.planner.hardware import hardware_for
from odysseus_kernels.planner.planning.calibration import layer_rates, reached_link
from odysseus_kernels.planner.planning.machines import Machine

__all__ = ["with_measured"]

_KINDS = ("overlap", "emulated", "layer", "model", "scale")
_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def with_measured(machine: Machine, path: str | Path, dtype: str) -> tuple[Machine, list[str]]:
    """The machine with what a results file has measured, and a sentence for each figure that is taken from it or not.

    Raises:
        ValueError: the file is no results file, or one of another kind of device than the machine's.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"measured: expected a results file of benchmarks/overlap.py: {error}") from error
    except ValueError as error:
        raise ValueError(f"measured: expected JSON in {path}: {error}") from error
    if not isinstance(document, dict) or document.get("kind") not in _KINDS:
        kind = document.get("kind") if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"measured: expected {path} of a kind among {', '.join(_KINDS)}, got {kind!r}")
    try:
        return _replaced(machine, document, Path(path).name, dtype)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"measured: {path} is no complete results file: {type(error).__name__} {error}") from error


def _replaced(machine: Machine, document: Mapping[str, Any], name: str, dtype: str) -> tuple[Machine, list[str]]:
    _check_device(machine, document)
    device, notes = machine.device, []
    used = document["arguments"]["dtype"]
    layers = layer_rates(_layer_rows(document), machine, _SIZES[used])
    if used != dtype:
        notes.append(f"compute: that of the table: {name} was measured in {used}, not in {dtype}")
    elif layers is not None:
        peak = layers.product / PRODUCT_SHARE
        device = dataclasses.replace(device, flops={**device.flops, dtype: peak})
        machine = dataclasses.replace(
            machine, attention_share=layers.attention / peak, layer_overhead_s=layers.overhead_s
        )
        notes.append(
            f"compute: products {layers.product / 1e12:.4g} TFLOP/s, attention {layers.attention / 1e12:.4g} TFLOP/s "
            f"in {dtype}, {layers.overhead_s * 1e3:.3g} ms for each layer besides; whole layers without communication, "
            f"{layers.shapes} shapes (measured, {name})"
        )
    else:
        rate, what = _compute(document)
        device = dataclasses.replace(device, flops={**device.flops, dtype: rate / PRODUCT_SHARE})
        notes.append(f"compute: {rate / 1e12:.4g} TFLOP/s in {dtype}, {what} (measured, {name})")
    link, what = _link(document)
    network = machine.network_bytes_per_s
    if link is None:
        notes.append(f"link: that of the table: {what}")
    else:
        if network == device.link_bytes_per_s:  # one link for all ranks, as in the scale model
            network = link / LINK_SHARE
        device = dataclasses.replace(device, link_bytes_per_s=link / LINK_SHARE)
        notes.append(f"link within a host: {link / 1e9:.4g} GB/s, {what} (measured, {name})")
    return dataclasses.replace(machine, device=device, network_bytes_per_s=network), notes


def _check_device(machine: Machine, document: Mapping[str, Any]) -> None:
    gpus = document["machine"].get("gpus") or []
    on_gpu = bool(gpus) and document["arguments"].get("device", "cuda") != "cpu"
    measured = hardware_for(gpus[0]).name if on_gpu else "CPU"
    expected = "CPU" if machine.device.name.startswith(("CPU", "scale model")) else machine.device.name
    if measured != expected:
        raise ValueError(f"measured: expected figures of {expected} for {machine.name}, got those of {measured}")


def _layer_rows(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of whole layers or models; none in a file of operators."""
    rows = document["rows"] if "rows" in document else [row for part in document["parts"] for row in part["rows"]]
    return [row for row in rows if "variants" in row]


def _compute(document: Mapping[str, Any]) -> tuple[float, str]:
    if document["kind"] == "scale":
        rate = document["thread_flops"]
        if rate is None:
            raise ValueError("measured: expected rows of layers, or a link by name, beside which a thread is timed")
        return float(rate), "products of one thread"
    found = [row.get("flops_per_rank", row.get("flops")) / row["medians_s"]["gemm"] for row in document["rows"]]
    if not found:
        raise ValueError("measured: expected rows with products alone, got none")
    return statistics.median(found), f"products alone, median of {len(found)}"


def _link(document: Mapping[str, Any]) -> tuple[float | None, str]:
    kind = document["kind"]
    if kind == "scale":
        rates = {part["bits_per_s"] / 8 for part in document["parts"]}
        if len(rates) > 1:
            return None, f"{len(rates)} links were set"
        reached = reached_link(_layer_rows(document))
        return (rates.pop(), "the rate that it was set to") if reached is None else (reached, "of unfused layers")
    if kind != "overlap":
        return None, "none was measured" if kind != "emulated" else "the measured one is emulated"
    size, ranks = _SIZES[document["arguments"]["dtype"]], document["arguments"]["ranks"]
    widths = {"all_gather_linear": lambda row: row["inner"], "linear_reduce_scatter": lambda row: sum(row["outer"])}
    by_transport: dict[str, list[float]] = {}
    for row in document["rows"]:
        if row["operator"] not in widths or row["part"] != "forward":
            continue
        sent = (ranks - 1) * (row["tokens"] // ranks) * widths[row["operator"]](row) * size
        for name, seconds in row["medians_s"].items():
            kind, _, transport = name.partition(" ")
            if kind == "communication":
                by_transport.setdefault(transport, []).append(sent / seconds)
    if not by_transport:
        return None, "no row with communication alone"
    rates_of = {transport: statistics.median(found) for transport, found in by_transport.items()}
    best = max(rates_of, key=lambda transport: rates_of[transport])
    return rates_of[best], f"{best} transport, communication alone, median of {len(by_transport[best])}"
