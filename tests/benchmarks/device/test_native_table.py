"""The rows of csrc/cuda in the table of what kernels compile to."""

from __future__ import annotations

import pytest

from benchmarks.device import compile as compiled
from benchmarks.device.native import NATIVE_ARCHITECTURES, native_table, small_table, tool
from odysseus_kernels import _ext

pytestmark = [
    pytest.mark.without_ranks,
    pytest.mark.skipif(not _ext.has_cuda(), reason="the extension was built without CUDA"),
]


_AGAIN = "python -m benchmarks.device.compile --native"


def section(title: str) -> str:
    """One of the tables as it was written."""
    return compiled.RESULT.read_text().split(f"## Kernels of csrc/cuda {title}\n")[1].partition("\n## ")[0]


def rows_of(text: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


def test_kernels_by_a_multicast_address() -> None:
    pytest.importorskip("triton")
    if tool("cuobjdump") is None:
        pytest.skip("no cuobjdump")
    rows = rows_of(native_table())
    kernels = [("store to all ranks", "any"), *(("sum of the switch", name) for name in ("bf16", "fp16", "fp32"))]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (kernel, architecture, dtype) for architecture in NATIVE_ARCHITECTURES for kernel, dtype in kernels
    ]
    for kernel, architecture, dtype, registers, stack, spills, loads, stores, fences in rows:
        able = architecture != "sm_80"
        assert (stack, spills, fences) == ("0", "0", str(int(able))) and int(registers) <= 64
        wide = "HPADD" if architecture == "sm_100a" else "F32ADD"  # what .acc::f32 becomes; without it, it is ADD
        added = {"fp32": "ADD.F32x4.RN", "bf16": f"{wide}.BF16x8.RN", "fp16": f"{wide}.F16x8.RN", "any": ""}[dtype]
        assert loads == (f"5 {added}" if able and added else "0")
        assert stores == ("5" if able and kernel == "store to all ranks" else "0")
    assert [row[:3] for row in rows_of(section("by a multicast address"))] == [row[:3] for row in rows], _AGAIN


def test_kernels_beside_products() -> None:
    pytest.importorskip("triton")
    if tool("cuobjdump") is None:
        pytest.skip("no cuobjdump")
    rows = rows_of(small_table())
    assert len(rows) == 5 * len(NATIVE_ARCHITECTURES) and {row[1] for row in rows} == set(NATIVE_ARCHITECTURES)
    for kernel, _, registers, stack, spills, shared, clocks, swaps in rows:
        assert int(registers) <= 32 and (stack, spills) == ("0", "0") and int(shared) <= 1024
        assert (int(clocks) >= 2) == (kernel in ("wait", "book the emulated link", "wait for the emulated link"))
        assert kernel != "wait" or swaps == "1", "it can say that it gave up"
    assert [row[:2] for row in rows_of(section("beside products"))] == [row[:2] for row in rows], _AGAIN


def test_the_table_has_every_configuration_that_is_shipped() -> None:
    pytest.importorskip("triton")
    rows = rows_of(compiled.RESULT.read_text().partition("\n## ")[0])
    assert [row[:8] for row in rows] == [compiled.described(variant) for variant in compiled.variants()], (
        "python -m benchmarks.device.compile"
    )
    for row in rows:
        registers_set, clocks = int(row[16]), int(row[17])
        assert (registers_set >= 3) == (row[6].endswith(("cooperative", "pingpong"))) and clocks >= 2
