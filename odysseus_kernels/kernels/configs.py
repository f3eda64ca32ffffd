"""Tile configurations that are shipped, and which of them suit a problem.  Data and arithmetic only: no Triton here."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch

__all__ = ["DTYPES", "Kernel", "Problem", "Schedule", "Target", "TileConfig", "candidates", "shipped"]

Kernel = Literal["gather_matmul", "matmul_scatter", "weight_gradient"]
Schedule = Literal["pipelined", "cooperative", "pingpong"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Registers of a multiprocessor, and those that a waiting kernel leaves to others: one warp with 64 for each thread.
_REGISTERS = 65536
_ROOM = 2048
# Warps that issue one product of wgmma together, and that registers are moved between.
_WARP_GROUP = 4


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How a persistent kernel cuts and schedules its work.

    Attributes:
        block_m, block_n: rows and columns of an output tile.
        block_k: depth that is multiplied at once.
        warps: warps of a program.
        stages: tiles of the operands in flight.
        group: rows of output tiles that are visited together, for reuse in L2.
        descriptors: load operands through tensor descriptors (TMA; sm_90 and later).  A kernel falls back to pointers
            where an address or a stride is not a multiple of 16 bytes.
        sms: the most multiprocessors that the kernel occupies; None for all.
        per_sm: programs that share a multiprocessor, so that one multiplies while another stores or waits.
        schedule: which warps do what.  ``"pipelined"``: all warps load, multiply and store.  Otherwise one warp loads
            and two groups of ``warps`` warps multiply and store: ``"cooperative"`` ones share the rows of each tile,
            ``"pingpong"`` ones take turns at whole tiles (Hopper; always through descriptors).
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    descriptors: bool = False
    sms: int | None = None
    per_sm: int = 1
    schedule: Schedule = "pipelined"

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "warps"):
            value = getattr(self, name)
            least = 1 if name == "warps" else 16
            if value < least or value & (value - 1):
                raise ValueError(f"{name}: expected a power of two from {least}, got {value}")
        for name in ("stages", "group", "per_sm"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.sms is not None and self.sms < 1:
            raise ValueError(f"sms: expected None or 1 or more, got {self.sms}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule: expected one of {get_args(Schedule)}, got {self.schedule!r}")
        if self.specialized and not (self.descriptors and self.warps == _WARP_GROUP):
            given = f"descriptors={self.descriptors}, warps={self.warps}"
            raise ValueError(f"schedule {self.schedule!r}: expected descriptors and {_WARP_GROUP} warps, got {given}")

    @property
    def label(self) -> str:
        """A few words for tables: ``"128x128x64 pingpong"``, ``"64x128x64, 2 on a multiprocessor"``."""
        size = f"{self.block_m}x{self.block_n}x{self.block_k}"
        schedule = f" {self.schedule}" if self.specialized else ""
        return size + schedule + (f", {self.per_sm} on a multiprocessor" if self.per_sm > 1 else "")

    @property
    def specialized(self) -> bool:
        """Whether warps differ in what they do."""
        return self.schedule != "pipelined"

    @property
    def parts(self) -> int:
        """Groups of warps among which the rows of a tile are divided."""
        return 2 if self.schedule == "cooperative" else 1

    @property
    def resident_warps(self) -> int:
        """Warps of a program: of a specialized one two groups that multiply, and a third for the warp that loads."""
        return 3 * self.warps if self.specialized else self.warps

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the operands' stages: a lower bound of what a program takes."""
        return self.stages * (self.block_m + self.block_n) * self.block_k * itemsize

    @property
    def max_registers(self) -> int:
        """Registers of a thread, so that a block of one warp still fits beside the programs of a multiprocessor.

        Small kernels on other streams wait for peers and set words: none of them may be kept out by a kernel that waits
        for what they do.
        """
        return min(255, (_REGISTERS - _ROOM) // (32 * self.resident_warps * self.per_sm) // 8 * 8)

    def programs(self, tiles: int, sms: int) -> int:
        """Programs of a persistent kernel over ``tiles`` tiles on a device of ``sms`` multiprocessors."""
        used = sms if self.sms is None else min(sms, self.sms)
        return max(1, min(tiles, used * self.per_sm))


@dataclasses.dataclass(frozen=True)
class Target:
    """What a device offers: architecture 80, 90 or 100 (whose configurations suit it), multiprocessors, shared memory.

    Attributes:
        shared_bytes: shared memory that all programs on one multiprocessor can have together.
    """

    architecture: int
    sms: int
    shared_bytes: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """``chunks`` products [rows, depth] @ [depth, width], one for each width.

    :func:`weight_gradient` has one chunk; its rows and width are those of the gradient, its depth is the sequence.
    """

    chunks: int
    rows: int
    widths: tuple[int, ...]
    depth: int

    def tiles(self, config: TileConfig) -> int:
        """Output tiles under ``config``."""
        columns = sum(-(-width // config.block_n) for width in self.widths)
        return self.chunks * -(-self.rows // config.block_m) * columns


# 128 x 256 keeps the two consumer warp groups of wgmma busy with the least traffic; two programs of 128 x 128 on a
# multiprocessor hide each other's epilogues and waits, which weighs more where the depth is small; narrower tiles are
# for small chunks.  All compile without spills for every layout of the operands (benchmarks/results/compile.md): that
# is why Ampere, whose accumulators and addresses share the registers, has no 128 x 256.
_HOPPER = (
    TileConfig(128, 256, 64, warps=8, stages=4, descriptors=True),
    TileConfig(128, 128, 64, warps=4, stages=3, descriptors=True, per_sm=2),
    TileConfig(256, 128, 64, warps=8, stages=4, group=4, descriptors=True),
    TileConfig(64, 128, 64, warps=4, stages=4, descriptors=True, per_sm=2),
)
# The same tiles by warps that do one thing each: the next tile is loaded while this one is stored.  Taking turns hides
# the whole epilogue, and 128 x 128 leaves less of the last round idle; sharing 128 x 256 has less traffic.
_HOPPER_SPECIALIZED = (
    TileConfig(128, 256, 64, warps=4, stages=4, descriptors=True, schedule="cooperative"),
    TileConfig(128, 128, 64, warps=4, stages=6, descriptors=True, schedule="pingpong"),
)
_BLACKWELL = (
    TileConfig(128, 256, 64, warps=8, stages=4, descriptors=True),
    TileConfig(128, 128, 64, warps=4, stages=3, descriptors=True, per_sm=2),
    TileConfig(64, 128, 64, warps=4, stages=4, descriptors=True, per_sm=2),
)
_AMPERE = (
    TileConfig(128, 128, 32, warps=8, stages=4),
    TileConfig(64, 128, 32, warps=8, stages=4),
)
# fp32 is exact (no TF32): it runs on the ordinary units, from registers.
_EXACT = (TileConfig(64, 64, 16, warps=8, stages=3),)

_PRODUCTS: dict[int, tuple[TileConfig, ...]] = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL}
_SHIPPED: dict[Kernel, dict[int, tuple[TileConfig, ...]]] = {
    "gather_matmul": _PRODUCTS | {90: _HOPPER + _HOPPER_SPECIALIZED},
    "matmul_scatter": _PRODUCTS,
    # A tile that is added to needs registers twice where it does not stay in them (tensor memory on Blackwell).
    "weight_gradient": {
        80: _AMPERE,
        90: _HOPPER,
        100: (
            TileConfig(128, 128, 64, warps=8, stages=4, descriptors=True),
            TileConfig(64, 64, 64, warps=4, stages=4, descriptors=True, per_sm=2),
        ),
    },
}


def shipped(kernel: Kernel, architecture: int, dtype: torch.dtype) -> tuple[TileConfig, ...]:
    """All configurations that are shipped for a kernel, an architecture (80, 90, 100) and the operands' dtype.

    Raises:
        ValueError: for a kernel, an architecture or a dtype that is not served.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel: expected one of {get_args(Kernel)}, got {kernel!r}")
    if architecture not in _PRODUCTS:
        raise ValueError(f"architecture: expected one of {sorted(_PRODUCTS)}, got {architecture}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    return _EXACT if dtype == torch.float32 else _SHIPPED[kernel][architecture]


def candidates(kernel: Kernel, target: Target, dtype: torch.dtype, problem: Problem) -> list[TileConfig]:
    """The shipped configurations that ``target`` can run, the one that should be fastest first.

    The order is a prior for problems that nobody timed: the number of rounds that the device needs for all tiles, times
    what a round costs.  Specialized ones come last: only timing chooses them.

    Raises:
        ValueError: as :func:`shipped`.
    """
    runnable = [
        config
        for config in shipped(kernel, target.architecture, dtype)
        if config.per_sm * config.shared_bytes(dtype.itemsize) <= target.shared_bytes
    ]
    if not runnable:
        # The least of them fits any device that has tensor cores, alone on a multiprocessor.
        least = [config for config in shipped(kernel, target.architecture, dtype) if not config.specialized][-1]
        runnable = [dataclasses.replace(least, per_sm=1, stages=2)]
    return sorted(runnable, key=lambda config: (config.specialized, _cost(config, target, problem)))


def _cost(config: TileConfig, target: Target, problem: Problem) -> float:
    """Rounds x cost of a round, in units of one multiply-add at full rate on one multiprocessor."""
    rounds = -(-problem.tiles(config) // (target.sms * config.per_sm))
    # A tile reads (m + n) for m x n products: traffic through shared memory that narrow tiles cannot hide.
    narrowness = 1 + 16 * (config.block_m + config.block_n) / (config.block_m * config.block_n)
    # Filling the pipeline, the epilogue and the signal take about as long as this many columns of depth, and are
    # hidden where programs share a multiprocessor.
    overhead = 256 if config.per_sm == 1 else 64
    return rounds * config.per_sm * config.block_m * config.block_n * narrowness * (problem.depth + overhead)
