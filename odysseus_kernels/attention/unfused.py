"""What ring attention's ``mode="unfused"`` sends: all keys and values before the first visit, gradients after the last.

By one collective for each tensor; where not all ranks see all, by an exchange of the parts that are seen, whose visits
only copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from odysseus_kernels.attention.parts import all_seen, exchange_of, seen_of
from odysseus_kernels.comm.transport import Call, Gather, Scatter, Transport
from odysseus_kernels.planner.ring import Part

__all__ = ["add_up", "gather_all"]


def gather_all(transport: Transport, call: Call, shared: tuple[Tensor, ...], parts: Sequence[Part]) -> list[Tensor]:
    """All ranks' ``shared`` as [R, ...]; of parts that this rank does not see nothing is written.

    ``call`` is that of the fused mode, whose exchange is not used.
    """
    found = [tensor.new_empty((transport.world, *tensor.shape)) for tensor in shared]
    if not all_seen(parts):

        def keep(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            for part, blocks in seen_of(parts, transport.rank, rank, given):
                for whole, block in zip(found, blocks, strict=True):
                    whole[rank][:, :, part.rows].copy_(block)

        transport.execute(dataclasses.replace(call, exchange=exchange_of(parts, keep, shared), copies=True))
        return found
    for tensor, whole in zip(shared, found, strict=True):
        one = dataclasses.replace(call, gather=Gather(_rows(tensor), _unused), exchange=None)
        transport.all_gather(one, whole.view(transport.world, *_rows(tensor).shape))
    return found


def add_up(
    transport: Transport, call: Call, made: list[Tensor], sums: tuple[Tensor, ...], parts: Sequence[Part]
) -> None:
    """``made`` [R, ...], for each rank what this one made for the parts that it sees, added up at their owners'."""
    if not all_seen(parts):

        def hand_over(rank: int, given: tuple[Tensor, ...], blocks: tuple[Tensor, ...]) -> None:
            for part, into in seen_of(parts, transport.rank, rank, blocks):
                for block, whole in zip(into, made, strict=True):
                    block.copy_(whole[rank][:, :, part.rows])

        transport.execute(dataclasses.replace(call, exchange=exchange_of(parts, hand_over, sums=sums), copies=True))
        return
    for everyone, total in zip(made, sums, strict=True):
        one = dataclasses.replace(call, scatter=Scatter(_rows(total), _unused), exchange=None)
        transport.reduce_scatter(one, everyone.view(transport.world, *_rows(total).shape))


def _rows(x: Tensor) -> Tensor:
    """[B, H, S, D], contiguous, as [B * H, S, D]."""
    return x.view(-1, *x.shape[2:])


def _unused(*_: object) -> None:
    raise AssertionError("the transport's own copy replaces this callback")
