"""Predicted duration of one phase of an operator in each mode: what ``mode="auto"`` goes by where nothing can be timed.

All terms are in seconds.  With N ranks, p pieces for each shard and

====================  ==============================================================================================
``product``           flops / (peak of the dtype · :data:`PRODUCT_SHARE`)
``link``              (N − 1) · (gathered + scattered bytes) / (link rate · :data:`LINK_SHARE`), or through a switch the
                      bytes of the busier direction, which ``planner/switch.py`` has, instead of the product
``memory(bytes)``     bytes / (memory rate · :data:`MEMORY_SHARE`)
``launch, latency``   of the hardware
``parts``             collectives: 1 for a gather or a scatter, 2 for both, 0 in a group of one rank
``chunks``            N · p products into which the fused modes cut the work
``moved``             parts · (N − 1) · p pieces that travel
``waves``             fill of the product of all chunks / fill of a piece's product (``planner/waves.py``), at least 1;
                      1 where rows and columns of a chunk's product, or multiprocessors, are not known
====================  ==============================================================================================

the modes take

- **unfused**: product + link + memory(unfused local bytes) + launch + parts · (launch + (N − 1) · latency)
- **fused**: overlap(product · waves · (1 + :data:`CHUNK_LOSS` · (1 − 1/chunks)), link) + memory(fused local bytes)
  + chunks · launch + parts · (launch + 2 · latency) + moved · (launch + latency)
- **tiles**: overlap(product · (1 + :data:`TILE_LOSS`), link) + memory(fused local bytes)
  + launch + parts · (launch + 2 · latency) + moved · latency

``overlap(a, b)`` is max(a, b) + min(a, b)/chunks: the longer hides the shorter but for one chunk, since the first
partial result has to exist before it can leave and the last shard has to arrive before it can be multiplied.  Where
the hardware cannot copy and multiply at once it is a + b.  The two latencies for each part are the ranks telling one
another that buffers may be written and that they have been read.  The kernel of ``tiles`` is launched once, and its
copies are issued while it runs: its tiles are those of all pieces, so that pieces which fill no wave cost it nothing.

Without flops and bytes the fused modes are never cheaper than unfused: small problems stay unfused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from odysseus_kernels.planner.hardware import Hardware
from odysseus_kernels.planner.switch import switch_link_bytes
from odysseus_kernels.planner.waves import fill

__all__ = [
    "MEASURED_MARGIN",
    "MODEL_MARGIN",
    "MODES",
    "Work",
    "link_seconds",
    "pick_mode",
    "predict",
    "product_seconds",
]

MODES = ("unfused", "fused", "tiles")
"""Modes that can be predicted and chosen."""

PRODUCT_SHARE = 0.8
"""Share of the peak that library products reach: measured about 790 of 989 TFLOP/s on an H200 (bf16, 8192 cubed)."""
MEMORY_SHARE = 0.9
"""Share of the memory rate that copies reach: measured about 4.3 of 4.8 TB/s on an H200."""
LINK_SHARE = 0.8
"""Share of the link rate that copies reach; an estimate."""
CHUNK_LOSS = 0.03
"""What many products of a chunk lose against one product of the whole; an estimate."""
TILE_LOSS = 0.08
"""What the kernel whose tiles wait loses against the library's product; an estimate."""

