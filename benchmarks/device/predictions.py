"""What the planner's cost model predicts for a row of one GPU with emulated links, before anything is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from benchmarks.device.cases import EmulatedCase
from odysseus_kernels.planner.cost_model import LINK_SHARE, Work, link_seconds, predict, product_seconds
from odysseus_kernels.planner.hardware import PCIE5_BYTES_PER_S, Hardware, hardware_for
from odysseus_kernels.testing.virtual_devices import link_of

__all__ = ["PREDICTED", "predicted_seconds"]

PREDICTED = ("gemm", "link", "serial", "fused", "tiles")
"""What is predicted, as the report calls it."""


def predicted_seconds(case: EmulatedCase, gpu: str, pieces: Mapping[str, str]) -> dict[str, float]:
    """Seconds of everything in :data:`PREDICTED`.

    Args:
        case: the row.
        gpu: name of the device, as torch gives it; for one that is not known the predictions are those of
            ``planner.hardware.GENERIC_GPU``.
        pieces: in how many pieces a mode was run, by mode; ``"auto"`` and modes that are missing count as one.

    Example::

        >>> from benchmarks.device.cases import make_emulated_cases
        >>> case = make_emulated_cases(("paced:450",), quick=True)[0]
        >>> sorted(predicted_seconds(case, "NVIDIA H200", {"fused": "4"}))
        ['fused', 'gemm', 'link', 'serial', 'tiles']
    """
    hardware = _behind(hardware_for(gpu), case.link)
    chunk = float(case.chunk_bytes)
    parts = case.gathers + case.scatters
    work = Work(
        flops=case.flops,
        world=case.world,
        gathered_bytes=chunk * case.gathers,
        scattered_bytes=chunk * case.scatters,
        unfused_local_bytes=2.0 * case.world * chunk * parts,
        fused_local_bytes=2.0 * chunk * parts,
        # The backward pass is two products of different shapes.
        rows=case.rows if case.phase == "forward" else 0,
        columns=case.outer if case.phase == "forward" else 0,
    )
    found = {"gemm": product_seconds(work, hardware), "link": link_seconds(work, hardware)}
    for name, mode in (("serial", "unfused"), ("fused", "fused"), ("tiles", "tiles")):
        given = pieces.get(name, "auto")
        cut = dataclasses.replace(work, pieces=1 if given == "auto" else int(given))
        found[name] = predict(cut, hardware, (mode,))[mode]
    return found


def _behind(hardware: Hardware, link: str) -> Hardware:
    """``hardware`` with the emulated link: a paced one reaches its rate, a bus the share that links do."""
    kind, bytes_per_s = link_of(link)
    rate = bytes_per_s / LINK_SHARE if kind == "device" else PCIE5_BYTES_PER_S
    return dataclasses.replace(hardware, link_bytes_per_s=rate)
