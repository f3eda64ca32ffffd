"""Memory that an operator needs beside its inputs, outputs and gradients.

Two parts, both exact: what the call allocates through torch and holds at one moment (taken from the profiler's record
of every allocation and release, results left out by their addresses), and the buffers that the transport keeps for the
group (``reserved_bytes``).  A group of its own for each measurement keeps other rows' buffers out.  What Gloo or NCCL
allocate inside themselves is in neither, so the figures of the collective transport and of torch are lower bounds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common.memory import peak_of_others, process_growth, record_allocations
from benchmarks.common.ranks import largest_over_ranks
from benchmarks.operators.cases import Case
from benchmarks.operators.workload import Settings, Workload
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.config import OverlapConfig

__all__ = ["measure_memory"]

_WARM_UP_CALLS = 3
"""Until the transport's buffers have been used in turn and grow no more."""


def measure_memory(case: Case, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Peak extra bytes of each variant of one row, the largest over the ranks."""
    work = Workload(
        case, dtype=getattr(torch, settings.dtype), device=device, transports=settings.transports, seed=settings.seed
    )
    variants = [(mode, transport) for transport in settings.transports for mode in ("unfused", "fused")]
    variants.append(("torch", "auto"))
    measured = {}
    for mode, transport in variants:
        group = dist.new_group()
        assert isinstance(group, dist.ProcessGroup)

        def call(mode: Any = mode, transport: str = transport, group: Any = group) -> tuple[Tensor, ...]:
            return work.operate(mode, transport, group)

        for _ in range(_WARM_UP_CALLS):
            call()
        dist.barrier()
        results, events = record_allocations(call)
        private, largest = peak_of_others(events, {r.untyped_storage().data_ptr() for r in results})
        del results
        dist.barrier()
        grown = process_growth(call)
        reserved = 0
        if mode != "torch":
            transports = group_transports(group)
            reserved = transports.choose(OverlapConfig(transport=transport), device).reserved_bytes  # type: ignore[arg-type]
            dist.barrier()
            transports.close()
        dist.destroy_process_group(group)
        name = mode if mode == "torch" else f"{mode} {transport}"
        found = {
            "private_peak": private,
            "largest_allocation": largest,
            "reserved": reserved,
            "process_growth": grown,
        }
        merged = largest_over_ranks(found)
        measured[name] = {**merged, "extra": merged["private_peak"] + merged["reserved"]}
    return {
        **dataclasses.asdict(case),
        "part": case.part,
        "shape": case.shape,
        "chunk_bytes": work.chunk_bytes,
        "gathered_bytes": work.chunk_bytes * dist.get_world_size(),
        "bytes": measured,
    }
