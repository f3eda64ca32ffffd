"""The rate of a slow link at which two slow ranks have a fast machine's ratio of communication to compute.

On a machine with N ranks, each with F FLOP/s, a link of B bytes/s in each direction and elements of e bytes, a layer of
T operations whose strategy sends E elements takes T/(N·F) and f(N)·E·e/B with f(N) = (N − 1)/N.  Two ranks with F′, e′
and a link of rate R take T/(2·F′) and f(2)·E·e′/R.  Both quotients are equal at

    R = B · (F′/F) · (e′/e) · (f(2)/f(N)) · (2/N)

The 2/N is there because all ranks together share the compute while each sends nearly all that it gathers.  It scales
rates and nothing else: latencies, kernels, and how many messages there are stay those of the small machine.  B and R
are what the line can carry, F and F′ what products reach: what messages reach of a line is each machine's own.
"""

from __future__ import annotations

import dataclasses
import re

from odysseus_kernels.planner.cost_model import PRODUCT_SHARE
from odysseus_kernels.planner.hardware import (
    INFINIBAND_HDR_BYTES_PER_S,
    INFINIBAND_NDR_BYTES_PER_S,
    Hardware,
    hardware_for,
)

__all__ = ["LINKS", "ModelledLink", "ScaledRate", "parse_link", "scaled_rate"]

_MODEL_RANKS = 2
_MOST_RANKS = 65536


@dataclasses.dataclass(frozen=True)
class ModelledLink:
    """The link of a machine's ranks that is to be modelled.

    Attributes:
        name: key in :data:`LINKS`.
        machine: its ranks.
        bytes_per_s: B, of one rank in one direction.
        source: of B.
    """

    name: str
    machine: Hardware
    bytes_per_s: float
    source: str

    @property
    def flops(self) -> float:
        """F: the data sheet's bf16 peak times :data:`PRODUCT_SHARE`, the share that library products reach."""
        return self.machine.flops_of("bfloat16") * PRODUCT_SHARE


def _own(name: str, kind: str, device: str) -> ModelledLink:
    machine = hardware_for(device)
    return ModelledLink(name, machine, machine.link_bytes_per_s, f"{kind} of the {machine.name}'s data sheet")


def _infiniband(name: str, device: str, port: str, bytes_per_s: float) -> ModelledLink:
    source = f"one {port} InfiniBand port ({bytes_per_s * 8 / 1e9:g} Gb/s) for each GPU, DGX data sheet"
    return ModelledLink(name, hardware_for(device), bytes_per_s, source)


LINKS: dict[str, ModelledLink] = {
    link.name: link
    for link in (
        _own("a100-nvlink", "NVLink", "A100 SXM4"),
        _own("h100-nvlink", "NVLink", "H100"),
        _own("h200-nvlink", "NVLink", "H200"),
        _own("b200-nvlink", "NVLink", "B200"),
        _infiniband("a100-ib", "A100 SXM4", "HDR", INFINIBAND_HDR_BYTES_PER_S),
        _infiniband("h100-ib", "H100", "NDR", INFINIBAND_NDR_BYTES_PER_S),
        _infiniband("h200-ib", "H200", "NDR", INFINIBAND_NDR_BYTES_PER_S),
        _infiniband("b200-ib", "B200", "NDR", INFINIBAND_NDR_BYTES_PER_S),
        _own("a100-pcie", "PCIe", "A100 PCIE"),
        _own("h100-pcie", "PCIe", "H100 PCIE"),
        _own("l40s-pcie", "PCIe", "L40S"),
    )
}
"""Links by name, with sources in ``hardware.py``."""


@dataclasses.dataclass(frozen=True)
class ScaledRate:
    """A rate R with the numbers it comes from.

    Attributes:
        link: what is modelled.
        ranks: N.
        flops: F′ of one rank of the model, FLOP/s.
        element_size: e′, bytes.
        modelled_element_size: e, bytes.
    """

    link: ModelledLink
    ranks: int
    flops: float
    element_size: int = 4
    modelled_element_size: int = 2

    @property
    def label(self) -> str:
        """As it is given on a command line: ``h100-nvlink@8``."""
        return f"{self.link.name}@{self.ranks}"

    @property
    def bytes_per_s(self) -> float:
        """R, in one direction."""
        return (
            self.link.bytes_per_s
            * (self.flops / self.link.flops)
            * (self.element_size / self.modelled_element_size)
            * (_sent(_MODEL_RANKS) / _sent(self.ranks))
            * (_MODEL_RANKS / self.ranks)
        )

    @property
    def formula(self) -> str:
        """The formula with its numbers, and where B, F and F′ come from."""
        sent = f"{_sent(_MODEL_RANKS):.3f}/{_sent(self.ranks):.3f}"
        peak = self.link.machine.flops_of("bfloat16") / 1e12
        return (
            f"R = B·(F'/F)·(e'/e)·(f(2)/f(N))·(2/N), f(N) = (N-1)/N: {self.link.bytes_per_s / 1e9:g} GB/s · "
            f"({self.flops / 1e9:.1f} GFLOP/s / {self.link.flops / 1e12:.0f} TFLOP/s) · "
            f"({self.element_size}/{self.modelled_element_size}) · ({sent}) · "
            f"(2/{self.ranks}) = {self.bytes_per_s / 1e6:.1f} MB/s = {self.bytes_per_s * 8 / 1e6:.0f} Mb/s. "
            f"B: {self.link.source}. F: the data sheet's {peak:g} TFLOP/s in bf16 x {PRODUCT_SHARE:g}, the share that "
            f"library products reach. F': fp32 product of one thread, measured in this run."
        )


def _sent(ranks: int) -> float:
    return (ranks - 1) / ranks


def parse_link(text: str) -> tuple[ModelledLink, int]:
    """(link, N) of ``"h100-nvlink@8"``.

    Raises:
        ValueError: for a name that is not in :data:`LINKS`, or N that is not 2 to 65536.
    """
    match = re.fullmatch(r"([a-z0-9-]+)@([0-9]+)", text.strip().lower())
    name = match[1] if match else text.strip().lower().partition("@")[0]
    if name not in LINKS:
        raise ValueError(
            f"link: expected one of {', '.join(LINKS)}, with @ and a number of ranks behind it, got {text!r}"
        )
    if match is None or not _MODEL_RANKS <= int(match[2]) <= _MOST_RANKS:
        raise ValueError(f"link: expected {name}@N with 2 to {_MOST_RANKS} ranks N, such as {name}@8, got {text!r}")
    return LINKS[name], int(match[2])


def scaled_rate(text: str, *, flops: float, element_size: int = 4) -> ScaledRate:
    """The rate of a link between two ranks that stands for ``"h100-nvlink@8"``.

    Args:
        text: name and number of ranks, see :func:`parse_link`.
        flops: F′, reached by one rank of the model, FLOP/s.
        element_size: e′, bytes; the machine's is bf16's.

    Raises:
        ValueError: as :func:`parse_link`, and for ``flops`` that are not above 0.
    """
    if not flops > 0:
        raise ValueError(f"flops: expected a measured rate above 0, got {flops!r}")
    link, ranks = parse_link(text)
    return ScaledRate(link, ranks, flops, element_size)
