"""What a simulated device enqueues: operations of a plan as items of queues; see ``simulated_device.py``."""

from __future__ import annotations

import ctypes
import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from odysseus_kernels import _ext
from odysseus_kernels.comm.device.lowering import Address
from odysseus_kernels.comm.schedules.device import EPOCH
from odysseus_kernels.comm.switch import SWITCHED_BYTES

if TYPE_CHECKING:
    from odysseus_kernels.testing.simulated_device import SimulatedDevice

__all__ = ["Event", "Item", "SimulatedOperations", "Sum"]


class Event:
    """One recording of an event."""

    done = False


@dataclasses.dataclass
class Item:
    """What is queued: an effect, and what has to be true before."""

    effect: Callable[[], None]
    ready: Callable[[], bool] = lambda: True
    event: Event | None = None  # recorded by this item
    after: Event | None = None  # waited for by this item
    gives_up: Callable[[], None] | None = None  # of a wait
    label: str = ""
    hangs: bool = False


@dataclasses.dataclass(frozen=True)
class Sum:
    """A sum that happened: how many sources of so many elements, and the multiprocessors it might hold (0: all)."""

    sources: int
    elements: int
    beside: int


class SimulatedOperations:
    """The interface of the compiled ``cuda.Program``, on queues."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._made: list[Callable[[list[int]], tuple[int, Item]]] = []
        self._events: dict[int, Event] = {}

    def __len__(self) -> int:
        return len(self._made)

    def close(self) -> None:
        self._made.clear()

    def run(self, first: int, last: int, streams: list[int], bases: list[int], timeout_s: float) -> None:
        assert 0 <= first <= last <= len(self._made) and timeout_s > 0
        for make in self._made[first:last]:
            stream, item = make(bases)
            self._device.machine.enqueue(self._device.rank, streams[stream], item)

    def play(
        self,
        stops: list[int],
        callbacks: Sequence[Callable[[], object] | None],
        streams: list[int],
        bases: list[int],
        timeout_s: float,
    ) -> None:
        first = 0
        for stop, callback in zip(stops, callbacks, strict=True):
            self.run(first, stop, streams, bases, timeout_s)
            if callback is not None:
                callback()
            first = stop
        self.run(first, len(self), streams, bases, timeout_s)

    def copy(
        self,
        stream: int,
        dst: Address,
        src: Address,
        row_bytes: int,
        rows: int = 1,
        dst_pitch: int = 0,
        src_pitch: int = 0,
        over_link: bool = False,
    ) -> None:
        def make(bases: list[int]) -> tuple[int, Item]:
            to, source = _address(bases, dst), _address(bases, src)

            def effect() -> None:
                for row in range(rows):
                    there, here = to + row * (dst_pitch or row_bytes), source + row * (src_pitch or row_bytes)
                    ctypes.memmove(there, here, row_bytes)

            return stream, Item(effect, label=f"copy of rank {self._device.rank}")

        self._made.append(make)

    def wait(self, stream: int, epoch: Address, words: list[Address], values: list[int], tag: int) -> None:
        device = self._device

        def make(bases: list[int]) -> tuple[int, Item]:
            def missing() -> list[int]:
                base = _load(_address(bases, epoch)) * EPOCH
                pairs = enumerate(zip(words, values, strict=True))
                return [i for i, (word, value) in pairs if _load(_address(bases, word)) < base + value]

            def gives_up() -> None:
                device.error = device.error or (tag, missing()[0])
                device.aborted.fill_(1)

            ready = lambda: bool(device.aborted) or not missing()  # noqa: E731 - two closures of one line
            return stream, Item(_nothing, ready, gives_up=gives_up, label=f"wait {tag} of rank {device.rank}")

        self._made.append(make)

    def signal(self, stream: int, epoch: Address, words: list[Address], values: list[int]) -> None:
        device = self._device

        def make(bases: list[int]) -> tuple[int, Item]:
            def effect() -> None:
                if not device.aborted:  # who gave up must not say that data is there
                    for word, value in zip(words, values, strict=True):
                        _store(_address(bases, word), _load(_address(bases, epoch)) * EPOCH + value)

            return stream, Item(effect, label=f"signal of rank {device.rank}")

        self._made.append(make)

    def advance(self, stream: int, epoch: Address) -> None:
        def make(bases: list[int]) -> tuple[int, Item]:
            place = _address(bases, epoch)
            return stream, Item(lambda: _store(place, _load(place) + 1), label="advance")

        self._made.append(make)

    def reduce(
        self,
        stream: int,
        out: Address,
        out_dtype: str,
        sources: list[Address],
        source_dtype: str,
        count: int,
        rows: int = 1,
        out_pitch: int = 0,
        source_pitches: list[int] | None = None,
        *,
        beside: int = 0,
    ) -> None:
        pitches = source_pitches or [0] * len(sources)

        def make(bases: list[int]) -> tuple[int, Item]:
            to, places = _address(bases, out), [_address(bases, source) for source in sources]

            def effect() -> None:
                self._device.sums.append(Sum(len(places), count * rows, beside))
                for row in range(rows):
                    begins = [place + row * pitch for place, pitch in zip(places, pitches, strict=True)]
                    names = [source_dtype] * len(begins)
                    _ext.load().reduce(to + row * out_pitch, out_dtype, begins, names, count)

            return stream, Item(effect, label=f"sum of rank {self._device.rank}")

        self._made.append(make)

    def reduce_multicast(
        self,
        stream: int,
        out: Address,
        multicast: Address,
        dtype: str,
        count: int,
        rows: int = 1,
        out_pitch: int = 0,
        beside: int = 0,
    ) -> None:
        machine, kind = self._device.machine, getattr(torch, dtype)
        nbytes = count * kind.itemsize

        def make(bases: list[int]) -> tuple[int, Item]:
            to, address = _address(bases, out), _address(bases, multicast)
            _check_vectors(to, address, nbytes, out_pitch if rows > 1 else 0)
            places = machine.behind(address)  # as they are now: a later call may make windows larger

            def effect() -> None:
                self._device.sums.append(Sum(machine.world, count * rows, beside))
                for row in range(rows):
                    parts = [_tensor(place + row * nbytes, nbytes, kind) for place in places]
                    _tensor(to + row * (out_pitch or nbytes), nbytes, kind).copy_(_added(parts, machine.order))

            return stream, Item(effect, label=f"sum of the switch for rank {self._device.rank}")

        self._made.append(make)

    def store_multicast(
        self,
        stream: int,
        multicast: Address,
        src: Address,
        row_bytes: int,
        rows: int = 1,
        src_pitch: int = 0,
        beside: int = 0,
    ) -> None:
        machine = self._device.machine

        def make(bases: list[int]) -> tuple[int, Item]:
            here, address = _address(bases, src), _address(bases, multicast)
            _check_vectors(here, address, row_bytes, src_pitch if rows > 1 else 0)
            places = machine.behind(address)

            def effect() -> None:
                for place in places:
                    for row in range(rows):
                        ctypes.memmove(place + row * row_bytes, here + row * (src_pitch or row_bytes), row_bytes)

            return stream, Item(effect, label=f"store of rank {self._device.rank}")

        self._made.append(make)

    def record(self, stream: int, event: int) -> None:
        def make(bases: list[int]) -> tuple[int, Item]:
            self._events[event] = Event()
            return stream, Item(_nothing, event=self._events[event], label=f"record {event}")

        self._made.append(make)

    def depend(self, stream: int, event: int) -> None:
        def make(bases: list[int]) -> tuple[int, Item]:
            # As a GPU does: the last recording so far, and none at all if there is none.
            return stream, Item(_nothing, after=self._events.get(event), label=f"depend {event}")

        self._made.append(make)


def _check_vectors(*values: int) -> None:
    assert all(value % SWITCHED_BYTES == 0 for value in values), f"no multiples of {SWITCHED_BYTES} bytes: {values}"


def _tensor(address: int, nbytes: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=dtype)


def _added(parts: Sequence[Tensor], order: random.Random) -> Tensor:
    """In fp32 and in any order, pairs of partial sums included."""
    left = [part.float() for part in parts]
    while len(left) > 1:
        one = left.pop(order.randrange(len(left)))
        other = left.pop(order.randrange(len(left)))
        left.append(one + other)
    return left[0]


def _nothing() -> None:
    """Waiting is all that it does."""


def _address(bases: list[int], address: Address) -> int:
    base, offset = address
    assert base == 0 or bases[base], f"base {base} of an address was not given"
    return bases[base] + offset


def _load(address: int) -> int:
    return ctypes.c_int32.from_address(address).value


def _store(address: int, value: int) -> None:
    ctypes.c_int32.from_address(address).value = value
