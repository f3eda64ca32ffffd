"""What the kernels of csrc/cuda compiled to: registers, memory and instructions, read back from the built module."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

from odysseus_kernels import _ext

__all__ = ["NATIVE_ARCHITECTURES", "native_table", "read_output", "tool"]

NATIVE_ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
_DTYPES = {"LNS_5DTypeE0E": "fp32", "LNS_5DTypeE2E": "bf16", "LNS_5DTypeE3E": "fp16"}
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
    path = str(_ext.load().__file__)
    if not _ext.has_cuda():
        raise RuntimeError(f"{_ext.why_no_cuda()}; there are no kernels to read")
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
        usage = read_output("cuobjdump", "-res-usage", "-arch", architecture, path)
        code = read_output("cuobjdump", "-sass", "-arch", architecture, path)
        found = re.findall(r"Function ([^:]+):\s+REG:(\d+) STACK:(\d+)", usage)
        bodies = {part.split("\n", 1)[0].strip(): part for part in code.split("Function :")[1:]}
        rows = []
        for name, registers, stack in found:
            kernel = next((label for key, label in _KERNELS.items() if key in name), None)
            if kernel is None:
                continue
            dtype = next((label for key, label in _DTYPES.items() if key in name), "any")
            rows.append((kernel, architecture, dtype, registers, stack, *_counts(bodies[name])))
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in sorted(rows)]
    return "\n".join(lines) + "\n"


def _counts(body: str) -> tuple[int, str, int, int]:
    loads = re.findall(r"\bLDGMC\.E\.([\w.]+?)\.STRONG\.SYS", body)
    kinds = ", ".join(f"{loads.count(kind)} {kind}" for kind in dict.fromkeys(loads)) or "0"
    spills = len(re.findall(r"\b(?:LDL|STL)\b", body))
    return spills, kinds, len(re.findall(r"\bSTG\.E\.128\.STRONG\.SYS\b", body)), body.count("MEMBAR.SC.SYS")
