"""Memory of all ranks at addresses of one rank's device, by torch's symmetric memory.

Everything that differs between versions of torch's symmetric memory is here and in ``comm/device/rendezvous.py``:
allocation, rendezvous, peers' addresses.  Supported are torch 2.10 and later.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from odysseus_kernels.comm.device.lowering import KINDS, WINDOWS, WORDS
from odysseus_kernels.comm.device.rendezvous import Rendezvous
from odysseus_kernels.comm.mismatch import short_text
from odysseus_kernels.comm.schedules.switch import PARTS, PUSHED
from odysseus_kernels.comm.transport import CapacityExceededError
from odysseus_kernels.errors import CapacityWarning, CommunicationError

__all__ = ["Exchange", "PeerMemory", "TorchSymmetricMemory", "Window"]

_SWITCHED = (PARTS, PUSHED)
_GRANULARITY = 2 << 20  # what a driver allocates at once
Window = tuple[str, int]  # kind and index
Exchange = Callable[[str], list[str]]


class PeerMemory(Protocol):
    """Memory of all ranks at addresses of this rank's device.

    Attributes:
        retain: windows that are replaced by larger ones stay: a captured graph goes on using them.
        multicasts: whether this rank's memory has multicast addresses, too.
    """

    retain: bool
    multicasts: bool

    def words(self, rank: int) -> int:
        """Address of a rank's words."""

    def own_words(self) -> Tensor:
        """This rank's words: int32 [len(KINDS) * WINDOWS * WORDS * world]."""

    def window(self, rank: int, place: Window) -> int:
        """Address of a rank's window."""

    def own_window(self, place: Window) -> Tensor:
        """This rank's window: uint8."""

    def multicast(self, place: Window) -> int:
        """The address behind which all ranks' windows lie, for a switch that adds them or stores to them."""

    def backed(self, place: Window) -> int:
        """Bytes of a window that every rank has."""

    def grow(self, sizes: dict[Window, int]) -> None:
        """Makes windows larger, together with all ranks.  CapacityExceededError on all ranks if one cannot."""

    def hold(self) -> object:
        """All windows as they are; what is grown until :meth:`restore` serves runs that are only timed."""

    def restore(self, held: object) -> set[Window]:
        """Makes windows again what they were, and gives back the rest; returns which moved.

        Everything that this rank has enqueued is over.  All ranks call it before they make their next calls.
        """

    def close(self) -> None:
        """Gives the memory back."""


