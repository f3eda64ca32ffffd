"""Tiles, waves and pieces of shapes that models have, and properties of all others."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odysseus_kernels.planner.cost_model import CHUNK_LOSS, PRODUCT_SHARE, Work, predict, product_seconds
from odysseus_kernels.planner.hardware import CPU, GENERIC_GPU, KNOWN_GPUS, hardware_for
from odysseus_kernels.planner.waves import fill, tiles, wave_pieces, waves

SIZES = st.integers(1, 1 << 16)


@pytest.mark.parametrize(
    ("rows", "columns", "sms", "tiles_", "waves_", "filled"),
    (
        (2048, 1280, 132, 80, 1, 0.61),  # a piece of Llama-3-70B's QKV on an H100: two fifths of it wait
        (2048, 1536, 132, 96, 1, 0.73),  # of Llama-2-7B's
        (2048, 768, 132, 48, 1, 0.36),  # of Llama-3-8B's
        (4096, 1280, 132, 160, 2, 0.61),
        (4096 * 8, 1280, 132, 1280, 10, 0.97),  # all chunks at once
        (4096 * 8, 1536, 132, 1536, 12, 0.97),
        (1024, 4096, 132, 128, 1, 0.97),  # a piece of Llama-3-8B's output projection
        (1024, 8192, 132, 256, 2, 0.97),
        (1024, 8192, 108, 256, 3, 0.79),  # the same on an A100
        (1024, 8192, 148, 256, 2, 0.86),  # and on a B200
        (129, 256, 2, 2, 1, 0.50),  # half of the second tile lies beyond the edge
        (1, 1, 1, 1, 1, 0.00),
    ),
)
def test_fill_of_shapes(rows: int, columns: int, sms: int, tiles_: int, waves_: int, filled: float) -> None:
    assert tiles(rows, columns) == tiles_
    assert waves(rows, columns, sms) == waves_
    assert fill(rows, columns, sms) == pytest.approx(filled, abs=0.006)


@pytest.mark.parametrize(
    ("rows", "columns", "sms", "least", "most", "pieces"),
    (
        (4096, 4096, 132, 4, 8, 4),  # 128 tiles a piece: nothing fills better
        (4096, 8192, 132, 4, 8, 4),
        (8192, 4096, 132, 8, 16, 8),
        (4096, 8192, 108, 4, 8, 4),  # 256 tiles in 3 waves, as full as any other number makes them
        (4096, 8192, 148, 4, 8, 4),  # eight pieces fill as much: the fewer
        (4096, 5120, 132, 4, 8, 6),  # 6 x 20 tiles in one wave instead of 8 x 20 in two
        (6144, 3072, 132, 4, 8, 5),  # 10 x 12 tiles in one wave instead of 12 x 12 in two
        (6144, 3072, 132, 4, 4, 4),  # there is no choice
    ),
)
def test_pieces_of_shapes(rows: int, columns: int, sms: int, least: int, most: int, pieces: int) -> None:
    found = wave_pieces(rows, columns, sms, least=least, most=most)
    filled = {n: round(fill(-(-rows // n), columns, sms), 3) for n in range(least, most + 1)}
    assert found == pieces, filled


@given(SIZES, SIZES, st.integers(1, 256), st.integers(1, 16), st.integers(0, 16))
def test_pieces_are_within_bounds_and_never_fill_worse(
    rows: int, columns: int, sms: int, least: int, more: int
) -> None:
    found = wave_pieces(rows, columns, sms, least=least, most=least + more)
    assert least <= found <= least + more
    assert fill(-(-rows // found), columns, sms) >= fill(-(-rows // least), columns, sms)


@given(SIZES, SIZES, st.integers(1, 256))
def test_a_fill_is_a_share_and_whole_waves_are_full(rows: int, columns: int, sms: int) -> None:
    assert 0 < fill(rows, columns, sms) <= 1
    assert fill(128 * sms, 256 * columns, sms) == 1


def test_bad_sizes() -> None:
    for bad in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="expected at least 1, got 0"):
            fill(*bad)
    with pytest.raises(ValueError, match="expected 1 <= least <= most, got 3 and 2"):
        wave_pieces(1, 1, 1, least=3, most=2)


# ---- what the cost model makes of it ---------------------------------------------------------------------------------


def _gather(pieces: int, columns: int = 1280, rows: int = 4096, depth: int = 8192) -> Work:
    flops = 2.0 * 8 * rows * columns * depth
    return Work(flops, 8, gathered_bytes=2.0 * rows * depth, pieces=pieces, rows=rows, columns=columns)


def test_products_of_pieces_pay_for_waves_they_leave_unfilled() -> None:
    # As much as PRODUCT_SHARE asks of a link that is never in the way.
    hardware = dataclasses.replace(hardware_for("NVIDIA H100 80GB HBM3"), link_bytes_per_s=1e18)
    work = _gather(2)
    blind = dataclasses.replace(work, rows=0, columns=0)
    lost = predict(work, hardware)["fused"] - predict(blind, hardware)["fused"]
    factor = fill(8 * 4096, 1280, 132) / fill(2048, 1280, 132)
    assert factor == pytest.approx(0.97 / 0.606, rel=0.01)
    product = product_seconds(work, hardware) * (1 + CHUNK_LOSS * (1 - 1 / 16))
    assert lost == pytest.approx(product * (factor - 1), rel=1e-6)
    for mode in ("unfused", "tiles"):
        assert predict(work, hardware)[mode] == predict(blind, hardware)[mode]


@pytest.mark.parametrize("columns", (768, 1280, 1536))
@pytest.mark.parametrize("pieces", (1, 2, 4))
def test_one_launch_over_all_pieces_is_preferred_where_pieces_fill_no_wave(columns: int, pieces: int) -> None:
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        found = predict(_gather(pieces, columns), hardware_for(name))
        assert min(found, key=lambda mode: found[mode]) == "tiles", found


def test_pieces_that_fill_waves_are_preferred_to_tiles() -> None:
    """4224 rows are 33 rows of tiles, 1024 columns 4: one wave of 132 each."""
    hardware = dataclasses.replace(hardware_for("NVIDIA H200"), link_bytes_per_s=4.5e12)  # the product is longer
    found = predict(_gather(1, columns=1024, rows=4224, depth=32768), hardware)  # and than what launches take
    assert found["fused"] < found["tiles"]


def test_what_is_not_known_costs_nothing() -> None:
    for hardware in (CPU, GENERIC_GPU):
        assert hardware.multiprocessors == 0
        work = _gather(4)
        assert predict(work, hardware) == predict(dataclasses.replace(work, rows=0), hardware)
    assert {one.multiprocessors for one in KNOWN_GPUS} == {108, 114, 132, 142, 148}
    assert 0 < PRODUCT_SHARE < 1
    with pytest.raises(ValueError, match="columns: expected at least 0, got -1"):
        Work(1.0, 2, columns=-1)
