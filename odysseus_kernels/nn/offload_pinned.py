"""Tensors of GPUs in pinned memory of their host, copied on a stream of their own.

Ordering.  The copy out waits for the work that made the tensor; the tensor is let go once the caller's stream has been
told to wait for that copy, which :meth:`PinnedStore.put` does for the tensor before, so at most one is on its way.  A
copy back is into memory of the caller's stream, waits for what used that memory before, and is waited for when the
tensor is taken.  All copies are on one stream, so a buffer that is given back may be written again at once.

No GPU has run this yet: it is written from the documentation of streams, events and the caching allocator.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

__all__ = ["PinnedStore"]


class PinnedStore:
    """Pinned buffers of one device's host.

    Attributes:
        written, read: bytes so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.written = self.read = 0
        self._stream = torch.cuda.Stream(device)
        self._free: list[Tensor] = []
        self._returned: deque[Tensor] = deque()  # appended to by garbage collection, at any moment
        self._leaving: PinnedSlot | None = None

    @property
    def stream(self) -> torch.cuda.Stream:
        """Where copies run."""
        return self._stream

    def put(self, tensor: Tensor) -> PinnedSlot:
        """Begins to copy ``tensor`` to the host."""
        self.settle()
        tensor = tensor.contiguous()
        slot = PinnedSlot(self, tensor, self._buffer(tensor))
        self.written += tensor.nbytes
        self._leaving = slot
        return slot

    def settle(self) -> None:
        """Lets go of the tensor that is being copied: from here on the caller's stream waits for the copy."""
        slot, self._leaving = self._leaving, None
        if slot is not None:
            slot.let_go()

    def give_back(self, buffer: Tensor) -> None:
        """``buffer`` is not needed any more."""
        self._returned.append(buffer)

    def _buffer(self, tensor: Tensor) -> Tensor:
        while self._returned:
            self._free.append(self._returned.popleft())
        for index, buffer in enumerate(self._free):
            if buffer.shape == tensor.shape and buffer.dtype == tensor.dtype:
                return self._free.pop(index)
        self._free.clear()  # sizes have changed: pinned memory is dear
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class PinnedSlot:
    """A tensor that was copied to the host."""

    def __init__(self, store: PinnedStore, tensor: Tensor, buffer: Tensor) -> None:
        self.nbytes = tensor.nbytes
        self._store, self._buffer, self._device = store, buffer, tensor.device
        self._tensor: Tensor | None = tensor
        self._fetched: tuple[torch.cuda.Event, Tensor] | None = None
        store.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(store.stream):
            buffer.copy_(tensor, non_blocking=True)
            self._copied = store.stream.record_event()

    def let_go(self) -> None:
        """The caller's stream waits for the copy; behind that the tensor's memory may be used again."""
        torch.cuda.current_stream(self._device).wait_event(self._copied)
        self._tensor = None

    def begin(self) -> None:
        """Begins to copy it back, if it is not here."""
        if self._tensor is not None or self._fetched is not None:
            return
        stream, tensor = self._store.stream, torch.empty_like(self._buffer, device=self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            tensor.copy_(self._buffer, non_blocking=True)
            self._fetched = stream.record_event(), tensor
        self._store.read += self.nbytes

    def take(self) -> Tensor:
        """The tensor, for work on the caller's stream; it can be taken again, and is then copied again."""
        if self._tensor is not None:
            return self._tensor
        self.begin()
        assert self._fetched is not None
        (event, tensor), self._fetched = self._fetched, None
        torch.cuda.current_stream(self._device).wait_event(event)
        return tensor

    def __del__(self) -> None:
        self._store.give_back(self._buffer)
