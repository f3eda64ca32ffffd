"""What the kernels compile to, without a GPU: registers, memory and instructions of every shipped configuration.

Run ``python -m benchmarks.device.compile``; it writes ``benchmarks/results/compile.md``.  Nothing is executed or timed:
the kernels are compiled ahead of time for each architecture, and the machine code is read back.  With ``--native`` only
the rows of csrc/cuda are written anew, which takes no time: those kernels are read from the built module.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib
import multiprocessing
import os
import pathlib
import platform
import re
import tempfile
import time
from typing import Any, get_args
from unittest import mock

import torch

from benchmarks.device.native import native_tables, read_output
from odysseus_kernels.kernels.configs import Kernel, TileConfig, shipped

ARCHITECTURES = (80, 90, 100)
RESULT = pathlib.Path(__file__).resolve().parents[1] / "results" / "compile.md"

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_WORDS = {"words", "counters", "epoch", "aborted"}
_TABLES = {"slots", "credits", "arrived", "control"}
_OUTPUTS = {"out", "outs", "own"}
_OPERANDS = {"local", "gathered", "weights", "biases", "bias", "xs", "grads"}
_TUPLES = {
    "outs",
    "weights",
    "biases",
    "xs",
    "widths",
    "bias_widths",
    "weight_strides",
    "out_strides",
    "depths",
    "x_strides",
}
# Integers that a launch does not specialize on.
_PLAIN = {"rank", "world", "pieces", "credit_value", "arrived_value", "ticks", "tag"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled.

    Attributes:
        count: weights (or pairs of operands).
        deep: weights with contiguous columns; for the weight gradient, an output with contiguous columns.
        out: dtype of the output.
    """

    kernel: Kernel
    architecture: int
    config: TileConfig
    dtype: torch.dtype = torch.bfloat16
    out: torch.dtype = torch.bfloat16
    count: int = 1
    deep: bool = False

    def label(self) -> str:
        """One line that says what it is."""
        c = self.config
        extra = f"-x{self.count}" * (self.count > 1) + "-deep" * self.deep + "-pointers" * (not c.descriptors)
        extra += f"-{c.schedule}" * c.specialized
        types = _TYPES[self.dtype] + (f"-{_TYPES[self.out]}" if self.out != self.dtype else "")
        size = f"{c.block_m}x{c.block_n}x{c.block_k}-w{c.warps}-s{c.stages}"
        return f"{self.kernel}-sm_{self.architecture}-{types}-{size}{extra}"


@dataclasses.dataclass(frozen=True)
class Binary:
    """What came out: per-thread registers and stack bytes, dynamic shared memory, bytes of code, instructions.

    ``clocks`` is how often the device's clock is read, ``seconds`` how long compiling took.
    """

    registers: int
    stack: int
    shared: int
    size: int
    instructions: dict[str, int]
    clocks: int
    seconds: float

    def count(self, pattern: str) -> int:
        """Instructions whose name with modifiers begins with ``pattern``, a regular expression."""
        return sum(count for name, count in self.instructions.items() if re.match(pattern, name))


def compile_variant(variant: Variant) -> Binary:
    """Compiles as a launch on a GPU with aligned operands would, and reads the machine code."""
    specialized = variant.config.specialized
    module = importlib.import_module(
        f"odysseus_kernels.kernels.{'warp_specialized' if specialized else variant.kernel}"
    )
    function = getattr(module, f"{variant.kernel}{'_specialized' * specialized}_kernel")
    constants = _constants(variant)
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, name in enumerate(function.arg_names):
        count = variant.count if name in _TUPLES else 0
        kind = "constexpr" if name in constants else _kind(name, variant)
        signature[name] = (kind,) * count if count else kind
        if name not in constants and name not in _PLAIN:
            for path in [(index, part) for part in range(count)] or [(index,)]:
                attributes[path] = [["tt.divisibility", 16]]
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    config = variant.config
    options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.max_registers}
    return compile_source(function, signature, values, attributes, variant.architecture, options)


