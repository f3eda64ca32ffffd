"""What the tests of choices run: ranks as threads with clocks of their own, real ranks, and writers of one file."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import odysseus_kernels as ody
from odysseus_kernels.comm.choice.cache import CachedChoice, ChoiceCache
from odysseus_kernels.comm.choice.measure import ChoiceKey, Choices, HostTimer
from odysseus_kernels.comm.meeting.backend import all_gather_single

T = TypeVar("T")

KEY = ChoiceKey("all_gather_linear", "forward", "symmetric", 2, "float32", "x [4, 8] dim 0", own="weight [5, 8]")
FINGERPRINT = {"schema": "1", "devices": "test"}
MESSAGE_BYTES = 4096


class Exchange:
    """Hands texts round among threads; a text of a rank that never comes breaks the barrier instead of hanging."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world)
        self._texts = [""] * world
        self.count = 0

    def of(self, rank: int) -> Callable[[str], list[str]]:
        def exchange(text: str) -> list[str]:
            assert text.isascii() and len(text) <= MESSAGE_BYTES
            self._texts[rank] = text
            self._barrier.wait(20)
            everyone = list(self._texts)
            self.count += rank == 0
            self._barrier.wait(20)
            return everyone

        return exchange


@dataclasses.dataclass
class Run:
    """A candidate that takes ``seconds``, one after another and then the last for ever, or raises."""

    mode: str
    seconds: Sequence[float]
    log: list[str]
    error: Exception | None = None

    def __call__(self) -> None:
        self.log.append(self.mode)
        if self.error is not None:
            raise self.error


class ScriptedTimer:
    """Runs a :class:`Run` and returns the seconds that it names."""

    def __init__(self) -> None:
        self._rest: dict[str, Iterator[float]] = {}

    def measure(self, run: Callable[[], None]) -> float:
        run()
        assert isinstance(run, Run)
        rest = self._rest.setdefault(run.mode, iter(run.seconds))
        return next(rest, run.seconds[-1])


def constant(log: list[str] | None = None, **seconds: float) -> dict[str, Run]:
    """Candidates that always take these seconds."""
    log = [] if log is None else log
    return {mode: Run(mode, [value], log) for mode, value in seconds.items()}


def on_threads(function: Callable[[int], T], world: int) -> list[T | Exception]:
    """What ``function(rank)`` returned or raised on each rank."""

    def caught(rank: int) -> T | Exception:
        try:
            return function(rank)
        except Exception as error:  # noqa: BLE001 - which one it is, is the result
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(caught, range(world)))


def group(world: int, caches: Sequence[ChoiceCache | None] = (), **settings: Any) -> tuple[list[Choices], Exchange]:
    """The choices of all ranks of one group, and what they talk through."""
    exchange = Exchange(world)
    own = caches or [None] * world
    return [Choices(own[rank], exchange.of(rank), ScriptedTimer(), **settings) for rank in range(world)], exchange


def write_choices(directory: Path, writer: int, count: int) -> None:
    """One of several processes that fill one file."""
    cache = ChoiceCache(directory, FINGERPRINT)
    for number in range(count):
        cache.put(f"{writer}-{number}", CachedChoice("fused", {"fused": 1.0 + writer, "unfused": 2.0}))


def _exchange(text: str) -> list[str]:
    own = torch.frombuffer(bytearray(text.encode().ljust(MESSAGE_BYTES)), dtype=torch.uint8)
    everyone = own.new_empty((dist.get_world_size(), MESSAGE_BYTES))
    all_gather_single(everyone.view(-1), own)
    return [bytes(row.tolist()).decode().rstrip() for row in everyone]


def _operators(counts: dict[str, int]) -> Mapping[str, Callable[[], None]]:
    x, weight = torch.ones(64, 128), torch.ones(96, 128)

    def candidate(mode: Any) -> Callable[[], None]:
        config = ody.OverlapConfig(mode=mode, timeout_s=20)

        def run() -> None:
            counts[mode] = counts.get(mode, 0) + 1
            ody.all_gather_linear(x, weight, group=None, config=config)

        return run

    return {"unfused": candidate("unfused"), "fused": candidate("fused")}


def real_operators(rank: int, world: int, directory: str) -> dict[str, Any]:
    """Times the real operators, then decides again with a cache that holds the choice."""
    fingerprint = {"test": "real operators"}
    counts: dict[str, int] = {}
    candidates = _operators(counts)
    key = dataclasses.replace(KEY, shapes=f"x [64, 128] of {world}", own=f"rank {rank}", device=f"device {rank}")
    measured = Choices(ChoiceCache(Path(directory), fingerprint), _exchange, HostTimer(), budget_s=0.05)
    first = measured.decide(key, candidates, {}, measure=True)
    runs = dict(counts)
    again = Choices(ChoiceCache(Path(directory), fingerprint), _exchange, HostTimer())
    second = again.decide(key, candidates, {}, measure=True)
    return {
        "modes": [first.mode, second.mode],
        "how": [first.how, second.how],
        "seconds": [dict(first.seconds), dict(second.seconds)],
        "runs": runs,
        "later": {mode: counts[mode] - runs[mode] for mode in counts},
    }


def disagreeing_operators(rank: int, world: int, directory: str) -> list[str]:
    """Caches differ: rank 0 has a choice that the others have not, then one that is another than theirs."""
    how = []
    for round_number, others in enumerate((None, "fused")):
        folder = Path(directory, f"{round_number}-{rank}")
        cache = ChoiceCache(folder, FINGERPRINT)
        mode = "unfused" if rank == 0 else others
        if mode is not None:
            cache.put(KEY.text, CachedChoice(mode, {"fused": 1.0, "unfused": 1.0}))
        choices = Choices(cache, _exchange, HostTimer(), budget_s=0)
        decision = choices.decide(KEY, _operators({}), {}, measure=True)
        how.append(f"{decision.how} {decision.mode}")
        kept = json.loads(cache.path.read_text())["choices"][KEY.text]
        assert kept == {"mode": decision.mode, "seconds": dict(decision.seconds)}
        assert os.listdir(folder).count(cache.path.name) == 1
    return how
