"""Ulysses' two layouts, whole sequences cut by heads and all heads cut by tokens, and how they correspond.

Rank r of N holds either its L/N tokens of all heads, or its heads for all L tokens.  Going from one to the other each
rank makes one block for every other, which is the ``received`` side of an exchange: no rank stages what it sends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.groups import dispatch
from odysseus_kernels.comm.transport import Call, Transport
from odysseus_kernels.config import OverlapConfig

__all__ = ["HeadCut", "all_to_all", "check_head_counts", "check_mode", "exchange_parts", "tokens_of_ranks"]

Phase = Literal["forward", "backward"]
Fill = Callable[[int, Sequence[Tensor]], None]


@dataclasses.dataclass(frozen=True)
class HeadCut:
    """Which columns of a projection's n outputs each rank has as its heads.

    Attributes:
        features: n, of the whole projection.
        world: number of ranks N.
        sharers: ranks that have the same columns: 1, or N / heads where there are fewer heads than ranks.
    """

    features: int
    world: int
    sharers: int = 1

    @property
    def width(self) -> int:
        """Columns of one rank."""
        return self.features * self.sharers // self.world

    def columns(self, rank: int) -> slice:
        """Where they begin and end."""
        first = rank // self.sharers * self.width
        return slice(first, first + self.width)

    def sum_sharers(self, parts: Tensor) -> Tensor:
        """[..., n] from ``parts`` [world, ..., width] of all ranks; what ranks with the same columns have adds up."""
        if self.sharers > 1:
            wide = torch.promote_types(parts.dtype, torch.float32)
            parts = parts.unflatten(0, (-1, self.sharers)).sum(1, dtype=wide).to(parts.dtype)
        return parts.movedim(0, -2).flatten(-2)


def tokens_of_ranks(tensor: Tensor, world: int) -> Tensor:
    """``tensor`` [..., L, w], contiguous, as [world, batch, L / world, w]: a view by the rank that has the tokens."""
    length, width = tensor.shape[-2:]
    return tensor.view(tensor.shape[:-2].numel(), world, length // world, width).transpose(0, 1)


def exchange_parts(transport: Transport, call: Call, received: Sequence[Tensor], fill: Fill) -> None:
    """``call`` as an all-to-all with nothing to overlap: ``fill(rank, blocks)`` writes what ``rank`` is to have.

    ``received`` and the blocks are as :class:`~odysseus_kernels.comm.exchange.Exchange` has them.  Where ranks read one
    another's memory, what is filled lies where it is read from; a process group is given one packed collective.
    """
    if transport.name != "collective":

        def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            fill(rank, made)

        exchange = Exchange(visit, received=tuple(received))
        transport.execute(dataclasses.replace(call, exchange=exchange))
        return
    sizes = [part[0].numel() for part in received]
    packed = received[0].new_empty((transport.world, sum(sizes)))
    arrived = torch.empty_like(packed)

    def blocks(rows: Tensor) -> list[Tensor]:
        return [row.view(part.shape[1:]) for row, part in zip(rows.split(sizes), received, strict=True)]

    for rank in range(transport.world):
        fill(rank, blocks(packed[rank]))
    transport.all_to_all(call, packed, arrived)
    for rank in range(transport.world):
        for part, block in zip(received, blocks(arrived[rank]), strict=True):
            part[rank].copy_(block)


def all_to_all(
    operator: str,
    phase: Phase,
    group: dist.ProcessGroup,
    config: OverlapConfig,
    received: Sequence[Tensor],
    fill: Fill,
    shapes: str,
) -> None:
    """:func:`exchange_parts` in ``group``."""
    plain = dataclasses.replace(config, mode="unfused")

    def run(transport: Transport, _: OverlapConfig) -> None:
        exchange_parts(transport, Call(operator, phase, plain, shapes=shapes), received, fill)

    dispatch(group, plain, received[0].device, run)


def check_head_counts(operator: str, counts: Sequence[int], world: int) -> list[int]:
    """Ranks that share one head, for each of ``counts``.

    Raises:
        ValueError: ``world`` neither divides a count nor is a multiple of it; says which numbers of ranks would do.
    """
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{operator}: expected numbers of heads above 0, got {tuple(counts)}")

    def serves(size: int) -> bool:
        # The first count is the query heads: those are never shared.
        return counts[0] % size == 0 and all(count % size == 0 or size % count == 0 for count in counts)

    if not serves(world):
        possible = ", ".join(str(size) for size in range(1, counts[0] + 1) if serves(size))
        raise ValueError(
            f"{operator}: expected heads that {world} ranks can share out, got {tuple(counts)} heads; "
            f"with these the number of ranks can be {possible}"
        )
    return [1 if count % world == 0 else world // count for count in counts]


def check_mode(operator: str, config: OverlapConfig) -> None:
    """Refuses ``mode="tiles"`` before anything is sent: no kernel exists for it here."""
    if config.mode == "tiles":
        raise ValueError(f'{operator}: expected mode "auto", "fused" or "unfused", got "tiles": it has no such kernel')
