"""What ranks run to see what a call does while it is not yet known that all ranks make it."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm import functional
from odysseus_kernels.comm.collective.transport import CollectiveTransport
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.transport import Call, Gather, Scatter
from odysseus_kernels.errors import RankMismatchError

_CONFIG = ody.OverlapConfig(mode="fused", transport="collective", timeout_s=20)
_LIMIT = datetime.timedelta(seconds=20)
_ROWS, _WIDTH = 8, 3


def _transport() -> CollectiveTransport:
    functional.all_gather(torch.ones(1), config=_CONFIG)
    collective = group_transports(dist.group.WORLD)._collective
    assert collective is not None
    return collective


def _shard(rank: int, call: int) -> Tensor:
    return torch.full((1, _ROWS, _WIDTH), 10.0 * call + rank)


def _gather(transport: CollectiveTransport, shard: Tensor, following: Tensor | None, seen: list[str]) -> Tensor:
    """Gathers ``shard``, with ``following`` sent ahead; ``seen`` has what was consumed, by rank."""
    out = torch.full((transport.world, *shard.shape), torch.nan)

    def consume(source: int, start: int, stop: int, block: Tensor) -> None:
        out[source, :, start:stop] = block
        seen.append(f"rank {source}")

    prefetch = None if following is None else Prefetch.of_gather(following)
    transport.execute(Call("agreement", "forward", _CONFIG, Gather(shard, consume), prefetch=prefetch))
    return out


def computes_before_peers_come(rank: int, world: int, key: str) -> list[str]:
    """The last rank makes its call when all others have multiplied what was sent ahead, their own shard, or a product
    that is to be scattered: they cannot have waited for it."""
    transport, store = _transport(), dist.distributed_c10d._get_default_store()
    late = rank == world - 1

    def others_have(what: str) -> None:
        if late:
            store.wait([f"{key} {what} {peer}" for peer in range(world - 1)], _LIMIT)

    second = _shard(rank, 2)
    _gather(transport, _shard(rank, 1), second, [])
    others_have("begun")
    seen: list[str] = []

    class Telling(list[str]):
        def append(self, one: str) -> None:
            seen.append(one)
            store.set(f"{key} gathered {rank}", one)

    store.set(f"{key} begun {rank}", "")
    others_have("gathered")
    out = _gather(transport, second, None, Telling())
    for peer in range(world):
        assert torch.equal(out[peer], _shard(peer, 2))

    def produce(target: int, start: int, stop: int, block: Tensor) -> None:
        block.fill_(rank + 1)
        store.set(f"{key} made {rank}", "")

    others_have("made")
    total = torch.full((1, _ROWS, _WIDTH), torch.nan)
    transport.execute(Call("agreement", "forward", _CONFIG, scatter=Scatter(total, produce)))
    assert torch.equal(total, torch.full_like(total, world * (world + 1) / 2))
    return seen


def nothing_leaves_before_ranks_agree(rank: int, world: int, sends_ahead: bool) -> tuple[str, list[str]]:
    """One rank gathers something else than was sent ahead; the error, and what was computed before it."""
    transport = _transport()
    second, third = _shard(rank, 2), _shard(rank, 3)
    _gather(transport, _shard(rank, 1), second, [])
    seen: list[str] = []
    wanted = torch.ones(1, _ROWS + 1, _WIDTH) if rank == 0 else second
    message = ""
    try:
        _gather(transport, wanted, third if sends_ahead else None, seen)
    except RankMismatchError as error:
        message = str(error)
    assert transport._ahead is None, "sent ahead by a call that was not made"
    # The group goes on, and nothing of that call is on the way.
    out = _gather(transport, third, None, [])
    for peer in range(world):
        assert torch.equal(out[peer], _shard(peer, 3))
    return message, seen
