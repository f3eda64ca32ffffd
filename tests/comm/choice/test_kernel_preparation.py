"""Kernels that cannot be compiled or launched: found before anything is sent, and left out by all ranks together."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from choice_cases import KEY, Exchange, on_threads
from simulated_group import Group
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm.choice import selection
from odysseus_kernels.comm.choice.cache import CachedChoice
from odysseus_kernels.comm.choice.measure import Choices
from odysseus_kernels.comm.choice.selection import Phase, Selection
from odysseus_kernels.comm.device.transport import SymmetricDeviceTransport
from odysseus_kernels.comm.tiles import TileGather
from odysseus_kernels.comm.transport import Call, Gather, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.errors import CommunicationError, KernelUnavailableError, RankMismatchError

WORLD, ROWS, WIDTH = 3, 8, 3
REASON = "the Triton kernel gather_matmul cannot be had on this rank: RuntimeError: Failed to find C compiler"
PHASE = Phase("operator", "forward", f"x [{ROWS}, {WIDTH}]", "", torch.float64, 1, ROWS * WIDTH * 8, tiles=True)


class Lockstep:
    """Ranks as threads that share a simulated machine: it runs where a real rank's host would wait for its device."""

    def __init__(self, broken: set[int], seconds: dict[str, float], error: Exception | None = None) -> None:
        self.group = Group(WORLD)
        self.exchange = Exchange(WORLD)
        self.prepared = [0] * WORLD
        self.ran: list[list[str]] = [[] for _ in range(WORLD)]
        self.seen: list[Tensor | None] = [None] * WORLD
        self.shards = [self.group.random(1, ROWS, WIDTH) for _ in range(WORLD)]
        self._broken, self._seconds = broken, seconds
        self._error = error or KernelUnavailableError(REASON)
        self._outputs: list[Tensor] = []
        self._kernels: list[tuple[Tensor, TileGather]] = []
        self._barrier, self._lock = threading.Barrier(WORLD), threading.Lock()
        for device in self.group.machine.devices:
            device.grow = self._growing(device.rank, device.grow)  # type: ignore[method-assign]

    def settle_device(self, rank: int) -> None:
        """Until everything that all ranks have enqueued has happened."""
        self._barrier.wait(20)
        if rank == 0:
            self.group.machine.run(len(self.ran[0]))
        self._barrier.wait(20)

    def one_by_one(self) -> None:
        """From now on ranks are called one after another, in one thread."""
        for device in self.group.machine.devices:
            device.grow = type(device).grow.__get__(device)  # type: ignore[method-assign]

    def _growing(self, rank: int, grow: Callable[..., None]) -> Callable[..., None]:
        def together(call: Call, sizes: Any) -> None:
            self.settle_device(rank)
            with self._lock:
                grow(call, sizes)

        return together

    def run(self, rank: int) -> Callable[[Transport, OverlapConfig], None]:
        """The operator: a gather whose result is what every rank sees."""
        shard = self.shards[rank]

        def run(transport: Transport, settled: OverlapConfig) -> None:
            whole = torch.full((WORLD, *shard.shape), torch.nan, dtype=torch.float64)
            self._outputs.append(whole)  # the machine knows it by its address

            def consume(source: int, start: int, stop: int, block: Tensor) -> None:
                whole[source, :, start:stop] = block

            def tiles(found: TileGather) -> None:
                self._kernels.append((whole, found))  # it would wait for words, which this thread cannot

            def prepare() -> None:
                self.prepared[rank] += 1
                if rank in self._broken:
                    raise self._error

            call = Call("operator", "forward", settled, Gather(shard, consume, tiles=tiles, prepare=prepare))
            if isinstance(transport, SymmetricDeviceTransport):
                self.ran[rank].append(settled.mode)
                self.seen[rank] = whole
            if settled.mode == "unfused":
                transport.all_gather(call, whole)
            else:
                transport.execute(call)

        return run

    def timer(self, rank: int) -> Any:
        def measure(run: Any) -> float:
            run()
            self.settle_device(rank)
            return self._seconds[run.args[1].mode]

        return mock.Mock(measure=measure)

    def choose(self, config: OverlapConfig) -> tuple[list[Any], list[str]]:
        """What each rank settles on, and all warnings of all ranks."""
        selections = [Selection(torch.device("cuda", 0), self.exchange.of(rank)) for rank in range(WORLD)]

        def settle(rank: int) -> OverlapConfig:
            selections[rank]._choices._timer = self.timer(rank)
            return selections[rank].settle(self.group.transports[rank], config, PHASE, self.run(rank))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = on_threads(settle, WORLD)
        return found, [str(one.message) for one in caught if issubclass(one.category, ody.FallbackWarning)]

    def check(self, config: OverlapConfig) -> None:
        """All ranks run the operator in the mode that was chosen, a few times."""
        self.one_by_one()
        self._kernels.clear()
        for seed in range(5):
            for rank, transport in enumerate(self.group.transports):
                self.run(rank)(transport, config)
            self.group.machine.run(seed)
            for whole, found in self._kernels:
                whole[found.rank] = found.local
                for visit in range(1, WORLD):
                    whole[(found.rank + visit) % WORLD] = found.gathered[visit - 1]
            self._kernels.clear()
            for seen in self.seen:
                assert seen is not None and torch.equal(seen, torch.stack(self.shards))