class TorchSymmetricMemory:
    """Windows and words in torch's symmetric memory; every rank makes the same calls in the same order."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, exchange: Exchange, nonce: int) -> None:
        self._device, self._world, self._exchange = device, group.size(), exchange
        self._rendezvous = Rendezvous(group, nonce)
        self.retain = False
        self._trial = False
        self._refused: int | None = None  # bytes that some rank did not have
        # A handle owns the mappings of peers' memory.
        self._windows: dict[Window, tuple[Tensor, list[int], Any]] = {}
        self._retained: list[Any] = []
        failure, words = "", None
        try:
            words = self._empty(4 * len(KINDS) * WINDOWS * WORDS * self._world).zero_()
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            failure = short_text(error, 200)
        # Before the rendezvous, in which a rank that comes alone would wait long.
        for rank, text in enumerate(exchange(failure)):
            if text:
                raise OSError(f"rank {rank}: {text}")
        assert words is not None
        self._words: Tensor | None = words.view(torch.int32)
        self._word_addresses, self._word_handle = self._meet(words)
        self.multicasts = _multicast_of(self._word_handle) != 0

    def _empty(self, nbytes: int) -> Tensor:
        from torch._C._distributed_c10d import _SymmetricMemory

        # Not symm_mem.empty: newer versions take that from a pool, and a window is to be an allocation of its own.
        return _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, self._device)

    def _meet(self, memory: Tensor) -> tuple[list[int], Any]:
        """Addresses of all ranks' ``memory`` on this device, and what keeps them valid."""
        handle = self._rendezvous.meet(memory)
        ranks = range(self._world)
        return [handle.get_buffer(rank, (memory.numel(),), torch.uint8).data_ptr() for rank in ranks], handle

    def words(self, rank: int) -> int:
        return self._word_addresses[rank]

    def own_words(self) -> Tensor:
        assert self._words is not None
        return self._words

    def window(self, rank: int, place: Window) -> int:
        return self._windows[place][1][rank]

    def own_window(self, place: Window) -> Tensor:
        return self._windows[place][0]

    def multicast(self, place: Window) -> int:
        return _multicast_of(self._windows[place][2])

    def backed(self, place: Window) -> int:
        return self._windows[place][0].numel() if place in self._windows else 0

    def grow(self, sizes: dict[Window, int]) -> None:
        needed = sum(sizes.values())
        if self._refused is not None and needed >= self._refused:  # known to all ranks alike
            raise CapacityExceededError(f"{needed:,} bytes of symmetric memory were refused before")
        # Our own use of what is replaced is over after this, and everybody's after the exchange.
        torch.cuda.synchronize(self._device)
        made: dict[Window, Tensor] = {}
        failure = ""
        try:
            for place, nbytes in sizes.items():
                made[place] = self._empty(-(-nbytes // _GRANULARITY) * _GRANULARITY)
            # An allocator may clear new memory in its own time: before a peer writes there.
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, a driver's refusal another
            failure = short_text(error, 200)
        failures = {rank: text for rank, text in enumerate(self._exchange(failure)) if text}
        if failures:
            made.clear()
            self._refused = needed
            told = "; ".join(f"rank {rank}: {text}" for rank, text in failures.items())
            message = f"{needed:,} bytes of symmetric memory cannot be had: {told}"
            warnings.warn(f"{message}; calls of that size use collectives instead", CapacityWarning, stacklevel=2)
            raise CapacityExceededError(message)
        for place, memory in made.items():
            if self.retain and not self._trial and place in self._windows:
                self._retained.append(self._windows[place])
            try:
                self._windows[place] = (memory, *self._meet(memory))
            except RuntimeError as error:
                raise CommunicationError(f"ranks could not map one another's memory: {short_text(error)}") from error
        if any(kind in _SWITCHED for kind, _ in made):
            self._check_multicast(made)

    def _check_multicast(self, made: Iterable[Window]) -> None:
        """Words have had a multicast address, but a driver has only so many of them to give."""
        without = [place for place in made if place[0] in _SWITCHED and not self.multicast(place)]
        lacking = [rank for rank, text in enumerate(self._exchange("none" if without else "")) if text]
        if lacking:
            for place in made:
                del self._windows[place]
            raise ValueError(
                f"expected a multicast address for buffers of all ranks, as their first one had, got none on rank "
                f'{", ".join(map(str, lacking))}: the driver has no more to give; use reduce="ranks", the default'
            )

    def hold(self) -> object:
        self._trial = True  # what graphs use is held, and what is grown now is used by none
        return dict(self._windows), self._refused

    def restore(self, held: object) -> set[Window]:
        # A peer that is still about to map what we give back has its own reference.  Words, which order all use of
        # windows, are not touched.
        assert isinstance(held, tuple)
        before, refused = held
        self._trial = False
        moved = {place for place, window in self._windows.items() if window is not before.get(place)}
        self._windows = before
        if moved:
            self._refused = refused  # there was too little beside what is given back now
        return moved

    def close(self) -> None:
        self._rendezvous.close()
        self._windows.clear()
        self._retained.clear()
        self._words = self._word_handle = None


def _multicast_of(handle: Any) -> int:
    """Of memory that ranks have mapped; 0 where the driver or a device cannot."""
    return int(getattr(handle, "multicast_ptr", 0) or 0)
