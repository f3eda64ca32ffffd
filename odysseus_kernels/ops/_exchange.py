"""Runs an exchange in the mode that was settled: visits between transfers, or after and before all of them.

The unfused twin holds every rank's blocks at once.  Its collectives and visits run on the calling thread, one after
another, in the order of ranks; what it sends is counted as the exchange's own traffic is.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.transport import Call, Gather, Scatter, Transport

__all__ = ["execute_exchange"]


def execute_exchange(transport: Transport, call: Call) -> None:
    """``transport.execute(call)`` of an exchange without ``addressed``, or its unfused twin where the mode asks for it.

    Raises:
        CommunicationError: as ``execute`` does.
    """
    exchange = call.exchange
    assert exchange is not None and not exchange.addressed
    if call.config.mode != "unfused" or transport.world == 1:
        transport.execute(call)
        return
    plain = dataclasses.replace(call, exchange=None, prefetch=None)
    shared = [_gathered(transport, plain, tensor) for tensor in exchange.shared]
    sums = [tensor.new_empty((transport.world, *tensor.shape)) for tensor in exchange.sums]
    received = [tensor.new_empty(tensor.shape) for tensor in exchange.received]
    for rank in range(transport.world):
        exchange.visit(rank, tuple(part[rank] for part in shared), tuple(part[rank] for part in (*sums, *received)))
    for parts, out in zip(sums, exchange.sums, strict=True):
        scatter = dataclasses.replace(plain, scatter=Scatter(out.view(1, 1, -1), _unused))
        transport.reduce_scatter(scatter, parts.view(transport.world, 1, 1, -1))
    if received:
        outs = exchange.received

        def take(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            for out, part in zip(outs, given, strict=True):
                out[rank].copy_(part)

        transport.execute(dataclasses.replace(plain, exchange=Exchange(take, addressed=tuple(received))))


def _gathered(transport: Transport, plain: Call, tensor: Tensor) -> Tensor:
    out = tensor.new_empty((transport.world, *tensor.shape))
    gather = dataclasses.replace(plain, gather=Gather(tensor.view(1, 1, -1), _unused))
    transport.all_gather(gather, out.view(transport.world, 1, 1, -1))
    return out


def _unused(*_: object) -> None:
    raise AssertionError("the transport's own copy replaces this callback")