def compile_source(
    function: Any,
    signature: dict[str, Any],
    values: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
    architecture: int,
    options: dict[str, Any] | None = None,
) -> Binary:
    """Compiles one Triton function; arguments are those of ``triton.compiler.ASTSource``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kind = GluonASTSource if function.is_gluon() else ASTSource
    source = kind(function, signature, values, attributes)
    begin = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options or {})
    seconds = time.perf_counter() - begin
    return _read(compiled.asm["cubin"], compiled.metadata.shared, seconds)


def _kind(name: str, variant: Variant) -> str:
    if name in _WORDS:
        return "*i32"
    if name in _TABLES:
        return "*i64"
    if name in _OUTPUTS:
        return f"*{_TYPES[variant.out]}"
    return f"*{_TYPES[variant.dtype]}" if name in _OPERANDS else "i32"


def _constants(variant: Variant) -> dict[str, Any]:
    config = variant.config
    constants: dict[str, Any] = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
    }
    if config.specialized:
        constants |= {"STAGES": config.stages, "PARTS": config.parts}
    else:
        constants |= {"DESCRIPTORS": config.descriptors, "INTERPRETED": False}
    if variant.kernel == "weight_gradient":
        # A launch makes an integer of value 1 a constant.
        contiguous = "out_row_stride" if variant.deep else "out_column_stride"
        return constants | {"RING": True, "ADD": variant.out == torch.float32, contiguous: 1}
    constants |= {"COUNT": variant.count, "DEEP": variant.deep, "BIASED": True}
    return constants | ({"RING": True} if variant.kernel == "gather_matmul" else {})


def _read(cubin: bytes, shared: int, seconds: float) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = read_output("cuobjdump", "-res-usage", file.name)
        code = read_output("nvdisasm", "-c", "-ndf", file.name)  # no dataflow: labels of branches are not looked at
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG and STACK, got {usage!r}")
    names = re.findall(r"^\s+(?:/\*[0-9a-f]+\*/)?\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", code, re.MULTILINE)
    clocks = len(re.findall(r"SR_GLOBALTIMER", code))
    counted = dict(collections.Counter(names))
    return Binary(int(found[1]), int(found[2]), shared, len(cubin), counted, clocks, seconds)


def variants() -> list[Variant]:
    """Every shipped configuration in bfloat16; other layouts with the first two and all specialized ones, other dtypes
    with the first and all specialized ones.
    """
    found: dict[Variant, None] = {}
    for kernel in get_args(Kernel):
        for architecture in ARCHITECTURES:
            for config in shipped(kernel, architecture, torch.bfloat16):
                found[Variant(kernel, architecture, config)] = None
            exact = shipped(kernel, architecture, torch.float32)[0]
            found[Variant(kernel, architecture, exact, torch.float32, torch.float32)] = None
            first = shipped(kernel, architecture, torch.bfloat16)[0]
            found[Variant(kernel, architecture, first, torch.float16, torch.float16)] = None
            found[Variant(kernel, architecture, dataclasses.replace(first, descriptors=False))] = None
            configs = shipped(kernel, architecture, torch.bfloat16)
            specialized = [config for config in configs if config.specialized]
            for config in specialized:
                found[Variant(kernel, architecture, config, torch.float16, torch.float16)] = None
                found[Variant(kernel, architecture, config, out=torch.float32)] = None
            for config in [*configs[:2], *specialized]:
                found[Variant(kernel, architecture, config, deep=True)] = None
                if kernel == "weight_gradient":
                    found[Variant(kernel, architecture, config, out=torch.float32)] = None
                else:
                    found[Variant(kernel, architecture, config, count=3)] = None
                    found[Variant(kernel, architecture, config, count=3, deep=True)] = None
    return list(found)


def compile_all(wanted: list[Variant], processes: int = 2) -> dict[Variant, Binary]:
    """Compiles in fresh processes, which never ran the interpreter."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        return dict(zip(wanted, pool.map(compile_variant, wanted), strict=True))


def described(variant: Variant) -> list[str]:
    """The cells of a row that say what was compiled."""
    c = variant.config
    cells = [
        variant.kernel,
        variant.architecture,
        _TYPES[variant.dtype] + (f" → {_TYPES[variant.out]}" if variant.out != variant.dtype else ""),
        f"{c.block_m}×{c.block_n}×{c.block_k}",
        "4 + 4 + 1" if c.specialized else c.warps,
        c.stages,
        ("descriptors" if c.descriptors else "pointers") + f", {c.schedule}" * c.specialized,
        f"{variant.count}" + (", columns contiguous" if variant.deep else ""),
    ]
    return [str(cell) for cell in cells]


def table(binaries: dict[Variant, Binary]) -> str:
    """Markdown: one row for each variant."""
    import triton

    lines = [
        "# What the kernels compile to",
        "",
        "Made by `python -m benchmarks.device.compile` with Triton "
        f"{triton.__version__} and torch {torch.__version__} on {platform.machine()}, without "
        "a GPU: compiled ahead of time, not executed. Registers and stack bytes are "
        "those of one thread; shared memory is that of one program; instructions are counted in the machine code, "
        "not as executed. Spills are local loads and stores (LDL, STL). Seconds are those of compiling, on one core of "
        "that machine. `cooperative` and `pingpong` are warp-specialized: one warp loads, two groups of four multiply; "
        "registers are those at the start, before warps exchange them (setmaxnreg). Clock reads are what bounds waits.",
        "",
        "| kernel | sm | dtype | tile | warps | stages | loads | operands | registers | stack | spills | shared | "
        "HMMA | HGMMA | tcgen05 | TMA | setmaxnreg | clock reads | code bytes | seconds |",
        "|---" * 20 + "|",
    ]
    for variant, binary in binaries.items():
        units = (r"HMMA", r"HGMMA", r"UTC\w*MMA", r"UTMALDG", r"USETMAXREG")
        counts = [*map(binary.count, units), binary.clocks]
        cells = [
            *described(variant),
            binary.registers,
            binary.stack,
            binary.count(r"(LDL|STL)\b"),
            f"{binary.shared:,}",
            *counts,
            f"{binary.size:,}",
            f"{binary.seconds:.1f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    parser.add_argument("--native", action="store_true", help="only the kernels of csrc/cuda, in place")
    arguments = parser.parse_args()
    native = native_tables()
    if arguments.native:
        before = arguments.output.read_text().partition("\n## ")[0].rstrip("\n") + "\n"
    else:
        # Processes inherit it: what an earlier run left in Triton's cache would take no time.
        with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, TRITON_CACHE_DIR=empty):
            before = table(compile_all(variants(), arguments.processes))
    arguments.output.write_text(f"{before}\n{native}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
