"""Machines by name: a device, how many of them a host has, and what connects hosts.

Figures and their sources are those of ``planner/hardware.py`` and, for the scale model's links, ``planner/scale.py``;
this file only says which belong together.
"""

from __future__ import annotations

import dataclasses
import re

from odysseus_kernels.planner.cost_model import LINK_SHARE, PRODUCT_SHARE
from odysseus_kernels.planner.hardware import (
    CPU,
    ETHERNET_100_BYTES_PER_S,
    INFINIBAND_HDR_BYTES_PER_S,
    INFINIBAND_NDR_BYTES_PER_S,
    INFINIBAND_XDR_BYTES_PER_S,
    PCIE4_BYTES_PER_S,
    PCIE5_BYTES_PER_S,
    Hardware,
    hardware_for,
)
from odysseus_kernels.planner.scale import scaled_rate

__all__ = ["ATTENTION_SHARE", "MACHINES", "NETWORKS", "Machine", "machine_for"]

ATTENTION_SHARE = 0.6
"""Share of the peak that attention reaches: the FlashAttention-2 paper (arXiv:2307.08691) has up to 0.73 of an A100's
forward and 0.63 backward, FlashAttention-3 (arXiv:2407.08608) 0.75 of an H100's forward."""

_NODE = 8
_NETWORK_LATENCY_S = 1e-5  # an estimate, as those of hardware.py

NETWORKS: dict[str, tuple[float, str]] = {
    "100g": (ETHERNET_100_BYTES_PER_S, "100 Gb/s Ethernet (IEEE 802.3ba)"),
    "200g": (INFINIBAND_HDR_BYTES_PER_S, "HDR InfiniBand, 200 Gb/s (DGX A100 data sheet)"),
    "400g": (INFINIBAND_NDR_BYTES_PER_S, "NDR InfiniBand, 400 Gb/s (DGX H100, H200 and B200 data sheets)"),
    "800g": (INFINIBAND_XDR_BYTES_PER_S, "XDR InfiniBand, 800 Gb/s (ConnectX-8 SuperNIC data sheet)"),
}
"""Ports between hosts, one for each rank: bytes/s in one direction, and their source."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What ranks run on.

    Attributes:
        name: as it is given to :func:`machine_for`.
        device: rates and memory of one rank, and its link within a host.
        node: ranks of a host.
        network_bytes_per_s: of one rank's port to other hosts, in one direction.
        network_latency_s: of that port.
        host_bytes_per_s: between a device and its host's memory, in one direction.
        source: where the figures are from.
        attention_share: of the device's peak, reached by attention.
        layer_overhead_s: of one layer, forward and backward, that no rate explains: calls, and kernels that are small.
        cpu: whether its ranks are processes on cores.
    """

    name: str
    device: Hardware
    node: int
    network_bytes_per_s: float
    network_latency_s: float
    host_bytes_per_s: float
    source: str
    attention_share: float = ATTENTION_SHARE
    layer_overhead_s: float = 0.0
    cpu: bool = False

    def __post_init__(self) -> None:
        for what in ("node", "network_bytes_per_s", "host_bytes_per_s", "attention_share"):
            if not getattr(self, what) > 0:
                raise ValueError(f"{self.name}: expected {what} above 0, got {getattr(self, what)!r}")

    def within_host(self, extent: int, world_size: int) -> bool:
        """Whether blocks of ``extent`` consecutive ranks, of ``world_size`` in all, never span two hosts."""
        return world_size <= self.node or self.node % extent == 0

    def link(self, extent: int, world_size: int) -> tuple[float, float]:
        """(bytes/s, latency in s) between the ranks of a block of ``extent`` consecutive ones.

        Within a host that is the device's own link.  A group that spans hosts goes at the slower of link and network:
        a ring of its ranks passes both.
        """
        device = self.device
        if self.within_host(extent, world_size):
            return device.link_bytes_per_s, device.link_latency_s
        rate = min(device.link_bytes_per_s, self.network_bytes_per_s)
        return rate, max(device.link_latency_s, self.network_latency_s)


def _gpus(name: str, device_name: str, network: str, host: float) -> Machine:
    device = hardware_for(device_name)
    rate, port = NETWORKS[network]
    source = f"{device.name}'s data sheet, {_NODE} in a host; between hosts, for each of them, {port}"
    return Machine(name, device, _NODE, rate, _NETWORK_LATENCY_S, host, source)


MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        _gpus("a100-nvlink", "A100 SXM4", "200g", PCIE4_BYTES_PER_S),
        _gpus("a100-40gb-nvlink", "A100 SXM4 40GB", "200g", PCIE4_BYTES_PER_S),
        _gpus("a100-pcie", "A100 PCIE", "200g", PCIE4_BYTES_PER_S),
        _gpus("h100-nvlink", "H100", "400g", PCIE5_BYTES_PER_S),
        _gpus("h100-pcie", "H100 PCIE", "400g", PCIE5_BYTES_PER_S),
        _gpus("h200-nvlink", "H200", "400g", PCIE5_BYTES_PER_S),
        _gpus("h200-pcie", "H200 NVL", "400g", PCIE5_BYTES_PER_S),
        _gpus("b200-nvlink", "B200", "400g", PCIE5_BYTES_PER_S),
        _gpus("l40s-pcie", "L40S", "200g", PCIE4_BYTES_PER_S),
    )
}
"""GPU machines by name.  There is no B200 for PCIe."""


def _cpu() -> Machine:
    source = "estimates for a rank with a few cores; its host's memory is not known, so that everything fits"
    return Machine("cpu", CPU, 64, ETHERNET_100_BYTES_PER_S, 3e-5, CPU.memory_bytes_per_s, source, cpu=True)


def _scale_model(name: str) -> Machine:
    """Two CPU ranks behind the slow link that has a fast machine's ratio of communication to compute."""
    rate = scaled_rate(name, flops=CPU.flops_of("float32") * PRODUCT_SHARE)
    # The kernel paces what is sent and needs next to nothing of the cores for it: copies run beside products, and what
    # is set is reached, of which the cost model would take its share.
    link = rate.bytes_per_s / LINK_SHARE
    device = dataclasses.replace(
        CPU, name=f"scale model of {rate.label}", link_bytes_per_s=link, link_latency_s=1e-4, overlaps=True
    )
    return Machine(name, device, 1, link, 1e-4, CPU.memory_bytes_per_s, rate.formula.split(" F':")[0], cpu=True)


def machine_for(name: str) -> Machine:
    """The machine called ``name``.

    Args:
        name: a key of :data:`MACHINES`, with ``+100g``, ``+200g``, ``+400g`` or ``+800g`` behind it for another
            network (``"h200-nvlink+800g"``); ``"cpu"``; or a link of the scale model (``"h100-nvlink@8"``).

    Raises:
        ValueError: for another name; it lists those that are known.
    """
    text = name.strip().lower()
    if "@" in text:
        return _scale_model(text)
    if text == "cpu":
        return _cpu()
    base, plus, network = text.partition("+")
    if base not in MACHINES or (plus and network not in NETWORKS):
        raise ValueError(
            f"hardware: expected one of {', '.join(MACHINES)}, with +{', +'.join(NETWORKS)} behind it for another "
            f"network; cpu; or a link of the scale model, such as h100-nvlink@8; got {name!r}"
        )
    machine = MACHINES[base]
    if not plus:
        return machine
    rate, port = NETWORKS[network]
    source = re.sub("for each of them, .*", f"for each of them, {port}", machine.source)
    return dataclasses.replace(machine, name=text, network_bytes_per_s=rate, source=source)