@pytest.fixture(autouse=True)
def a_device_by_name() -> Iterator[None]:
    """What a choice asks torch about a GPU that is not there."""
    with (
        mock.patch.object(torch.cuda, "get_device_name", return_value="NVIDIA H100 80GB HBM3"),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.object(selection, "_cache", return_value=None),
    ):
        yield


AUTO = OverlapConfig(tune="measure", timeout_s=5)
FAST_TILES = {"unfused": 3.0, "fused": 2.0, "tiles": 1.0}


@pytest.mark.parametrize("broken", (set(), {1}, {0, 1, 2}))
def test_a_kernel_that_a_rank_lacks_is_left_out_by_all(broken: set[int]) -> None:
    ranks = Lockstep(broken, FAST_TILES)
    found, told = ranks.choose(AUTO)
    assert not [outcome for outcome in found if isinstance(outcome, Exception)], found
    assert {one.mode for one in found} == ({"fused"} if broken else {"tiles"})
    # Caches, warm-ups, medians: what is said of kernels travels with the first.
    assert ranks.exchange.count == 3
    if broken:
        assert len(told) == WORLD  # one for each rank
        assert len(set(told)) == 1
        assert f'mode "tiles" cannot be had, all ranks use another one (operator forward, x [{ROWS}' in told[0]
        assert f"rank {min(broken)}: KernelUnavailableError: {REASON}" in told[0]
        assert not any("tiles" in ran for ran in ranks.ran) and ranks.prepared == [1] * WORLD
    else:
        assert not told
    assert not any(transport.broken for transport in ranks.group.transports)
    ranks.check(found[0])


def test_operands_that_a_kernel_of_one_rank_does_not_take() -> None:
    """Not a kernel's fault, and for its peers the same."""
    ranks = Lockstep({2}, FAST_TILES, ValueError("weights: expected contiguous rows in all"))
    found, told = ranks.choose(AUTO)
    assert {one.mode for one in found} == {"fused"}
    assert len(told) == WORLD and "rank 2: ValueError: weights: expected contiguous rows" in told[0]
    ranks = Lockstep({1}, {}, ValueError("weights: expected contiguous rows in all"))
    with pytest.raises(ValueError, match="expected contiguous rows"):
        ask(ranks, 1)
    error = ask(ranks, 0)
    assert isinstance(error, RankMismatchError) and "for which it has no kernel" in str(error)


@pytest.mark.parametrize("broken", (set(), {2}))
def test_a_predicted_mode_has_its_kernel_on_all_ranks(broken: set[int]) -> None:
    ranks = Lockstep(broken, {})
    with mock.patch.object(selection, "predict", return_value=FAST_TILES):
        found, told = ranks.choose(OverlapConfig(tune="model", timeout_s=5))
    assert {one.mode for one in found} == ({"fused"} if broken else {"tiles"})
    assert ranks.exchange.count == 1 and len(told) == (WORLD if broken else 0)
    ranks.check(found[0])


