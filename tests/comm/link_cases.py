"""Links of several ranks in one process, and what ranks run in the tests of links."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm import functional
from odysseus_kernels.comm.collective import links as links_module
from odysseus_kernels.comm.collective import transport as transport_module
from odysseus_kernels.comm.collective.connecting import connect_links
from odysseus_kernels.comm.collective.links import Links
from odysseus_kernels.comm.groups import group_transports

LIMIT_S = 20.0
Exchange = Callable[[str], list[str]]


def connect(world: int, change: Callable[[int, list[str]], list[str]] | None = None) -> list[Links | None]:
    """Links of ``world`` ranks, each on a thread; ``change`` may alter what a rank is told of the others."""
    barrier = threading.Barrier(world, timeout=LIMIT_S)
    texts = [""] * world

    def one(rank: int) -> Links | None:
        def exchange(text: str) -> list[str]:
            texts[rank] = text
            barrier.wait()
            found = list(texts)
            barrier.wait()
            return change(rank, found) if change is not None else found

        return connect_links(rank, list(range(world)), exchange, 4.0, "test")

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


def exchanged(links: list[Links], sent: list[list[Tensor]]) -> list[list[Tensor]]:
    """``sent[a][b]`` goes from rank a to rank b; what rank b received from a is in [b][a]."""
    world = len(links)
    received = [[torch.full_like(sent[peer][rank], 99) for peer in range(world)] for rank in range(world)]
    transfers = [
        one.exchange(
            {peer: sent[rank][peer] for peer in range(world) if peer != rank},
            {peer: received[rank][peer] for peer in range(world) if peer != rank},
        )
        for rank, one in enumerate(links)
    ]
    for transfer in transfers:
        assert transfer.wait(LIMIT_S)
        if transfer.error is not None:
            raise transfer.error
    return received


def _results(rank: int, world: int, config: ody.OverlapConfig) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(2, 5, 8, generator=generator, requires_grad=True)
    weight = torch.randn(6, 8, generator=generator, requires_grad=True)
    group = dist.group.WORLD
    found = [ody.all_gather_linear(x, weight, group=group, config=config)]
    found.append(ody.linear_reduce_scatter(found[0], weight.T.contiguous(), group=group, config=config))
    found.append(ody.zero3_linear(x, weight, group=group, config=config))
    sum(y.square().sum() for y in found).backward()
    assert x.grad is not None and weight.grad is not None
    parts = torch.randn(world, 3, 7, generator=generator).bfloat16()
    found += [x.grad, weight.grad, functional.all_to_all(parts, config=config)]
    found.append(functional.all_gather(x[:, :0].contiguous(), config=config))
    query, key = (torch.randn(1, 2, 4, 8, generator=generator) for _ in range(2))
    found.append(ody.ring_attention(query, key, key, group=group, config=config))
    return [one.detach() for one in found]


def with_and_without(rank: int, world: int) -> tuple[bool, list[str]]:
    """Whether operators give the same bits by links and by Gloo's collectives; and what is said without links."""
    configs = [ody.OverlapConfig(transport="collective", timeout_s=20, mode=mode) for mode in ("fused", "unfused")]
    transports = group_transports(dist.group.WORLD)
    by_links = [one for config in configs for one in _results(rank, world, config)]
    assert transports._collective is not None and transports._collective._links is not None
    transports._collective.close()
    transports._collective = None
    real = transport_module.connect_links

    def without(rank: int, names: list[int], exchange: Exchange, *others: Any) -> Links | None:
        def told(text: str) -> list[str]:
            return [one.replace('""]', '"rank 0 cannot listen"]') for one in exchange(text)]

        return real(rank, names, told, *others)

    transport_module.connect_links = without
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            by_gloo = [one for config in configs for one in _results(rank, world, config)]
    finally:
        transport_module.connect_links = real
    assert transports._collective._links is None
    said = [str(one.message) for one in caught if issubclass(one.category, ody.FallbackWarning)]
    equal = all(torch.equal(a, b) for a, b in zip(by_links, by_gloo, strict=True))
    transports._collective.close()
    transports._collective = None
    return equal and len(by_links) == len(by_gloo), said


def killed_in_a_transfer(rank: int, world: int, victim: int) -> tuple[str, str, float, list[str]]:
    """The process of rank ``victim`` ends when half a block has left it."""
    config = ody.OverlapConfig(transport="collective", timeout_s=30)
    functional.all_gather(torch.ones(4), config=config)
    if rank == victim:
        links_module.Links.exchange = _half_a_block  # type: ignore[method-assign]
    begin = time.monotonic()
    try:
        functional.all_gather(torch.ones(1 << 20), config=config)
    except ody.CommunicationError as error:
        left = [thread.name for thread in threading.enumerate() if thread.name.startswith("odysseus _")]
        return type(error).__name__, str(error), time.monotonic() - begin, left
    return "", "", 0.0, []


def _half_a_block(links: Links, sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
    for peer, courier in links._senders.items():
        block = sent[peer].numpy().tobytes()
        header = links_module._HEADER.pack(links._number + 1, len(block))
        connection: socket.socket = courier._connection
        connection.sendall(header + block[: len(block) // 2])
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def finer_pieces(rank: int, world: int) -> tuple[bool, list[int]]:
    """Results with the pieces of a link between hosts equal those of one host; how many transfers these were."""
    config = ody.OverlapConfig(transport="collective", mode="fused", timeout_s=20)
    functional.all_gather(torch.ones(1), config=config)
    transports = group_transports(dist.group.WORLD)
    assert transports._collective is not None and transports._collective._links is not None
    lane = transports._collective._lane
    assert lane is not None and not lane.between_hosts
    x = torch.randn(1, 3072, 512, generator=torch.Generator().manual_seed(rank))  # 6 MiB
    weight, found, transfers = torch.eye(512)[:8], [], []  # products with ones and zeros are exact
    for between_hosts in (False, True):
        lane.between_hosts = between_hosts
        before = transports._collective._links._number
        found.append(ody.all_gather_linear(x, weight, group=dist.group.WORLD, config=config))
        transfers.append(transports._collective._links._number - before)
    lane.between_hosts = False
    return torch.equal(found[0], found[1]), transfers
