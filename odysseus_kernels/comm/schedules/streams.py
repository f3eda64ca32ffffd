"""Streams of a device, and the order between steps that they do not give by themselves.

A rank has six streams, fewer than the hardware queues that a process has unless it asks for another number
(``CUDA_DEVICE_MAX_CONNECTIONS``, 8); two are left for the streams of others, such as a collective library's.  Each
group of a process has its own, besides the caller's, so that two groups may have to share queues.

``COMPUTE``
    the caller's stream: products.
``WAITS``
    waits that copies between ranks depend on, in the order of these copies.
``COPY_STREAMS``
    copies between ranks, in turn: on one stream alone a link would idle while an event and the start of the next copy
    follow one another.  Nothing else is in them, so no copy is behind a kernel that looks for room.
``SIGNALS``
    signals that copies between ranks are done; no wait is in it.
``LOCAL``
    what moves or adds data within the device, with its waits before and its signals after it: publications, sums.

Two rules keep every rank going, however a device schedules the streams:

* a step depends only on steps that were enqueued before it, on this rank and, through words, on all others.  So streams
  may share queues in any way, down to a single one in which steps run in the order of enqueueing;
* a wait comes after all signals to peers that were enqueued before it, by edges and not only by order: a captured graph
  keeps edges alone, and may run a branch to its end before it starts the next.  :meth:`Builder.wait` adds what
  edges are missing, so where a wait is enqueued decides what it costs.

``testing/happens_before.py`` and ``testing/replays.py`` prove both.
"""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from collections.abc import Sequence

from odysseus_kernels.comm.schedules.steps import Kind, Step, Task, Word
from odysseus_kernels.config import hardware_queues
from odysseus_kernels.errors import FallbackWarning

__all__ = [
    "COMPUTE",
    "COPY_STREAMS",
    "LOCAL",
    "SIGNALS",
    "STREAMS",
    "WAITS",
    "Builder",
    "check_queues",
    "sums_beside_products",
]

COMPUTE = "compute"
WAITS = "waits"
COPY_STREAMS = ("copy 0", "copy 1")
SIGNALS = "signals"
LOCAL = "local"
STREAMS = (COMPUTE, WAITS, *COPY_STREAMS, SIGNALS, LOCAL)

_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"

_Clock = dict[str, int]  # by stream: how many of its steps come before


class Builder:
    """Steps of a rank in the order in which its host enqueues them.

    Args:
        world, rank: the ranks, and which one this is.

    Attributes:
        peers: the other ranks, the next one first.
        steps: what was added.
    """

    def __init__(self, world: int, rank: int) -> None:
        self.world, self.rank = world, rank
        self.peers = [(rank + hop) % world for hop in range(1, world)]
        self.steps: list[Step] = []
        self._clocks: dict[str, _Clock] = defaultdict(dict)  # what comes before the next step of a stream
        self._events: list[tuple[str, _Clock]] = []
        self._newest: dict[str, int] = {}  # by stream: its newest event
        self._signalled: dict[str, int] = {}  # by stream: its last step that peers may wait for
        self._forked: dict[str, None] = {}
        self._copies = 0
        self._begin = self.record(COMPUTE)

    # ---- streams and events ------------------------------------------------------------------------------------------

    def record(self, stream: str) -> int:
        """An event after everything that the stream has so far."""
        newest = self._newest.get(stream)
        if newest is not None and self._events[newest][1] == self._clocks[stream]:
            return newest
        event = len(self._events)
        self._events.append((stream, dict(self._clocks[stream])))
        self._newest[stream] = event
        self.steps.append(Step(Kind.RECORD, event=event, stream=stream))
        return event

    def depend(self, stream: str, *events: int | None) -> None:
        """What the stream does next comes after ``events``; nothing is added for those that it comes after anyway."""
        for event in events:
            if event is None:
                continue
            recorded, clock = self._events[event]
            if self._clocks[stream].get(recorded, 0) < clock.get(recorded, 0) or self._enters(stream):
                self._follow(stream, event)

    def _follow(self, stream: str, event: int) -> None:
        if stream != COMPUTE:
            self._forked[stream] = None  # every event comes after the start
        self._append(Step(Kind.DEPEND, event=event, stream=stream))
        clock = self._clocks[stream]
        for other, position in self._events[event][1].items():
            clock[other] = max(clock.get(other, 0), position)

    def _enters(self, stream: str) -> bool:
        return stream != COMPUTE and stream not in self._forked

    def _append(self, step: Step) -> None:
        self.steps.append(step)
        clock = self._clocks[step.stream]
        clock[step.stream] = clock.get(step.stream, 0) + 1

    def add(self, stream: str, step: Step) -> None:
        """Adds a step; ``stream`` leaves the caller's with its first one."""
        if self._enters(stream):
            self._follow(stream, self._begin)
        self._append(step)

    def copy_stream(self) -> str:
        """The stream of the next copy between ranks."""
        stream = COPY_STREAMS[self._copies % len(COPY_STREAMS)]
        self._copies += 1
        return stream

    def join(self) -> None:
        """Everything happens before what the caller's stream does next: buffers may then be freed and used again."""
        for stream in self._forked:
            self._follow(COMPUTE, self.record(stream))

    # ---- steps with a word -------------------------------------------------------------------------------------------

    def wait(self, stream: str, word: Word, value: int, *, peer: int, piece: int = 0, inside: bool = False) -> None:
        """Waits for a word, after all own signals so far that peers may wait for.

        Replayed as a graph, the wait could otherwise run before such a signal, and a peer's wait before the signal
        that ends this one.
        """
        # The newest first: it often comes after the others.
        for other in reversed(list(self._signalled)):
            if self._clocks[stream].get(other, 0) < self._signalled[other]:
                self.depend(stream, self.record(other))
        self.add(stream, Step(Kind.WAIT, None, peer, piece, word, value, stream=stream, inside=inside))

    def signal(
        self,
        stream: str,
        word: Word,
        value: int,
        *,
        peer: int,
        piece: int = 0,
        inside: bool = False,
        to_peers: bool = True,
    ) -> None:
        """Sets a word; ``to_peers`` is False for one that this rank alone waits for."""
        kind = Kind.SIGNAL if word.is_ready else Kind.RELEASE
        self.add(stream, Step(kind, None, peer, piece, word, value, stream=stream, inside=inside))
        if to_peers:
            self._signalled.pop(stream, None)
            self._signalled[stream] = self._clocks[stream][stream]


def sums_beside_products(steps: Sequence[Step]) -> frozenset[int]:
    """Pieces whose sums may run while the rank's products do: those before its last product.

    A sum that comes after it has the device for itself, since the end of a call waits for all of its streams.
    """
    products = [i for i, step in enumerate(steps) if step.task in (Task.CONSUME, Task.PRODUCE)]
    last = products[-1] if products else 0
    return frozenset(step.piece for step in steps[:last] if step.task is Task.ADD)


@functools.cache
def check_queues() -> None:
    """Warns, once in a process, if CUDA was given fewer hardware queues than there are streams."""
    given = hardware_queues()
    if given.isdigit() and 0 < int(given) < len(STREAMS):
        warnings.warn(
            f"{_QUEUES}: expected at least {len(STREAMS)}, a queue for each stream of the symmetric transport, or "
            f"nothing, which means 8; got {given}. Results are the same, but a product may stand behind a wait for a "
            f"peer. Unset it before the process first uses CUDA, or use the collective transport",
            FallbackWarning,
            stacklevel=3,
        )