class Cache:
    """Of one rank: what an earlier process has measured."""

    def __init__(self, mode: str | None) -> None:
        self._mode = mode

    def get(self, key: str) -> CachedChoice | None:
        return None if self._mode is None else CachedChoice(self._mode, {self._mode: 1.0, "unfused": 2.0})

    def put(self, key: str, choice: CachedChoice) -> None:
        pass


@pytest.mark.parametrize(
    ("cached", "broken", "mode", "how", "prepared", "exchanges"),
    (
        (["fused"] * 3, {1}, "fused", "cached", 0, 1),  # no kernel is compiled for nothing
        (["tiles"] * 3, set(), "tiles", "cached", 1, 1),
        (["tiles"] * 3, {1}, "fused", "measured", 1, 3),  # it was there in the earlier process
        (["fused", None, None], {0}, "fused", "measured", 1, 4),  # rank 0 had not tried its kernel
        (["unfused", "fused", "tiles"], set(), "tiles", "measured", 1, 4),
    ),
)
def test_cached_choices(
    cached: list[str | None], broken: set[int], mode: str, how: str, prepared: int, exchanges: int
) -> None:
    exchange = Exchange(WORLD)
    tried = [0] * WORLD

    def decide(rank: int) -> Any:
        def prepare() -> None:
            tried[rank] += 1
            if rank in broken:
                raise KernelUnavailableError(REASON)

        def candidate(mode: str) -> Callable[[], str]:
            return lambda: mode

        timer = mock.Mock(measure=lambda run: FAST_TILES[run()])
        choices = Choices(Cache(cached[rank]), exchange.of(rank), timer)  # type: ignore[arg-type]
        candidates: Any = {name: candidate(name) for name in FAST_TILES}
        return choices.decide(KEY, candidates, {}, measure=True, prepare={"tiles": prepare})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found: Any = on_threads(decide, WORLD)
    assert not [outcome for outcome in found if isinstance(outcome, Exception)], found
    assert {(one.mode, one.how) for one in found} == {(mode, how)}
    assert exchange.count == exchanges and tried == [prepared] * WORLD
    assert len(caught) == (WORLD if how == "measured" and broken else 0)
    if how == "measured":
        assert all(("tiles" in one.dropped) == bool(broken) for one in found)


# ---- mode="tiles", asked for -----------------------------------------------------------------------------------------

TILES = OverlapConfig(mode="tiles", timeout_s=5)


def ask(ranks: Lockstep, rank: int) -> Exception | None:
    ranks.one_by_one()
    try:
        ranks.run(rank)(ranks.group.transports[rank], TILES)
    except (KernelUnavailableError, CommunicationError) as error:
        return error
    return None


def test_a_kernel_that_all_ranks_lack_is_an_error_before_anything_is_sent() -> None:
    ranks = Lockstep({0, 1, 2}, {})
    for rank in range(WORLD):
        error = ask(ranks, rank)
        assert isinstance(error, KernelUnavailableError) and "Failed to find C compiler" in str(error)
        assert not ranks.group.transports[rank].broken and ranks.group.transports[rank].reserved_bytes == 0
    assert not any(ranks.group.machine._queues.values())
    ranks.check(OverlapConfig(mode="fused", timeout_s=5))


def test_a_kernel_that_one_rank_lacks_is_told_to_its_peers() -> None:
    ranks = Lockstep({1}, {})
    last = ranks.group.machine.devices[1]
    with mock.patch.object(last, "give_up") as told:
        assert isinstance(ask(ranks, 1), KernelUnavailableError)
        told.assert_not_called()  # it does not know yet whether its peers have one
        error = ask(ranks, 0)
        assert isinstance(error, RankMismatchError) and ranks.group.transports[0].broken
        assert "rank 1 called operator forward" in str(error) and "for which it has no kernel" in str(error)
        assert isinstance(ask(ranks, 1), KernelUnavailableError)
    ranks = Lockstep({1}, {})
    assert ask(ranks, 0) is None  # its wait is ended by what rank 1 tells
    with mock.patch.object(ranks.group.machine.devices[1], "give_up") as told:
        assert isinstance(ask(ranks, 1), KernelUnavailableError)
        assert "for which it has no kernel" in str(told.call_args.args[0])
    assert ranks.group.transports[1].broken
