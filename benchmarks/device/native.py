"""What the kernels of csrc/cuda compiled to: registers, memory and instructions, read back from the built module."""

from __future__ import annotations

import functools
import pathlib
import re
import shutil
import subprocess

from odysseus_kernels import _ext

__all__ = ["NATIVE_ARCHITECTURES", "native_table", "native_tables", "read_output", "small_table", "tool"]

NATIVE_ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
_DTYPES = {"LNS_5DTypeE0E": "fp32", "LNS_5DTypeE2E": "bf16", "LNS_5DTypeE3E": "fp16"}
_SMALL = {
    "11wait_kernel": "wait",
    "13signal_kernel": "signal",
    "14advance_kernel": "advance an epoch",
    "11book_kernel": "book the emulated link",
    "14release_kernel": "wait for the emulated link",
}
_KERNELS = {"multimem_sum_kernel": "sum of the switch", "multimem_store_kernel": "store to all ranks"}


def tool(name: str) -> str | None:
    """Path of one of the CUDA binary tools: Triton's own, else CUDA's."""
    import triton

    bundled = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else shutil.which(name, path="/usr/local/cuda/bin") or shutil.which(name)


def read_output(name: str, *arguments: str) -> str:
    """What one of these tools prints.

    Raises:
        RuntimeError: there is no such tool.
    """
    path = tool(name)
    if path is None:
        raise RuntimeError(f"{name} is needed to read machine code: neither Triton nor /usr/local/cuda/bin has it")
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def native_table() -> str:
    """Markdown: one row for each kernel that goes by a multicast address, and architecture.

    Raises:
        RuntimeError: there is no module with a CUDA part, or no tool to read it.
    """
    lines = [
        "## Kernels of csrc/cuda by a multicast address",
        "",
        "Made by `python -m benchmarks.device.compile --native` from the built module; before sm_90 there are no such "
        "addresses, and the kernels trap. Loads are LDGMC with what the switch adds in (F32ADD, and since sm_100 "
        "HPADD, is what `.acc::f32` becomes; without it, it is ADD), stores STG with system scope.",
        "",
        "| kernel | sm | dtype | registers | stack | spills | loads of all ranks | stores to all ranks | fences |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for architecture in NATIVE_ARCHITECTURES:
        rows = []
        for name, registers, stack, _, body in _functions(architecture):
            kernel = next((label for key, label in _KERNELS.items() if key in name), None)
            if kernel is None:
                continue
            dtype = next((label for key, label in _DTYPES.items() if key in name), "any")
            rows.append((kernel, architecture, dtype, registers, stack, *_counts(body)))
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in sorted(rows)]
    return "\n".join(lines) + "\n"


def small_table() -> str:
    """Markdown: one row for each kernel of one small block, which runs beside products, and architecture.

    Raises:
        RuntimeError: as :func:`native_table`.
    """
    lines = [
        "## Kernels of csrc/cuda beside products",
        "",
        "Blocks of at most a warp, which have to fit beside a product that fills the device: at most 32 registers a "
        "thread, no shared memory of their own, and launched with the carve-out that leaves products most of it "
        "(`csrc/cuda/runtime.cpp`; a test on a GPU asks the driver). Clock reads and the compare-and-swap are what "
        "bounds a wait: by time, and by one wait saying for all that it gave up.",
        "",
        "| kernel | sm | registers | stack | spills | shared | clock reads | compare-and-swaps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for architecture in NATIVE_ARCHITECTURES:
        for name, registers, stack, shared, body in _functions(architecture):
            kernel = next((label for key, label in _SMALL.items() if key in name), None)
            if kernel is not None:
                spills = len(re.findall(r"\b(?:LDL|STL)\b", body))
                swaps = len(re.findall(r"\bATOMG?\.E\.CAS\b", body))
                row = (kernel, architecture, registers, stack, spills, shared, body.count("SR_GLOBALTIMER"), swaps)
                lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def native_tables() -> str:
    """Both tables.

    Raises:
        RuntimeError: as :func:`native_table`.
    """
    return f"{small_table()}\n{native_table()}"


@functools.cache
def _functions(architecture: str) -> list[tuple[str, str, str, str, str]]:
    """Of each function of the built module its name, registers, stack, shared memory and machine code."""
    path = str(_ext.load().__file__)
    if not _ext.has_cuda():
        raise RuntimeError(f"{_ext.why_no_cuda()}; there are no kernels to read")
    usage = read_output("cuobjdump", "-res-usage", "-arch", architecture, path)
    code = read_output("cuobjdump", "-sass", "-arch", architecture, path)
    bodies = {part.split("\n", 1)[0].strip(): part for part in code.split("Function :")[1:]}
    found = re.findall(r"Function ([^:]+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    return sorted((name, registers, stack, shared, bodies[name]) for name, registers, stack, shared in found)


def _counts(body: str) -> tuple[int, str, int, int]:
    loads = re.findall(r"\bLDGMC\.E\.([\w.]+?)\.STRONG\.SYS", body)
    kinds = ", ".join(f"{loads.count(kind)} {kind}" for kind in dict.fromkeys(loads)) or "0"
    spills = len(re.findall(r"\b(?:LDL|STL)\b", body))
    return spills, kinds, len(re.findall(r"\bSTG\.E\.128\.STRONG\.SYS\b", body)), body.count("MEMBAR.SC.SYS")
