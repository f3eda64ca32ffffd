"""The rows of csrc/cuda in the table of what kernels compile to."""

from __future__ import annotations

import pytest

from benchmarks.device import compile as compiled
from benchmarks.device.native import NATIVE_ARCHITECTURES, native_table, tool
from odysseus_kernels import _ext

pytestmark = [
    pytest.mark.without_ranks,
    pytest.mark.skipif(not _ext.has_cuda(), reason="the extension was built without CUDA"),
]


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
    written = compiled.RESULT.read_text()
    section = written[written.index("## Kernels of csrc/cuda") :]
    assert [row[:3] for row in rows_of(section)] == [row[:3] for row in rows], (
        "python -m benchmarks.device.compile --native"
    )
