"""Rates that are fitted to layers which took what given rates say, and what too few shapes leave open."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.layers.cases import make_layer_cases
from odysseus_kernels.planner.cost_model import MEMORY_SHARE
from odysseus_kernels.planner.planning.calibration import layer_rates, reached_link, row_model
from odysseus_kernels.planner.planning.machines import Machine, machine_for
from odysseus_kernels.planner.planning.split_memory import layer_saved
from odysseus_kernels.planner.planning.splits import Split

PRODUCT, ATTENTION, OVERHEAD = 60e9, 35e9, 4e-3
SHAPES = ((512, 256), (1024, 512), (4096, 256), (2048, 512))


def machine() -> Machine:
    return machine_for("h100-nvlink@8")


def row(tokens: int, hidden: int, *, strategies: tuple[str, ...] = ("odysseus", "tp_sp"), noise: float = 1.0) -> Any:
    """A row of ``--level layer`` on two ranks that took what the rates above say, times ``noise``."""
    (case,) = make_layer_cases("layer", 2, shapes=[(tokens, hidden)])
    made = {
        "level": "layer", "tokens": case.tokens, "hidden": case.hidden, "intermediate": case.intermediate,
        "heads": case.heads, "kv_heads": case.kv_heads, "layers": 1, "vocabulary": case.vocabulary, "world": 2,
        "flops_per_rank": case.flops(2), "variants": {}, "samples_s": {}, "entries": [],
    }  # fmt: skip
    attention = 7 * case.tokens**2 * case.shape.query / 2
    for strategy in strategies:
        kept = layer_saved(row_model(made), Split(strategy, 2), tokens=case.tokens, element_size=4)
        seconds = (case.flops(2) - attention) / PRODUCT + attention / ATTENTION + OVERHEAD
        seconds += 2 * kept / (machine().device.memory_bytes_per_s * MEMORY_SHARE)
        made["variants"][f"{strategy} alone"] = {"kind": "alone", "strategy": strategy, "ring": 1}
        made["samples_s"][f"{strategy} alone"] = [seconds * noise] * 3
    return made


@pytest.mark.parametrize("count", [3, 4])
def test_enough_shapes_give_all_rates(count: int) -> None:
    found = layer_rates([row(*shape) for shape in SHAPES[:count]], machine(), 4)
    assert found is not None and found.shapes == count
    assert found.product == pytest.approx(PRODUCT, rel=1e-6)
    assert found.attention == pytest.approx(ATTENTION, rel=1e-6)
    assert found.overhead_s == pytest.approx(OVERHEAD, rel=1e-6)


def test_two_shapes_give_two_rates_and_one_gives_one() -> None:
    rows = [row(*shape) for shape in SHAPES[1:3]]
    two = layer_rates(rows, machine(), 4)
    assert two is not None and two.shapes == 2 and two.overhead_s == 0
    # The overhead is in the rates then, which say what both shapes took.
    for each in rows:
        attention = 7 * each["tokens"] ** 2 * each["hidden"] / 2
        products = each["flops_per_rank"] - attention
        took = products / PRODUCT + attention / ATTENTION + OVERHEAD
        assert products / two.product + attention / two.attention == pytest.approx(took, rel=1e-6)
    one = layer_rates(rows[:1], machine(), 4)
    assert one is not None and one.shapes == 1 and one.overhead_s == 0
    assert one.attention / one.product == pytest.approx(machine().attention_share / 0.8)


def test_a_term_that_would_be_negative_is_left_out() -> None:
    """The shortest layers were the fastest by their operations: there is no overhead to be found."""
    rows = [row(*shape, noise=noise) for shape, noise in zip(SHAPES[:3], (0.3, 1.0, 1.0), strict=True)]
    found = layer_rates(rows, machine(), 4)
    assert found is not None and found.overhead_s == 0
    assert found.product > 0 and found.attention > 0


def test_nothing_to_calibrate_from() -> None:
    assert layer_rates([], machine(), 4) is None
    silent = row(512, 256)
    silent["samples_s"] = {}
    assert layer_rates([silent], machine(), 4) is None
    assert reached_link([silent]) is None


def test_what_unfused_layers_reach_of_a_link() -> None:
    entry = {"name": "tp unfused collective", "bytes": 8_000_000, "median_s": 1.5, "alone_s": 0.5}
    fused = {"name": "tp fused collective", "bytes": 8_000_000, "median_s": 0.9, "alone_s": 0.5}
    peer = {"name": "torch TP", "bytes": 8_000_000, "median_s": 9.0, "alone_s": 0.5}
    variants = {entry["name"]: {"mode": "unfused"}, fused["name"]: {"mode": "fused"}, peer["name"]: {"mode": ""}}
    rows = [{"variants": variants, "entries": [entry, fused, peer]}]
    assert reached_link(rows) == pytest.approx(8e6)
