"""What the planner's cost model predicts for a row of real ranks on GPUs, before anything is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from benchmarks.operators.cases import Case
from odysseus_kernels.planner.cost_model import Work, link_seconds, predict, product_seconds
from odysseus_kernels.planner.hardware import hardware_for

__all__ = ["PREDICTED", "predicted_seconds"]

PREDICTED = ("gemm", "communication symmetric", "unfused symmetric", "fused symmetric")
"""Variants that are predicted, as the report calls them."""


def predicted_seconds(case: Case, world: int, dtype: str, gpu: str) -> dict[str, float]:
    """Seconds of everything in :data:`PREDICTED`, the phases of a row added up.

    Args:
        case: the row.
        world: ranks, at least 2.
        dtype: name of the tensors' type.
        gpu: name of the device, as torch gives it; for one that is not known the predictions are those of
            ``planner.hardware.GENERIC_GPU``.

    Example::

        >>> from benchmarks.operators.cases import make_cases
        >>> found = predicted_seconds(make_cases(8)[0], 8, "bfloat16", "NVIDIA H200")
        >>> found["unfused symmetric"] > found["gemm"]
        True
    """
    hardware = hardware_for(gpu)
    total = Counter[str]()
    for work in _phases(case, world, dtype):
        modes = predict(work, hardware, ("unfused", "fused"))
        seconds = (product_seconds(work, hardware), link_seconds(work, hardware), modes["unfused"], modes["fused"])
        total.update(dict(zip(PREDICTED, seconds, strict=True)))
    return dict(total)


def _phases(case: Case, world: int, dtype: str) -> Iterator[Work]:
    """The forward pass and, if the row has one, the backward pass, which gathers again what the forward pass did."""
    itemsize = getattr(torch, dtype).itemsize
    elements = {
        "all_gather_linear": case.tokens // world * case.inner,
        "linear_reduce_scatter": case.tokens // world * sum(case.outer),
        "zero3_linear": sum(case.outer) // world * case.inner,
    }
    chunk = float(elements[case.operator] * itemsize)
    scatters_forward = case.operator == "linear_reduce_scatter"
    # The backward pass of a reduce-scatter is a gather; of a gather it is one more, and a reduce-scatter.
    forward, backward = ((0.0, chunk), (chunk, 0.0)) if scatters_forward else ((chunk, 0.0), (chunk, chunk))
    products = case.flops(world) / (3 if case.backward else 1)
    # A chunk's product is known of the forward pass; the backward pass is two products of different shapes.
    rows = case.tokens // world
    columns = sum(case.outer) // (world if case.operator == "zero3_linear" else 1)
    phases = ((forward, products, rows, columns), (backward, 2 * products, 0, 0))
    for (gathered, scattered), flops, height, width in phases:
        parts = (gathered > 0) + (scattered > 0)
        yield Work(
            flops=flops,
            world=world,
            dtype=dtype,
            gathered_bytes=gathered,
            scattered_bytes=scattered,
            unfused_local_bytes=2.0 * world * chunk * parts,
            fused_local_bytes=2.0 * chunk * parts,
            rows=height,
            columns=width,
        )
        if not case.backward:
            return
