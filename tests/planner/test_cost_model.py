"""Properties of the predictions, and one of each worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odysseus_kernels.planner.cost_model import (
    CHUNK_LOSS,
    LINK_SHARE,
    MEASURED_MARGIN,
    MEMORY_SHARE,
    MODEL_MARGIN,
    MODES,
    PRODUCT_SHARE,
    TILE_LOSS,
    Work,
    link_seconds,
    pick_mode,
    predict,
    product_seconds,
)
from odysseus_kernels.planner.hardware import CPU, GENERIC_GPU, KNOWN_GPUS, Hardware

DEVICES = st.sampled_from((*KNOWN_GPUS, GENERIC_GPU, CPU))
AMOUNTS = st.floats(0, 1e16)
SECONDS = st.floats(0, 1e6)
WORKS = st.builds(
    Work,
    flops=AMOUNTS,
    world=st.integers(1, 64),
    dtype=st.sampled_from(("bfloat16", "float32", "float64")),
    gathered_bytes=AMOUNTS,
    scattered_bytes=AMOUNTS,
    pieces=st.integers(1, 64),
    unfused_local_bytes=AMOUNTS,
    fused_local_bytes=AMOUNTS,
)
# Sums of many orders of magnitude round, in the last place of the largest.
ROUNDING = 1 - 1e-12

SIMPLE = Hardware("simple", {"float32": 1.0 / PRODUCT_SHARE}, 1.0 / MEMORY_SHARE, 1.0 / LINK_SHARE, 0.5, 0.25)


@given(WORKS, DEVICES)
def test_bounds(work: Work, hardware: Hardware) -> None:
    seconds = predict(work, hardware)
    product, link = product_seconds(work, hardware), link_seconds(work, hardware)
    assert min(seconds.values()) > 0
    assert seconds["unfused"] >= (product + link) * ROUNDING
    for mode in ("fused", "tiles"):
        assert seconds[mode] >= max(product, link) * ROUNDING
        if not hardware.overlaps:
            assert seconds[mode] >= (product + link) * ROUNDING


@given(
    WORKS,
    DEVICES,
    st.sampled_from(("flops", "gathered_bytes", "scattered_bytes", "unfused_local_bytes", "fused_local_bytes")),
    AMOUNTS,
)
def test_more_work_never_takes_less(work: Work, hardware: Hardware, field: str, more: float) -> None:
    larger = dataclasses.replace(work, **{field: getattr(work, field) + more})
    before, after = predict(work, hardware), predict(larger, hardware)
    for mode in MODES:
        assert after[mode] >= before[mode] * ROUNDING


@given(WORKS, DEVICES, st.floats(1, 100))
def test_faster_hardware_never_takes_longer(work: Work, hardware: Hardware, times: float) -> None:
    faster = dataclasses.replace(
        hardware,
        flops={dtype: rate * times for dtype, rate in hardware.flops.items()},
        memory_bytes_per_s=hardware.memory_bytes_per_s * times,
        link_bytes_per_s=hardware.link_bytes_per_s * times,
    )
    before, after = predict(work, hardware), predict(work, faster)
    for mode in MODES:
        assert after[mode] * ROUNDING <= before[mode]


@given(DEVICES, st.integers(1, 64), st.integers(1, 16), st.booleans())
def test_tiny_problems_stay_unfused(hardware: Hardware, world: int, pieces: int, both: bool) -> None:
    work = Work(1e3, world, "float32", 64, 64 if both else 0, pieces)
    assert pick_mode(predict(work, hardware), MODEL_MARGIN) == "unfused"


@given(st.sampled_from((*KNOWN_GPUS, GENERIC_GPU)), st.integers(4, 16), st.floats(0.5, 2), st.floats(0.02, 10))
def test_large_balanced_problems_fuse(hardware: Hardware, world: int, balance: float, seconds: float) -> None:
    """Where communication takes about as long as the product, and both long enough, overlap wins."""
    flops = seconds * hardware.flops_of("bfloat16") * PRODUCT_SHARE
    shard = balance * seconds * hardware.link_bytes_per_s * LINK_SHARE / (world - 1)
    found = predict(Work(flops, world, gathered_bytes=shard), hardware)
    assert pick_mode(found, MODEL_MARGIN) != "unfused"


def test_long_products_with_little_to_hide_stay_unfused() -> None:
    work = Work(flops=1e15, world=8, gathered_bytes=1e6)
    for hardware in KNOWN_GPUS:
        assert pick_mode(predict(work, hardware), MODEL_MARGIN) == "unfused"


@given(WORKS)
def test_cpus_fuse_only_for_local_memory(work: Work) -> None:
    without = dataclasses.replace(work, unfused_local_bytes=0.0)
    assert pick_mode(predict(without, CPU), MODEL_MARGIN) == "unfused"


def test_local_memory_can_decide_on_a_cpu() -> None:
    work = Work(flops=1e8, world=2, dtype="float32", gathered_bytes=1e3, unfused_local_bytes=1e9)
    assert pick_mode(predict(work, CPU), MODEL_MARGIN) != "unfused"


def test_by_hand() -> None:
    """Rates of 1 reached, latency 0.5, launch 0.25; 4 ranks, 2 pieces: 8 chunks, 6 pieces travel."""
    work = Work(100.0, 4, "float32", gathered_bytes=20.0, pieces=2, unfused_local_bytes=7.0, fused_local_bytes=3.0)
    found = predict(work, SIMPLE)
    assert found["unfused"] == pytest.approx(100 + 60 + 7 + 0.25 + (0.25 + 3 * 0.5))
    product = 100 * (1 + CHUNK_LOSS * 7 / 8)
    assert found["fused"] == pytest.approx(product + 60 / 8 + 3 + 8 * 0.25 + (0.25 + 1.0) + 6 * 0.75)
    assert found["tiles"] == pytest.approx(100 * (1 + TILE_LOSS) + 60 / 8 + 3 + 0.25 + (0.25 + 1.0) + 6 * 0.5)


def test_one_rank_sends_nothing() -> None:
    work = Work(100.0, 1, "float32", gathered_bytes=20.0, scattered_bytes=20.0)
    assert work.parts == 0 and link_seconds(work, SIMPLE) == 0
    assert predict(work, SIMPLE)["unfused"] == pytest.approx(100.25)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="world: expected at least 1, got 0"):
        Work(1.0, 0)
    with pytest.raises(ValueError, match="pieces: expected at least 1, got 0"):
        Work(1.0, 2, pieces=0)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gathered_bytes: expected a finite number"):
            Work(1.0, 2, gathered_bytes=bad)
    with pytest.raises(ValueError, match="expected some of .*got 'quick'"):
        predict(Work(1.0, 2), GENERIC_GPU, ("quick",))
    with pytest.raises(ValueError, match="got int8"):
        predict(Work(1.0, 2, "int8"), GENERIC_GPU)
    with pytest.raises(ValueError, match="expected at least one mode"):
        pick_mode({})


@given(st.dictionaries(st.sampled_from(MODES), SECONDS, min_size=1), st.floats(0, 0.5))
def test_never_slower_than_unfused(seconds: dict[str, float], margin: float) -> None:
    mode = pick_mode(seconds, margin)
    if "unfused" not in seconds:
        assert seconds[mode] == min(seconds.values())
    elif mode != "unfused":
        assert seconds[mode] < (1 - margin) * seconds["unfused"]
        assert seconds[mode] == min(seconds.values())
    else:
        assert min(seconds.values()) >= (1 - margin) * seconds["unfused"]


def test_ties() -> None:
    assert pick_mode({"fused": 1.0, "unfused": 1.0}) == "unfused"
    assert pick_mode({"fused": 1 - MEASURED_MARGIN, "unfused": 1.0}) == "unfused"
    assert pick_mode({"fused": 0.99 - MEASURED_MARGIN, "unfused": 1.0}) == "fused"
    assert pick_mode({"tiles": 1.0, "fused": 1.0}) == pick_mode({"fused": 1.0, "tiles": 1.0}) == "fused"
