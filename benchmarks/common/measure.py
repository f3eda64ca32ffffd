"""How time is taken, and what is made of the samples.

Variants of a row take turns within each round, in order in even rounds and reversed in odd ones, so that drifts of the
machine (clock, temperature, other people's work) fall on all of them alike and nobody always follows the same
neighbour.  Each rank times its own call after a barrier; a round's time is the slowest rank's.  Ratios are medians of
ratios within rounds.

On a GPU, events on the stream time the call (:class:`EventTimer`), and the host is kept ahead of the device.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

__all__ = [
    "EventTimer",
    "hidden_share",
    "host_seconds",
    "interquartile_spread",
    "median",
    "paired_ratio",
    "slowest_rank",
    "take_turns",
]

Samples = Mapping[str, Sequence[float]]
Timed = Callable[[Callable[[], Any]], tuple[float, Any]]


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    barrier: Callable[[], None],
    synchronize: Callable[[], None],
    last: Callable[[str, Any], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    timed: Timed | None = None,
) -> dict[str, list[float]]:
    """Times every call once in each round, on this rank.

    Args:
        calls: what is timed, by name; all ranks pass the same in the same order.
        rounds: number of rounds.
        barrier: brings the ranks together before each call.
        synchronize: waits for the device.
        last: gets (name, result) of each call of the last round, outside the timed part.
        clock: seconds.
        timed: makes a call and returns (seconds, result); by default ``clock`` around the call and ``synchronize``.

    Returns:
        Seconds by name, one for each round.
    """

    def by_clock(call: Callable[[], Any]) -> tuple[float, Any]:
        begin = clock()
        result = call()
        synchronize()
        return clock() - begin, result

    timed = timed or by_clock
    samples: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            for name in list(calls) if index % 2 == 0 else reversed(list(calls)):
                synchronize()
                barrier()
                seconds, result = timed(calls[name])
                samples[name].append(seconds)
                if last is not None and index == rounds - 1:
                    last(name, result)
                del result  # its memory goes back before the next call, and outside the timed part
    finally:
        if collecting:
            gc.enable()
    return samples


class EventTimer:
    """Times calls by events on the current stream of a GPU.

    Before each call a buffer larger than the second-level cache is written several times, and read: nothing of the
    last call is left in the cache, nothing in it waits to be written back, and the host has enqueued the call before
    the device comes to it, as in a training step, where the host runs ahead.  What the host took is in :attr:`host_s`.

    Args:
        device: the GPU.
        nbytes: of the buffer.

    Attributes:
        host_s: seconds in which the host enqueued the last call.
    """

    # The host needs this many times longer now and then.
    _MARGIN = 2.0
    _MOST_FILLS = 400

    def __init__(self, device: torch.device, nbytes: int = 256 << 20) -> None:
        self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._fills = 1
        self.host_s = 0.0
        self._fill_s = min(self._timed(self._buffer.zero_)[0] for _ in range(5))

    def stay_ahead(self, host_s: float) -> None:
        """Keeps the device busy for longer than the host needs to enqueue a call."""
        fills = math.ceil(self._MARGIN * host_s / max(self._fill_s, 1e-6))
        self._fills = max(1, min(fills, self._MOST_FILLS))

    def __call__(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """(seconds, result) of a call."""
        for _ in range(self._fills):
            self._buffer.zero_()
        self._buffer.view(torch.float32).max()
        return self._timed(call)

    def _timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        started = time.perf_counter()
        result = call()
        self.host_s = time.perf_counter() - started
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3, result


def host_seconds(
    calls: Mapping[str, Callable[[], Any]], synchronize: Callable[[], None], attempts: int = 2
) -> dict[str, float]:
    """Seconds in which the host enqueues each call, at the last attempt: the first one compiles and loads."""
    seconds = {}
    for _ in range(attempts):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - begin
            synchronize()
    return seconds


def slowest_rank(samples: Samples, world_size: int) -> dict[str, list[float]]:
    """The largest over the ranks of each sample; every rank gets the same."""
    names = list(samples)
    mine = torch.tensor([list(samples[name]) for name in names], dtype=torch.float64)
    all_ranks = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(all_ranks, mine)
    return dict(zip(names, torch.stack(all_ranks).amax(0).tolist(), strict=True))


def median(samples: Sequence[float]) -> float:
    """Median."""
    return statistics.median(samples)


def interquartile_spread(samples: Sequence[float]) -> float:
    """Distance of the quartiles, as a share of the median."""
    if len(samples) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(samples, n=4, method="inclusive")
    return (third - first) / middle


def paired_ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """Median of the ratios within one round: what drifts from round to round cancels."""
    return statistics.median(a / b for a, b in zip(samples, base, strict=True))


def hidden_share(*, unfused: float, fused: float, gemm: float, communication: float) -> float:
    """Share of what could be hidden that was: (unfused - fused) / min(GEMM, communication), of medians in seconds.

    1 means that the shorter of the two vanished behind the longer, 0 that nothing overlapped.  It can pass 1 where
    fusing also saves copies, and be negative where it costs more than it hides.
    """
    return (unfused - fused) / min(gemm, communication)
