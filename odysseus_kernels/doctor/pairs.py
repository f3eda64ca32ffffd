"""How fast every two ranks exchange bytes: one pair after another, so that none disturbs the next."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from odysseus_kernels.config import TransportName
from odysseus_kernels.doctor.bandwidth import received_per_s
from odysseus_kernels.doctor.report import PairRate

__all__ = ["LIMIT_S", "decline", "measure_pairs", "pairs_in_order"]

LIMIT_S = 10.0
"""Seconds for all pairs: N ranks have N(N-1)/2 of them, and 64 ranks would take minutes."""

_SHARD_BYTES = 4 << 20
_ROUNDS = 5
_GO, _STOP = b"go", b"stop"


def pairs_in_order(world: int) -> list[tuple[int, int]]:
    """Every two of ``world`` ranks, neighbours first: where time runs out, each rank has been in some."""
    return [(rank, rank + distance) for distance in range(1, world) for rank in range(world - distance)]


def measure_pairs(
    store: dist.Store,
    rank: int,
    world: int,
    transports: Sequence[TransportName],
    device: torch.device,
    timeout_s: float,
    limit_s: float = LIMIT_S,
) -> list[PairRate]:
    """Rates of the pairs in which this rank is the first; every rank calls it.

    The first rank says through the store which pair is next, and that it is the last; the others compute nothing
    meanwhile.

    Args:
        store: shared by the ranks.
        rank, world: the ranks, and which one this is.
        transports: those that serve this rank; what does not serve all is left out.
        device: where tensors lie.
        timeout_s: limit of each wait for a rank.
        limit_s: seconds after which no further pair begins.

    Raises:
        CommunicationError: ranks of a pair could not meet, or one is lost or silent; no pair follows.
        DistStoreError: a rank was silent for longer than a pair may take.
    """
    limit = datetime.timedelta(seconds=2 * timeout_s)  # of a pair: to connect, and to exchange
    store.set(_serves(rank), " ".join(transports))
    said = [_serves(one) for one in range(world)]
    store.wait(said, limit)
    common = [name for name in transports if all(name in store.get(key).decode().split() for key in said)]
    deadline = time.monotonic() + limit_s
    found: list[PairRate] = []
    going = True
    order = pairs_in_order(world) if common else []
    for number, pair in enumerate(order):
        ends = [f"pairs/{number}/{member}" for member in pair]
        if rank == 0:
            store.set(f"pairs/{number}", _text(going and time.monotonic() < deadline))
        store.wait([f"pairs/{number}"], limit)
        if store.get(f"pairs/{number}") != _GO:
            break
        if rank in pair:
            done = False
            try:
                rates = _measure(pair, common, device, timeout_s)
                done = True
            finally:
                store.set(f"pairs/{number}/{rank}", _text(done))
                if rank == 0 and not done and number + 1 < len(order):
                    store.set(f"pairs/{number + 1}", _text(False))
            if rank == pair[0]:
                found += rates
        if rank == 0:
            store.wait(ends, limit)
            going = all(store.get(end) == _GO for end in ends)
    return found


def decline(store: dist.Store, rank: int) -> None:
    """Says that this rank is in no pair, unless :func:`measure_pairs` has begun, so that the others do not wait."""
    if not store.check([_serves(rank)]):
        store.set(_serves(rank), "")


def _serves(rank: int) -> str:
    return f"pairs/of/{rank}"


def _text(going: bool) -> str:
    return (_GO if going else _STOP).decode()


def _measure(
    pair: tuple[int, int], transports: Sequence[TransportName], device: torch.device, timeout_s: float
) -> list[PairRate]:
    limit = datetime.timedelta(seconds=timeout_s)
    # Only its members make it.  Both transports use it: a second one of the same ranks would meet by the same name.
    group = dist.new_group(list(pair), timeout=limit, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    try:
        return [
            PairRate(name, *pair, received_per_s(group, _SHARD_BYTES, name, device, timeout_s, _ROUNDS))
            for name in transports
        ]
    finally:
        dist.destroy_process_group(group)  # and with it its segments: each rank has N-1 such groups
