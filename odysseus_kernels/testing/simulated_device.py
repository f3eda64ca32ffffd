"""Devices with streams, simulated on a CPU: several ranks in one process, deferred, in any order that is allowed.

Operations and callbacks are queued by stream, as on a GPU, and happen when :meth:`SimulatedMachine.run` is called: in a
random order that streams, events and words allow.  The transport that drives a GPU drives this too, unchanged, so its
buffers, counts and addresses are tested where no GPU is.  Memory that nobody wrote is NaN.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from odysseus_kernels.comm.device.lowering import KINDS, WINDOWS, WORDS, word_index
from odysseus_kernels.comm.mismatch import describe_mismatch, signature_hash
from odysseus_kernels.comm.schedules.streams import COMPUTE, STREAMS
from odysseus_kernels.comm.transport import Call
from odysseus_kernels.errors import CommunicationError, RankMismatchError, SignalTimeoutError
from odysseus_kernels.testing.host_control import HostControl
from odysseus_kernels.testing.replays import Node, edges, one_at_a_time
from odysseus_kernels.testing.simulated_operations import Event, Item, SimulatedOperations, Sum

__all__ = ["SimulatedDevice", "SimulatedMachine"]

_MULTICAST = 1 << 60  # addresses from here on are multicast ones, of as many windows
_WINDOW_BYTES = 1 << 40
_Window = tuple[str, int]


class SimulatedMachine:
    """All devices of a group, and their memory."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.words = [torch.zeros(len(KINDS) * WINDOWS * WORDS * world, dtype=torch.int32) for _ in range(world)]
        self.devices = [SimulatedDevice(self, rank) for rank in range(world)]
        self.calls: list[list[str]] = [[] for _ in range(world)]
        self.windows: dict[tuple[int, _Window], Tensor] = {}  # by rank and place
        self.order = random.Random(world)  # in which the switch adds
        self._queues: dict[tuple[int, int], deque[Item]] = {}
        self._kept: list[Tensor] = []
        self._graphs: list[Tensor] = []  # memory of graphs, which lasts
        self._captured: list[tuple[int, int, Item]] | None = None

    def window(self, rank: int, place: _Window, nbytes: int = 0) -> Tensor:
        """A window's bytes, at least ``nbytes``."""
        found = self.windows.get((rank, place))
        if found is None or found.numel() < nbytes:
            found = self.windows[rank, place] = self.keep(torch.full((max(nbytes, 1),), 0xFF, dtype=torch.uint8))
        return found

    def multicast(self, place: _Window) -> int:
        """An address that stands for all ranks' windows."""
        kind, window = place
        return _MULTICAST + (KINDS.index(kind) * WINDOWS + window) * _WINDOW_BYTES

    def behind(self, multicast: int) -> list[int]:
        """The addresses that a multicast one reaches, those of all ranks."""
        number, offset = divmod(multicast - _MULTICAST, _WINDOW_BYTES)
        kind, window = divmod(number, WINDOWS)
        return [self.window(rank, (KINDS[kind], window)).data_ptr() + offset for rank in range(self.world)]

    def keep(self, tensor: Tensor) -> Tensor:
        """Holds memory for as long as something that is queued may use it."""
        (self._graphs if self.capturing else self._kept).append(tensor)
        return tensor

    def restore(self, held: dict[tuple[int, _Window], Tensor]) -> None:
        """Makes all ranks' windows what they were; nothing is queued that uses others."""
        self.windows = dict(held)

    def compare(self, rank: int, called: str) -> None:
        """RankMismatchError if a peer is known to have called something else in this place."""
        self.calls[rank].append(called)
        place = len(self.calls[rank]) - 1
        calls = {r: (signature_hash(c[place]), c[place]) for r, c in enumerate(self.calls) if len(c) > place}
        if len(set(calls.values())) > 1:
            raise RankMismatchError(describe_mismatch(calls, place + 1))

    # ---- queues ------------------------------------------------------------------------------------------------------

    def enqueue(self, rank: int, stream: int, item: Item) -> None:
        """Adds to a stream, or to what is being captured."""
        if self._captured is not None:
            self._captured.append((rank, stream, item))
        else:
            self._queues.setdefault((rank, stream), deque()).append(item)

    @property
    def capturing(self) -> bool:
        return self._captured is not None

    def capture(self, enqueue: Callable[[], None]) -> Callable[..., None]:
        """What ``enqueue`` queues, as a graph; calling the result queues it again.

        With ``reverse=True`` each rank's graph runs one node at a time, the one that was captured last first: an order
        that its edges allow.
        """
        self._captured = []
        try:
            enqueue()
            graph = self._captured
        finally:
            self._captured = None

        def replay(*, reverse: bool = False) -> None:
            events: dict[int, Event] = {}

            def renewed(event: Event | None) -> Event | None:
                return None if event is None else events.setdefault(id(event), Event())

            for rank, stream, item in _reversed_branches(graph) if reverse else graph:
                again = dataclasses.replace(item, event=renewed(item.event), after=renewed(item.after))
                self.enqueue(rank, stream, again)

        return replay

    def hang(self, rank: int, stream: str) -> None:
        """The next copy of a stream never ends."""
        queue = self._queues[rank, STREAMS.index(stream)]
        next(item for item in queue if item.label.startswith("copy")).hangs = True

    def run(self, seed: int, *, give_up: bool = False) -> None:
        """Empties all queues in a random order.

        Args:
            seed: of the order.
            give_up: when nothing can go on, waits give up as after ``timeout_s``; else that is an AssertionError.
                What is left then stands behind something that never ends, and is dropped.
        """
        choose = random.Random(seed)
        while any(self._queues.values()):
            able = [queue for queue in self._queues.values() if queue and self._able(queue[0])]
            if not able:
                heads = [queue[0] for queue in self._queues.values() if queue]
                stuck = [item for item in heads if item.gives_up is not None]
                if give_up and not stuck and any(item.hangs for item in heads):
                    self._queues.clear()
                    break
                assert give_up and stuck, f"deadlock: {[q[0].label for q in self._queues.values() if q]}"
                for item in stuck:
                    assert item.gives_up is not None
                    item.gives_up()
                continue
            queue = choose.choice(able)
            for _ in range(choose.choice((1, 1, 3, 50))):  # long runs of one stream find more than fair turns do
                if not queue or not self._able(queue[0]):
                    break
                item = queue.popleft()
                item.effect()
                if item.event is not None:
                    item.event.done = True
        self._kept = [*self._graphs]
        for (rank, place), tensor in self.windows.items():
            self.windows[rank, place] = self.keep(tensor)

    @staticmethod
    def _able(item: Item) -> bool:
        return not item.hangs and (item.after is None or item.after.done) and item.ready()


