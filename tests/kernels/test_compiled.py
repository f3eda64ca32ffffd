"""What keeps the kernels honest on a machine without a GPU: the machine code of every shipped configuration.

By default of some 40 variants in which every two values meet, and which are closest to their limits
(compiled_choice.py); of all with --complete, after a change to a kernel or its configurations, too.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from compiled_choice import FULL, chosen, recorded_registers, values_of

from benchmarks.device.compile import Binary, Variant, compile_all, compile_source, described, table, variants
from benchmarks.device.native import tool
from odysseus_kernels.kernels.configs import shipped

pytestmark = [
    pytest.mark.without_ranks,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        tool("cuobjdump") is None or tool("nvdisasm") is None,
        reason="neither Triton nor CUDA has cuobjdump and nvdisasm",
    ),
]


@triton.jit
def unbounded_kernel(word, wanted):
    """Broken on purpose: nothing but the word ends it."""
    while tl.atomic_add(word, 0, sem="acquire", scope="sys") - wanted < 0:
        pass


@pytest.fixture(scope="module")
def binaries(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Variant, Binary]]:
    with pytest.MonkeyPatch.context() as patch:
        # Processes inherit it: nothing is taken from an earlier run, and the interpreter is off.
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.delenv("TRITON_INTERPRET", raising=False)
        wanted = variants()
        if not request.config.getoption("complete"):
            wanted = chosen(wanted, recorded_registers())
        yield compile_all(wanted, processes=min(2, os.cpu_count() or 1))


def _wrong(binaries: dict[Variant, Binary], fine: object) -> list[str]:
    assert callable(fine)
    return [variant.label() for variant, binary in binaries.items() if not fine(variant, binary)]


def test_every_shipped_configuration_is_a_variant() -> None:
    for kernel in ("gather_matmul", "matmul_scatter", "weight_gradient"):
        for architecture in (80, 90, 100):
            for dtype in (torch.bfloat16, torch.float32):
                for config in shipped(kernel, architecture, dtype):
                    assert Variant(kernel, architecture, config, dtype, dtype) in variants()


def test_what_is_compiled_by_default() -> None:
    """Every pair of values; whatever could be the only one without the registers or the shared memory that it needs."""
    every, registers = variants(), recorded_registers()
    default = chosen(every, registers)
    assert len(default) <= 0.4 * len(every)

    def pairs(found: Iterable[Variant]) -> set[object]:
        return {pair for one in found for pair in itertools.combinations(enumerate(values_of(one)), 2)}

    assert pairs(default) == pairs(every)
    # Stages lie in shared memory, and what specialized warps exchange: of operands' and results' width only.
    for found in (lambda v: (v.architecture, v.config), lambda v: (v.config, v.dtype.itemsize, v.out.itemsize)):
        assert set(map(found, default)) == set(map(found, every))
    tiles: dict[object, list[int]] = {}
    for one in every:
        tiles.setdefault((one.kernel, one.architecture, one.config), []).append(registers[tuple(described(one))])
    compiled = {(v.kernel, v.architecture, v.config, registers[tuple(described(v))]) for v in default}
    for (kernel, architecture, config), found in tiles.items():
        if max(found) >= FULL * config.max_registers:
            assert (kernel, architecture, config, max(found)) in compiled, config


def test_a_variant_that_the_table_does_not_know_is_compiled() -> None:
    every, registers = variants(), recorded_registers()
    (left_out, *_) = [one for one in every if one not in chosen(every, registers)]
    del registers[tuple(described(left_out))]
    assert left_out in chosen(every, registers)


def test_nothing_is_spilled(binaries: dict[Variant, Binary]) -> None:
    assert not _wrong(binaries, lambda v, b: b.stack == 0 and b.count(r"(LDL|STL)\b") == 0)


def test_all_programs_of_a_multiprocessor_fit_and_leave_room(binaries: dict[Variant, Binary]) -> None:
    # A multiprocessor has 65,536 registers, given to warps in units of 256, and this much shared memory, of which each
    # program costs one KiB more.  A block of one warp must fit beside them: peers may be waiting for what it does.
    shared = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}

    def fits(variant: Variant, binary: Binary) -> bool:
        config = variant.config
        registers = -(-binary.registers * 32 // 256) * 256 * config.resident_warps
        memory = binary.shared + 1024
        return (
            config.per_sm * registers + 2048 <= 65536 and config.per_sm * memory + 1024 <= shared[variant.architecture]
        )

    assert not _wrong(binaries, fits)


def test_products_use_tensor_cores(binaries: dict[Variant, Binary]) -> None:
    units = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}
    half = {v: b for v, b in binaries.items() if v.dtype != torch.float32}
    assert not _wrong(half, lambda v, b: b.count(units[v.architecture]) > 0)
    # fp32 is not rounded to TF32.
    exact = {v: b for v, b in binaries.items() if v.dtype == torch.float32}
    assert not _wrong(exact, lambda v, b: b.count(r"FFMA") > 0 and b.count(r"HMMA|HGMMA|UTC\w*MMA") == 0)


def test_operands_come_through_descriptors_or_asynchronous_copies(binaries: dict[Variant, Binary]) -> None:
    def loads(variant: Variant, binary: Binary) -> bool:
        pattern, other = (r"UTMALDG", r"LDGSTS") if variant.config.descriptors else (r"LDGSTS", r"UTMALDG")
        return binary.count(pattern) > 0 and binary.count(other) == 0

    assert not _wrong(binaries, loads)


def test_warps_of_specialized_kernels_exchange_registers(binaries: dict[Variant, Binary]) -> None:
    specialized = {v: b for v, b in binaries.items() if v.config.specialized}
    assert {v.config.schedule for v in specialized} == {"cooperative", "pingpong"}
    assert {v.dtype for v in specialized} == {torch.bfloat16, torch.float16}

    def divided(variant: Variant, binary: Binary) -> bool:
        # Each kind of warps sets its share, and stages are handed over by barriers in shared memory, beside which each
        # of eight warps has 512 bytes where its threads exchange results.
        exchanged = binary.count(r"USETMAXREG") >= 3 and binary.count(r"SYNCS") >= 4
        stages = variant.config.shared_bytes(variant.dtype.itemsize)
        return exchanged and stages <= binary.shared <= stages + 5 * 1024 <= 227 * 1024

    assert not _wrong(specialized, divided)
    assert not _wrong(
        {v: b for v, b in binaries.items() if not v.config.specialized}, lambda v, b: b.count(r"USETMAXREG") == 0
    )


def test_results_are_stored_in_whole_sectors(binaries: dict[Variant, Binary]) -> None:
    def stores(variant: Variant, binary: Binary) -> bool:
        rows_contiguous = not (variant.deep and variant.kernel == "weight_gradient")
        # Beside tiles only the word is stored, and what a wait that gave up says of itself.
        narrow = binary.count(r"STG\.E") - binary.count(r"STG\.E(\.\w+)*\.128") - binary.count(r"STG\.E\.STRONG\.SYS")
        return binary.count(r"STG\.E(\.\w+)*\.128") > 0 and narrow <= 4 if rows_contiguous else True

    assert not _wrong(binaries, stores)


def test_words_are_acquired_and_released_at_system_scope(binaries: dict[Variant, Binary]) -> None:
    def waits(variant: Variant, binary: Binary) -> bool:
        # The word at first; word and flag once it is missing, and again; the host's word, and the word a last time.
        acquired = binary.count(r"LDG\.E\.STRONG\.SYS") >= 7
        # Descriptors read through another proxy, which needs a fence of its own; stores to peers do not.
        fenced = binary.count(r"FENCE\.VIEW\.ASYNC\.G") > 0
        return acquired and fenced == (variant.config.descriptors and variant.kernel != "matmul_scatter")

    def signals(variant: Variant, binary: Binary) -> bool:
        counted = binary.count(r"ATOMG?\.E\.ADD\.STRONG\.SYS") > 0
        # A link between GPUs need not carry atomics: peers' words are stored, counted is in local memory.
        # The other is the host's, who learns by it that a wait gave up.
        stored = binary.count(r"STG\.E\.STRONG\.SYS") == 2 and binary.count(r"ATOMG?\.E\.EXCH\.STRONG\.SYS") == 0
        return counted and stored and binary.count(r"MEMBAR\.\w+\.SYS") >= 2

    assert not _wrong(binaries, waits)
    assert not _wrong({v: b for v, b in binaries.items() if v.kernel == "matmul_scatter"}, signals)


def is_bounded(binary: Binary) -> bool:
    """Whether a kernel that waits looks at the clock when it begins to wait and again, and can say that it gave up."""
    return binary.clocks >= 2 and binary.count(r"ATOMG?\.E\.CAS") >= 1


def test_every_wait_is_bounded(binaries: dict[Variant, Binary]) -> None:
    assert not _wrong(binaries, lambda variant, binary: is_bounded(binary))


def test_a_wait_without_a_bound_is_caught() -> None:
    """By the same look at the machine code of a kernel that waits until its word is there, and no shorter."""
    for architecture in (80, 90, 100):
        binary = compile_source(unbounded_kernel, {"word": "*i32", "wanted": "i32"}, {}, {}, architecture)
        assert binary.count(r"LDG\.E\.STRONG\.SYS") >= 1 and not is_bounded(binary)


def test_table(binaries: dict[Variant, Binary]) -> None:
    first = next(one for one in binaries if one.dtype == one.out == torch.bfloat16)
    rows = table({first: binaries[first]}).splitlines()
    assert rows[-1].startswith(f"| {first.kernel} | {first.architecture} | bf16 |")
    assert rows[-1].count("|") == rows[-2].count("|") == rows[-3].count("|")
