"""Memory of Ring attention on one rank of an emulated ring: what the operator holds, whatever the transport holds."""

from __future__ import annotations

import torch
import torch.distributed as dist

import odysseus_kernels as ody
from benchmarks.common.memory import peak_of_others, record_allocations
from odysseus_kernels.comm.groups import use_transport
from odysseus_kernels.comm.transport import Call, Transport

ROWS, HEADS, WIDTH = 512, 4, 32


class OneOfMany(Transport):
    """Visits ``world`` ranks that all have this one's keys and values; what is made for them goes nowhere."""

    name = "emulated"

    def execute(self, call: Call) -> None:
        assert call.exchange is not None
        exchange = call.exchange
        for hop in range(self.world):
            exchange.visit((self.rank + hop) % self.world, exchange.shared, exchange.sums)

    def _execute(self, call: Call) -> None:
        raise AssertionError("only exchanges are emulated")


def held(rank: int, world: int, ring: int, window: int | None, backward: bool) -> tuple[float, float]:
    """(peak, largest block) beside inputs and results on the first rank of ``ring``, in shards of k [S, dk]."""
    q, k, v = (torch.randn(1, HEADS, ROWS, WIDTH, requires_grad=backward) for _ in range(3))
    grad = torch.randn_like(q)
    config = ody.OverlapConfig(mode="fused")
    group = dist.group.WORLD
    assert group is not None

    def call() -> tuple[torch.Tensor, ...]:
        out = ody.ring_attention(q, k, v, group=group, window=window, config=config)
        return torch.autograd.grad(out, (q, k, v), grad) if backward else (out,)

    with use_transport(group, OneOfMany(0, ring)):
        call()
        results, events = record_allocations(call)
    peak, largest = peak_of_others(events, {result.untyped_storage().data_ptr() for result in results})
    return peak / k.nbytes, largest / k.nbytes
