"""Memory of an operator beside its inputs, outputs and gradients, in chunks of one rank's gathered operand."""

from __future__ import annotations

import torch
import torch.distributed as dist

import odysseus_kernels as ody
from benchmarks.common.memory import peak_of_others, record_allocations
from odysseus_kernels.comm.groups import group_transports


def extra_chunks(rank: int, world: int, operator: str, dtype: str, backward: bool) -> tuple[float, float, int]:
    """(extra memory, largest single private allocation), in chunks, and the bytes of a chunk.

    Sizes such that what does not scale with a chunk (signals, alignment) is small beside one: a chunk is the shard
    that is gathered, or the slice of the output that is scattered, whichever is larger.
    """
    kind = getattr(torch, dtype)
    config = ody.OverlapConfig(mode="fused", transport="symmetric", timeout_s=60)
    rows, features, outputs = 1024, 256, 192
    length = rows * world if operator == "linear_reduce_scatter" else rows
    x = torch.randn(length, features).to(kind).requires_grad_(backward)
    shape = (2048, features) if operator == "zero3_linear" else (outputs, features)
    weight = torch.randn(shape).to(kind).requires_grad_(backward)
    chunk = {"all_gather_linear": rows * features, "linear_reduce_scatter": rows * outputs}.get(
        operator, weight.numel()
    )
    group = dist.new_group()

    def call() -> list[torch.Tensor]:
        y = getattr(ody, operator)(x, weight, group=group, config=config)
        if not backward:
            return [y]
        return [y, *torch.autograd.grad(y, (x, weight), grad)]

    grad = torch.ones_like(getattr(ody, operator)(x.detach(), weight.detach(), group=group, config=config))
    for _ in range(3):  # until the transport's windows have been used in turn
        call()
    dist.barrier()
    results, events = record_allocations(call)
    private, largest = peak_of_others(events, {result.untyped_storage().data_ptr() for result in results})
    transports = group_transports(group)
    reserved = transports.choose(config, torch.device("cpu")).reserved_bytes
    dist.barrier()
    transports.close()
    dist.destroy_process_group(group)
    size = chunk * kind.itemsize
    return (private + reserved) / size, largest / size, size
