"""Rates of known devices, as data.

Peak rates are those of the manufacturer's data sheets: dense (without sparsity), and of a link in one direction (data
sheets add both).  They are limits; which share of them is reached is the cost model's business.

=================  ===============================================================================================
device             source
=================  ===============================================================================================
A100               NVIDIA A100 Tensor Core GPU data sheet
H100 SXM, PCIe     NVIDIA H100 Tensor Core GPU data sheet (its tensor rates are with sparsity, halved here)
H100 NVL           NVIDIA H100 Tensor Core GPU data sheet, later edition (halved likewise)
H200, H200 NVL     NVIDIA H200 Tensor Core GPU data sheet (halved likewise)
B200               NVIDIA Blackwell architecture technical brief, GPU of an HGX B200
L40S               NVIDIA L40S data sheet; fp64 is 1/64 of fp32 (Ada architecture white paper)
InfiniBand         DGX data sheets, one port for each GPU: A100 ConnectX-6, HDR, 200 Gb/s; H100, H200 and B200
                   ConnectX-7, NDR, 400 Gb/s; XDR, 800 Gb/s: ConnectX-8 SuperNIC data sheet
=================  ===============================================================================================

Numbers of multiprocessors: A100, H100 and L40S (18,176 cores, 128 each) of the white papers of the Ampere, Hopper and
Ada architectures; an H200 is an H100 with other memory; of a B200 as its driver reports it (148).

Sizes of memory are the same sheets', read as 10^9 bytes: drivers report somewhat more, which is left for contexts and
for what allocators lose.  The B200's is an eighth of a DGX B200's (DGX B200 data sheet: 1,440 GB).

Latencies and launch overheads are on no data sheet: they are estimates of the usual order of magnitude, and so is
everything about :data:`GENERIC_GPU` and :data:`CPU`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType

__all__ = [
    "CPU",
    "ETHERNET_100_BYTES_PER_S",
    "GENERIC_GPU",
    "INFINIBAND_HDR_BYTES_PER_S",
    "INFINIBAND_NDR_BYTES_PER_S",
    "INFINIBAND_XDR_BYTES_PER_S",
    "KNOWN_GPUS",
    "PCIE4_BYTES_PER_S",
    "PCIE5_BYTES_PER_S",
    "Hardware",
    "hardware_for",
]

_GPU_LAUNCH_S = 4e-6
_NVLINK_LATENCY_S = 3e-6
_PCIE_LATENCY_S = 6e-6

PCIE4_BYTES_PER_S = 32e9
"""Of 16 lanes of PCI Express 4.0, which an A100 or L40S has, in one direction."""

PCIE5_BYTES_PER_S = 64e9
"""Of 16 lanes of PCI Express 5.0, which an H100, H200 or B200 has, in one direction."""

ETHERNET_100_BYTES_PER_S = 12.5e9
"""Of one port of 100-gigabit Ethernet (IEEE 802.3ba), in one direction."""

INFINIBAND_HDR_BYTES_PER_S = 25e9
"""Of one HDR port, which one A100 has, in one direction."""

INFINIBAND_NDR_BYTES_PER_S = 50e9
"""Of one NDR port, which one H100, H200 or B200 has, in one direction."""

INFINIBAND_XDR_BYTES_PER_S = 100e9
"""Of one XDR port, in one direction."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Peak rates of one device and of its link to the others.

    Attributes:
        name: what it is called in tables.
        flops: floating-point operations per second of a dense matrix product, by dtype (``"bfloat16"``, ...); fp32
            means fp32, not TF32.
        memory_bytes_per_s: of the device's memory, reads and writes counted together.
        link_bytes_per_s: in one direction, all links of one device together.
        link_latency_s: from a store on one device to its being seen on another.
        launch_overhead_s: host time of one kernel, copy or library call.
        overlaps: whether copies between ranks run beside products.  A CPU's cores do one or the other.
        memory_bytes: of the device's memory; infinite where it is not known.
        multiprocessors: that take tiles of a product; 0 where that is not known, or not what a product is cut for.
    """

    name: str
    flops: Mapping[str, float] = dataclasses.field(hash=False)
    memory_bytes_per_s: float
    link_bytes_per_s: float
    link_latency_s: float
    launch_overhead_s: float
    overlaps: bool = True
    memory_bytes: float = math.inf
    multiprocessors: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "flops", MappingProxyType(dict(self.flops)))
        rates = dict(self.flops)
        for what in ("memory_bytes_per_s", "link_bytes_per_s", "memory_bytes"):
            rates[what] = getattr(self, what)
        for what, rate in rates.items():
            if not rate > 0:
                raise ValueError(f"{self.name}: expected {what} above 0, got {rate!r}")
        for what in ("link_latency_s", "launch_overhead_s"):
            if not getattr(self, what) >= 0:
                raise ValueError(f"{self.name}: expected {what} of at least 0, got {getattr(self, what)!r}")

    def flops_of(self, dtype: str) -> float:
        """Peak floating-point operations per second in ``dtype`` (``"bfloat16"`` or ``"torch.bfloat16"``).

        Raises:
            ValueError: no rate is known for ``dtype``.
        """
        name = dtype.removeprefix("torch.")
        if name not in self.flops:
            raise ValueError(f"{self.name}: expected a dtype among {', '.join(self.flops)}, got {dtype}")
        return self.flops[name]


def _gpu(
    name: str,
    half: float,
    single: float,
    double: float,
    memory: float,
    link: float,
    latency: float,
    gigabytes: float = math.inf,
    multiprocessors: int = 0,
) -> Hardware:
    """Rates in TFLOP/s for 16-bit, fp32 and fp64 products, of memory and link in bytes/s; memory in 10^9 bytes."""
    flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12, "float64": double * 1e12}
    return Hardware(
        name,
        flops,
        memory,
        link,
        latency,
        _GPU_LAUNCH_S,
        memory_bytes=gigabytes * 1e9,
        multiprocessors=multiprocessors,
    )


# Words of a device's name, the more specific ones first. Whole words: a GH200 is not an H200, a GB200 not a B200.
_BY_WORDS: tuple[tuple[frozenset[str], Hardware], ...] = tuple(
    (frozenset(words.split()), hardware)
    for words, hardware in (
        (
            "A100 PCIE 40GB",
            _gpu("A100 PCIe 40GB", 312, 19.5, 19.5, 1.555e12, PCIE4_BYTES_PER_S, _PCIE_LATENCY_S, 40, 108),
        ),
        ("A100 PCIE", _gpu("A100 PCIe 80GB", 312, 19.5, 19.5, 1.935e12, PCIE4_BYTES_PER_S, _PCIE_LATENCY_S, 80, 108)),
        ("A100 SXM4 40GB", _gpu("A100 SXM 40GB", 312, 19.5, 19.5, 1.555e12, 300e9, _NVLINK_LATENCY_S, 40, 108)),
        ("A100 SXM4", _gpu("A100 SXM 80GB", 312, 19.5, 19.5, 2.039e12, 300e9, _NVLINK_LATENCY_S, 80, 108)),
        ("H100 PCIE", _gpu("H100 PCIe", 756, 51, 51, 2.0e12, PCIE5_BYTES_PER_S, _PCIE_LATENCY_S, 80, 114)),
        ("H100 NVL", _gpu("H100 NVL", 835, 60, 60, 3.9e12, PCIE5_BYTES_PER_S, _PCIE_LATENCY_S, 94, 132)),
        ("H100", _gpu("H100 SXM", 989, 67, 67, 3.35e12, 450e9, _NVLINK_LATENCY_S, 80, 132)),
        ("H200 NVL", _gpu("H200 NVL", 835, 60, 60, 4.8e12, PCIE5_BYTES_PER_S, _PCIE_LATENCY_S, 141, 132)),
        ("H200", _gpu("H200 SXM", 989, 67, 67, 4.8e12, 450e9, _NVLINK_LATENCY_S, 141, 132)),
        ("B200", _gpu("B200", 2250, 80, 40, 8.0e12, 900e9, _NVLINK_LATENCY_S, 180, 148)),
        ("L40S", _gpu("L40S", 362, 91.6, 1.43, 0.864e12, PCIE4_BYTES_PER_S, _PCIE_LATENCY_S, 48, 142)),
    )
)

KNOWN_GPUS: tuple[Hardware, ...] = tuple(hardware for _, hardware in _BY_WORDS)
"""The devices of the module's table."""

GENERIC_GPU = _gpu("unknown GPU", 100, 20, 0.5, 1.0e12, PCIE4_BYTES_PER_S, _PCIE_LATENCY_S)
"""For devices that are not in the table: a modest data-center GPU on PCIe."""

CPU = Hardware(
    name="CPU",
    flops={"float32": 1e11, "float64": 5e10, "bfloat16": 5e10, "float16": 2e10},
    memory_bytes_per_s=2e10,
    link_bytes_per_s=5e9,
    link_latency_s=2e-5,
    launch_overhead_s=5e-6,
    overlaps=False,
)
"""A rank with a few cores of a host; its link is memory that two processes share."""


def hardware_for(device_name: str) -> Hardware:
    """The hardware called ``device_name`` by ``torch.cuda.get_device_name``, or ``"cpu"``.

    An unknown GPU, and a slice of one (MIG, whose rates are not those of the whole), is :data:`GENERIC_GPU`.
    """
    if device_name.lower() == "cpu":
        return CPU
    words = frozenset(re.split(r"[^A-Z0-9.]+", device_name.upper()))
    if "MIG" not in words:
        for wanted, hardware in _BY_WORDS:
            if wanted <= words:
                return hardware
    return GENERIC_GPU