def _reversed_branches(graph: Sequence[tuple[int, int, Item]]) -> list[tuple[int, int, Item]]:
    """All nodes of each rank in one stream, in the order of their edges alone, what was captured last first."""
    nodes: list[Node] = [((rank, stream), item.event, item.after) for rank, stream, item in graph]
    order = one_at_a_time(edges(nodes), lambda index: -index)
    return [(graph[index][0], STREAMS.index(COMPUTE), graph[index][2]) for index in order]


class SimulatedDevice:
    """One rank's device: what ``SymmetricDeviceTransport`` asks for."""

    def __init__(self, machine: SimulatedMachine, rank: int) -> None:
        self.machine, self.rank = machine, rank
        self.aborted = torch.zeros(1, dtype=torch.int32)
        self.control = HostControl()  # of kernels that wait by themselves
        self.waits: list[str] = []
        self.multiprocessors = 0
        self.link_bytes_per_s = 0.0
        self.no_switch = ""
        self.sums: list[Sum] = []
        self.error: tuple[int, int] | None = None  # tag and index of the first wait that gave up
        self._epochs = {kind: torch.zeros(WINDOWS, dtype=torch.int32) for kind in KINDS}
        self._backed: dict[_Window, int] = {}
        self.most_scratch = 0

    def operations(self) -> SimulatedOperations:
        return SimulatedOperations(self)

    def streams(self) -> list[int]:
        return list(range(len(STREAMS)))

    def call(self, callback: Callable[[], None]) -> None:
        self.machine.enqueue(self.rank, STREAMS.index(COMPUTE), Item(callback, label="callback"))

    def scratch(self, nbytes: int) -> Tensor:
        self.most_scratch = max(self.most_scratch, nbytes)
        return self.machine.keep(torch.full((nbytes,), 0xFF, dtype=torch.uint8))

    def window(self, rank: int, kind: str, window: int) -> int:
        return self.machine.window(rank, (kind, window)).data_ptr()

    def own_window(self, kind: str, window: int) -> Tensor:
        return self.machine.window(self.rank, (kind, window))

    def multicast(self, kind: str, window: int) -> int:
        return self.machine.multicast((kind, window))

    def words(self, rank: int) -> int:
        return self.machine.words[rank].data_ptr()

    def epoch(self, kind: str, window: int) -> int:
        return self.epoch_tensor(kind, window).data_ptr()

    def epoch_tensor(self, kind: str, window: int) -> Tensor:
        return self._epochs[kind][window : window + 1]

    def word_tensor(self, kind: str, window: int) -> Tensor:
        start = word_index(self.machine.world, kind, window, 2, 0)
        return self.machine.words[self.rank][start : start + self.machine.world]

    def word_addresses(self, kind: str, window: int, which: Literal["waited", "set"]) -> Tensor:
        world = self.machine.world
        if which == "waited":
            found = [self.words(self.rank) + 4 * word_index(world, kind, window, 0, peer) for peer in range(world)]
        else:
            found = [self.words(peer) + 4 * word_index(world, kind, window, 1, self.rank) for peer in range(world)]
        return torch.tensor(found, dtype=torch.int64)

    def addresses(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64)

    def counter_tensor(self) -> Tensor:
        return torch.zeros(self.machine.world, dtype=torch.int32)

    def aborted_tensor(self) -> Tensor:
        return self.aborted

    def control_tensor(self) -> Tensor:
        return self.control.address

    def backed(self, kind: str, window: int) -> int:
        return self._backed.get((kind, window), 0)

    def grow(self, call: Call, sizes: dict[_Window, int]) -> None:
        for place, nbytes in sizes.items():
            self._backed[place] = nbytes
            for rank in range(self.machine.world):
                self.machine.window(rank, place, nbytes)

    def hold(self) -> object:
        return dict(self._backed), dict(self.machine.windows)

    def restore(self, held: object) -> set[_Window]:
        assert isinstance(held, tuple)
        backed, windows = held
        moved = {place for place, nbytes in self._backed.items() if backed.get(place) != nbytes}
        self._backed = backed
        self.machine.restore(windows)
        return moved

    def capturing(self) -> bool:
        return self.machine.capturing

    def begin(self, call: Call, extra: str) -> None:
        self.machine.compare(self.rank, call.signature + extra)

    def give_up(self, error: BaseException) -> None:
        self.aborted.fill_(1)

    def failure(self) -> CommunicationError | None:
        if self.error is not None:
            tag, index = self.error
        elif (found := self.control.error()) is not None:
            _, tag, index, _, _ = found
        else:
            return None
        return SignalTimeoutError(self.waits[tag + index])

    def synchronize(self) -> None:
        pass

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass
