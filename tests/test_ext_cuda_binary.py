"""The machine code in the compiled module: which architectures, no spills, the instructions that are meant."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from odysseus_kernels import _ext

pytestmark = pytest.mark.without_ranks

C = _ext.load()
if not hasattr(C, "cuda"):
    pytest.skip("the extension was built without CUDA", allow_module_level=True)

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
SMALL = ("11wait_kernel", "13signal_kernel", "14advance_kernel", "11book_kernel", "14release_kernel")
REDUCTIONS = 16  # eight pairs of types, few and many sources
SWITCHED = 4  # sums in three types, stores


def find_cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    if spec := importlib.util.find_spec("triton"):
        for folder in spec.submodule_search_locations or ():
            candidate = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
            if candidate.is_file():
                return str(candidate)
    return None


def dump(*options: str) -> str:
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump, neither on PATH nor with triton")
    return subprocess.run([tool, *options, C.__file__], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def machine_code() -> dict[str, str]:
    """Disassembly by architecture."""
    code: dict[str, str] = {}
    for architecture in ARCHITECTURES:
        code[architecture] = dump("-sass", "-arch", architecture)
        assert "Function :" in code[architecture], architecture
    return code


def test_architectures() -> None:
    listed = dump("-lelf")
    assert set(re.findall(r"\.(sm_\w+)\.cubin", listed)) == set(ARCHITECTURES)
    assert "sm_90.ptx" in dump("-lptx"), "for devices newer than these"


def test_no_kernel_spills_and_all_fit_their_blocks() -> None:
    usage = re.findall(r"Function ([^:]+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage"))
    assert len(usage) == len(ARCHITECTURES) * (REDUCTIONS + len(SMALL) + SWITCHED)
    for name, registers, stack, local in usage:
        assert (stack, local) == ("0", "0"), name
        assert int(registers) <= 64, f"{name}: 1024 threads have 64 registers each"
        if any(kernel in name for kernel in SMALL):
            assert int(registers) <= 32, f"{name}: a warp of it must fit beside a product that fills the device"


def test_small_kernels_fit_beside_products_that_fill_the_device() -> None:
    """Neither static shared memory nor more than a warp: what a product with 196,656 bytes on each SM leaves is 36 KiB,
    2,048 registers and the slots of a block."""
    usage = re.findall(r"Function ([^:]+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", dump("-res-usage"))
    small = [row for row in usage if any(kernel in row[0] for kernel in SMALL)]
    assert len(small) == len(ARCHITECTURES) * len(SMALL)
    for name, registers, shared in small:
        assert int(registers) * 32 <= 2048 and int(shared) <= 1024, name


def test_no_local_memory_is_touched(machine_code: dict[str, str]) -> None:
    for architecture, code in machine_code.items():
        assert not re.findall(r"\b(?:LDL|STL)\b", code), architecture


def functions(code: str, name: str) -> list[str]:
    return [body for body in code.split("Function :")[1:] if name in body.splitlines()[0]]


def test_reductions_read_global_memory_16_bytes_at_once(machine_code: dict[str, str]) -> None:
    for code in machine_code.values():
        bodies = functions(code, "reduce_kernel")
        assert len(bodies) == REDUCTIONS
        for body in bodies:
            assert len(re.findall(r"\bLDG\.E\.128\b", body)) >= 4, "several loads in flight"
            assert not re.search(r"\bLD\.E", body), "no generic loads"


def most_loads_in_flight(body: str) -> int:
    """Loads of 16 bytes that are issued one after the other, before anything is added or stored."""
    most = current = 0
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", body):
        if instruction.startswith("LDG.E.128"):
            current += 1
            most = max(most, current)
        elif re.match(r"FADD|DADD|HADD|FFMA|STG", instruction):
            current = 0
    return most


def test_reductions_keep_as_many_loads_in_flight_as_their_rate_needs(machine_code: dict[str, str]) -> None:
    """What ``planner/sums.py`` expects of one multiprocessor: 8 loads a thread, or two of each of two sources."""
    for architecture, code in machine_code.items():
        for body in functions(code, "reduce_kernel"):
            few = "Lb1E" in body.splitlines()[0]
            assert most_loads_in_flight(body) >= (4 if few else 8), (architecture, body.splitlines()[0])


def test_signals_have_system_scope(machine_code: dict[str, str]) -> None:
    for code in machine_code.values():
        (signal,) = functions(code, "signal_kernel")
        assert re.search(r"ST[G]?\.E\.STRONG\.SYS", signal)
        assert re.search(r"MEMBAR\.(?:SC\.|ALL\.)?SYS", signal), "released"
        (wait,) = functions(code, "11wait_kernel")
        assert re.search(r"LD[G]?\.E\.STRONG\.SYS", wait)
        assert "NANOSLEEP" in wait


def words_that_are_polled(body: str) -> int:
    """Loads with an order that a loop repeats: a function that waits for a word has one."""
    instructions = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", body)]
    loops = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\S*\s+(?:[^,]+,\s*)?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            loops.append((int(branch[1], 16), address))
    loads = [address for address, text in instructions if re.search(r"\bLDG?\.E\S*\.STRONG\b", text)]
    return sum(any(first <= address <= last for first, last in loops) for address in loads)


def test_every_wait_is_bounded_and_nothing_else_waits(machine_code: dict[str, str]) -> None:
    """By the device's clock and by the host's word; and it can say that it gave up.

    What goes by a multicast address waits for nothing: a wait of its own stands before it.
    """
    for architecture, code in machine_code.items():
        waiting = [*functions(code, "11wait_kernel"), *functions(code, "reduce_kernel")]
        assert len(waiting) == 1 + REDUCTIONS
        for body in waiting:
            name = (architecture, body.splitlines()[0])
            assert words_that_are_polled(body) >= 1, name
            assert body.count("SR_GLOBALTIMER") >= 2, (name, "when it begins, and again while it waits")
            # The word, the host's word, and the first once more before it gives up; and whether another wait has.
            assert len(re.findall(r"\bLDG\.E\.STRONG\.SYS\b", body)) >= 3, name
            assert len(re.findall(r"\bLDG\.E\.STRONG\.GPU\b", body)) >= 1, name
            assert len(re.findall(r"\bATOMG?\.E\.CAS\b", body)) == 1 and "NANOSLEEP" in body, name
        paced = [*functions(code, "11book_kernel"), *functions(code, "14release_kernel")]
        for body in paced:  # until a time that was computed before
            assert body.count("SR_GLOBALTIMER") >= 2 and "NANOSLEEP" in body
        others = [body for body in code.split("Function :")[1:] if body not in waiting and body not in paced]
        assert len(others) == 2 + SWITCHED
        for body in others:
            name = (architecture, body.splitlines()[0])
            assert words_that_are_polled(body) == 0, name
            assert not re.search(r"\bNANOSLEEP\b|\bATOM|SR_GLOBALTIMER|\bSR_CLOCK", body), name


def test_multicast_accesses_only_where_there_are_any(machine_code: dict[str, str]) -> None:
    """Four accesses of 16 bytes in flight, and a fence for the second address on the side of memory that others use."""
    for architecture, code in machine_code.items():
        sums, stores = functions(code, "multimem_sum_kernel"), functions(code, "multimem_store_kernel")
        assert (len(sums), len(stores)) == (3, 1)
        able = architecture != "sm_80"
        # LDGMC is multimem.ld_reduce.  Of 16-bit types ADD would be without acc::f32, which is F32ADD or, since sm_100,
        # HPADD.
        for body in sums:
            loads = re.findall(r"\bLDGMC\.E\.(?:(?:F32ADD|HPADD)\.B?F16x8|ADD\.F32x4)\.RN\.STRONG\.SYS\b", body)
            assert len(loads) == body.count("LDGMC") == 5 * able, architecture
        (body,) = stores  # multimem.st is a store like any other: it is the address that is another
        assert len(re.findall(r"\bSTG\.E\.128\.STRONG\.SYS\b", body)) == 5 * able, architecture
        for body in (*sums, *stores):
            assert ("MEMBAR.SC.SYS" in body) == able, "the fence for a second address"
            assert not re.search(r"\b(?:LD|ST)\.E", body), "no generic accesses"


def test_multicast_instructions_of_the_portable_code() -> None:
    """PTX says what is meant more plainly than machine code: scope, order, and in what the switch adds."""
    text = dump("-ptx")
    for instruction in (
        "multimem.ld_reduce.relaxed.sys.global.add.v4.f32",
        "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2",
        "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2",
        "multimem.st.relaxed.sys.global.v4.f32",
    ):
        assert text.count(instruction) >= 5, instruction
    for name in ("multimem_sum_kernel", "multimem_store_kernel"):
        bodies = [part for part in text.split(".entry ")[1:] if name in part.splitlines()[0]]
        for body in bodies:
            fence, access = body.index("fence.proxy.alias"), re.search(r"multimem\.(?:st|ld_reduce)", body)
            assert access is not None
            # Before what reads others' products, behind what others' products will read.
            assert (fence < access.start()) == (name == "multimem_sum_kernel")
