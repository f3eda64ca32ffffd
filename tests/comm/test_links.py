"""Connections between CPU ranks: numbers, strangers, messages of other calls, lost peers, and what is left behind."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator

import link_cases as cases
import pytest
import torch

import odysseus_kernels as ody
from odysseus_kernels.comm.collective.connecting import accept_peers, listen
from odysseus_kernels.comm.collective.links import Links, LostConnectionError
from odysseus_kernels.testing.spawn import RankPools, run_ranks


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No thread and no socket outlives a test of links in this process."""
    if "ranks" in request.fixturenames:  # a pool of processes, which stays
        yield
        return

    def sockets() -> int:
        with os.scandir("/proc/self/fd") as found:
            return sum(os.readlink(one.path).startswith("socket:") for one in found if os.path.islink(one.path))

    before = sockets(), threading.active_count()
    yield
    until = time.monotonic() + 5
    while (sockets(), threading.active_count()) != before and time.monotonic() < until:
        time.sleep(0.01)
    assert (sockets(), threading.active_count()) == before


def connected(world: int) -> list[Links]:
    found = [one for one in cases.connect(world) if one is not None]
    assert len(found) == world
    return found


@pytest.mark.parametrize("world", (2, 3, 4))
def test_blocks_of_all_types_and_sizes_arrive(world: int) -> None:
    links = connected(world)
    generator = torch.Generator().manual_seed(world)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool):
        for most in (1, 7, 300_001):
            sizes = torch.randint(0, most + 1, (world, world), generator=generator).tolist()  # 0: nothing is sent
            sent = [[torch.randint(0, 2, (size,), generator=generator).to(dtype) for size in row] for row in sizes]
            for rank, row in enumerate(cases.exchanged(links, sent)):
                for peer, block in enumerate(row):
                    assert peer == rank or torch.equal(block, sent[peer][rank])
    for one in links:
        one.close()


def test_many_transfers_are_under_way_at_once() -> None:
    links = connected(2)
    sent = [[torch.full((1 << 18,), 100.0 * rank + number) for number in range(20)] for rank in range(2)]
    received = [[torch.empty(1 << 18) for _ in range(20)] for _ in range(2)]
    transfers = [
        links[rank].exchange({1 - rank: sent[rank][number]}, {1 - rank: received[rank][number]})
        for rank in range(2)
        for number in range(20)
    ]
    assert all(transfer.wait(cases.LIMIT_S) and transfer.error is None for transfer in transfers)
    for rank in range(2):
        assert all(torch.equal(a, b) for a, b in zip(received[rank], sent[1 - rank], strict=True))
    for one in links:
        one.close()


def test_a_block_of_another_call_is_refused() -> None:
    links = connected(2)
    for rank, count in ((0, 5), (1, 6)):
        links[rank].exchange({1 - rank: torch.ones(count)}, {})
    transfer = links[0].exchange({}, {1: torch.empty(5)})
    assert transfer.wait(cases.LIMIT_S) and isinstance(transfer.error, ody.CommunicationError)
    assert str(transfer.error).startswith("expected 20 bytes of transfer 2 from rank 1, got 24 bytes of transfer 1")
    # What follows on that connection is refused as well.
    later = links[0].exchange({}, {1: torch.empty(6)})
    assert later.wait(cases.LIMIT_S) and later.error is transfer.error
    for one in links:
        one.close()


def test_a_peer_that_closes_ends_transfers() -> None:
    links = connected(3)
    block = torch.empty(1 << 22)
    waiting = [links[0].exchange({}, {1: block}), links[0].exchange({}, {1: block})]
    begin = time.monotonic()
    links[1].close()
    for transfer in waiting:
        assert transfer.wait(cases.LIMIT_S)
        assert isinstance(transfer.error, LostConnectionError) and "rank 1" in str(transfer.error)
    assert time.monotonic() - begin < 5
    assert not links[0].exchange({}, {2: block}).wait(0.05)  # the other one is there, and silent
    for one in links:
        one.close()


def test_close_ends_what_is_under_way() -> None:
    links = connected(2)
    block = torch.empty(1 << 24)
    transfer = links[0].exchange({1: block}, {1: block.clone()})
    begin = time.monotonic()
    links[0].close()
    assert transfer.wait(5) and transfer.error is not None
    assert time.monotonic() - begin < 2
    links[1].close()


def test_strangers_are_refused() -> None:
    token, peers = bytes(range(16)), {1, 2}
    with listen(8) as listener:
        address = listener.getsockname()[:2]
        told = [b"", b"x" * 20, bytes(16) + b"\1\0\0\0", token + b"\7\0\0\0", token + b"\1\0\0\0", token + b"\1\0\0\0"]
        connections = [socket.create_connection(address) for _ in range(len(told) + 1)]
        for connection, hello in zip(connections, [*told, token + b"\2\0\0\0"], strict=True):
            connection.sendall(hello)
        connections[1].close()
        found = accept_peers(listener, token, peers, time.monotonic() + cases.LIMIT_S)
        assert {peer: one.getpeername() for peer, one in found.items()} == {
            1: connections[4].getsockname(),
            2: connections[6].getsockname(),
        }
        with pytest.raises(TimeoutError, match="1 of 1 peers did not connect in time"):
            accept_peers(listener, token, {3}, time.monotonic() + 0.2)
        for one in (*connections, *found.values()):
            one.close()


@pytest.mark.parametrize("what", ("port", "token"))
def test_ranks_that_do_not_reach_one_another_use_collectives(what: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))

        def change(rank: int, texts: list[str]) -> list[str]:
            if rank != 2 or not texts[0].startswith("["):
                return texts
            host, port, token, why = json.loads(texts[0])
            changed = (host, unused.getsockname()[1], token, why) if what == "port" else (host, port, "00" * 16, why)
            return [json.dumps(changed), *texts[1:]]

        with pytest.warns(ody.FallbackWarning, match="no TCP connections between its ranks.*cannot connect") as caught:
            assert cases.connect(3, change) == [None, None, None]
        assert len(caught) == 3


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    with pytest.warns(ody.FallbackWarning, match="rank 0 cannot listen: interface nowhere0 has no IPv4 address"):
        assert cases.connect(2) == [None, None]


@pytest.mark.parametrize("world", (2, 3, 4))
def test_operators_give_the_same_bits_without_links(ranks: RankPools, world: int) -> None:
    for equal, said in ranks(world).run(cases.with_and_without):
        assert equal
        assert len(said) == 1 and "rank 0 cannot listen" in said[0]


def test_pieces_are_finer_between_hosts(ranks: RankPools) -> None:
    for equal, transfers in ranks(2).run(cases.finer_pieces):
        assert equal
        assert transfers == [1, 6]


def test_a_rank_killed_in_a_transfer_is_an_error_on_every_survivor() -> None:
    outcomes = run_ranks(cases.killed_in_a_transfer, 3, 1, timeout=60, expect_failure=True)
    assert outcomes[1].exit_code == -9
    for survivor in (0, 2):
        assert outcomes[survivor].ok, outcomes[survivor].describe()
        error, message, seconds, threads = outcomes[survivor].result
        assert error == "PeerLostError" and "rank 1" in message, message
        assert seconds < 5
        assert threads == []