MEASURED_MARGIN = 0.02
"""Share of the unfused time by which another mode has to be faster when measured; below it is noise."""
MODEL_MARGIN = 0.10
"""The same for predictions, which err by more than measurements do."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one rank does in one phase of an operator.

    Attributes:
        flops: floating-point operations of this rank's products (2 · m · n · k each).
        world: ranks.
        dtype: of the products, as in :attr:`Hardware.flops`.
        gathered_bytes: one rank's shard; it goes to all others.
        scattered_bytes: one rank's rows of the result, in the type in which they travel; they come from all others.
        pieces: pieces into which a rank's shard is cut in the fused modes.
        unfused_local_bytes: read and written in local memory by the unfused mode only, such as the gathered tensor.
        fused_local_bytes: read and written in local memory by the fused modes only.
        rows, columns: of the output of one chunk's product; 0 where that is not known.
        switched: a switch adds what is scattered, and copies what is gathered.
    """

    flops: float
    world: int
    dtype: str = "bfloat16"
    gathered_bytes: float = 0.0
    scattered_bytes: float = 0.0
    pieces: int = 1
    unfused_local_bytes: float = 0.0
    fused_local_bytes: float = 0.0
    rows: int = 0
    columns: int = 0
    switched: bool = False

    def __post_init__(self) -> None:
        for name in ("world", "pieces"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)!r}")
        for name in ("rows", "columns"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)!r}")
        for name in ("flops", "gathered_bytes", "scattered_bytes", "unfused_local_bytes", "fused_local_bytes"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")

    @property
    def parts(self) -> int:
        """Collectives that the phase needs."""
        return 0 if self.world == 1 else (self.gathered_bytes > 0) + (self.scattered_bytes > 0)


def product_seconds(work: Work, hardware: Hardware) -> float:
    """Seconds of all products, made as one.

    Raises:
        ValueError: the hardware has no rate for the dtype.
    """
    return work.flops / (hardware.flops_of(work.dtype) * PRODUCT_SHARE)


def link_seconds(work: Work, hardware: Hardware) -> float:
    """Seconds for which the link of one rank is busy, latencies aside."""
    moved = (work.world - 1) * (work.gathered_bytes + work.scattered_bytes)
    if work.switched:
        moved = switch_link_bytes(work.gathered_bytes, work.scattered_bytes, work.world)
    return moved / (hardware.link_bytes_per_s * LINK_SHARE)


def _memory_seconds(moved: float, hardware: Hardware) -> float:
    return moved / (hardware.memory_bytes_per_s * MEMORY_SHARE)


def _wave_loss(work: Work, hardware: Hardware) -> float:
    """By how much products of pieces take longer than one product of all, for waves that they leave unfilled."""
    if not (work.rows and work.columns and hardware.multiprocessors):
        return 1.0
    whole = fill(work.rows * work.world, work.columns, hardware.multiprocessors)
    return max(1.0, whole / fill(-(-work.rows // work.pieces), work.columns, hardware.multiprocessors))


def _overlapped(product: float, link: float, chunks: int, hardware: Hardware) -> float:
    if not hardware.overlaps:
        return product + link
    return max(product, link) + min(product, link) / chunks


def _unfused(work: Work, hardware: Hardware) -> float:
    launch, latency = hardware.launch_overhead_s, hardware.link_latency_s
    busy = product_seconds(work, hardware) + link_seconds(work, hardware)
    overhead = launch + work.parts * (launch + (work.world - 1) * latency)
    return busy + _memory_seconds(work.unfused_local_bytes, hardware) + overhead


def _fused(work: Work, hardware: Hardware) -> float:
    launch, latency = hardware.launch_overhead_s, hardware.link_latency_s
    chunks = work.world * work.pieces
    moved = work.parts * (work.world - 1) * work.pieces
    product = product_seconds(work, hardware) * _wave_loss(work, hardware) * (1 + CHUNK_LOSS * (1 - 1 / chunks))
    busy = _overlapped(product, link_seconds(work, hardware), chunks, hardware)
    overhead = chunks * launch + work.parts * (launch + 2 * latency) + moved * (launch + latency)
    return busy + _memory_seconds(work.fused_local_bytes, hardware) + overhead


def _tiles(work: Work, hardware: Hardware) -> float:
    launch, latency = hardware.launch_overhead_s, hardware.link_latency_s
    moved = work.parts * (work.world - 1) * work.pieces
    product = product_seconds(work, hardware) * (1 + TILE_LOSS)
    busy = _overlapped(product, link_seconds(work, hardware), work.world * work.pieces, hardware)
    overhead = launch + work.parts * (launch + 2 * latency) + moved * latency
    return busy + _memory_seconds(work.fused_local_bytes, hardware) + overhead


_FORMULAS = {"unfused": _unfused, "fused": _fused, "tiles": _tiles}


def predict(work: Work, hardware: Hardware, modes: tuple[str, ...] = MODES) -> dict[str, float]:
    """Predicted seconds of ``work`` in each of ``modes``, by the formulas of this module.

    Raises:
        ValueError: an unknown mode, or a dtype for which the hardware has no rate.
    """
    for mode in modes:
        if mode not in _FORMULAS:
            raise ValueError(f"modes: expected some of {MODES}, got {mode!r}")
    return {mode: _FORMULAS[mode](work, hardware) for mode in modes}


def pick_mode(seconds: Mapping[str, float], margin: float = MEASURED_MARGIN) -> str:
    """The mode to use, given its and the others' seconds: unfused unless another is faster by more than ``margin``.

    Equally fast ones are taken in alphabetical order, so that all ranks pick alike.

    Args:
        seconds: by mode; the fastest is taken where ``"unfused"`` is not among them.
        margin: share of the unfused time.

    Raises:
        ValueError: ``seconds`` is empty.
    """
    if not seconds:
        raise ValueError("seconds: expected at least one mode, got none")
    fastest = min(sorted(seconds), key=lambda mode: seconds[mode])
    if "unfused" in seconds and not seconds[fastest] < (1 - margin) * seconds["unfused"]:
        return "unfused"
    return fastest
