"""Which window of shared memory an operator in flight uses, and what must have been read before it may write there.

Every rank owns the same windows and makes the same leases in the same order, so that a window, its cells' counts and
therefore every signal value is known on all ranks without telling one another.  There is no barrier between calls: a
window that is leased again carries the *credits* (reader, count) that its last use still has to collect, and the next
writer waits for those alone.  This is bookkeeping without side effects; transports execute it and the happens-before
proof runs the same code.
"""

from __future__ import annotations

import dataclasses

__all__ = ["Credit", "Lease", "LeaseTable"]

# Two windows before one is used again: the readers of the call before last have long finished.
_ROTATION = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Credit:
    """``reader`` must have set its ``done`` word of ``cell`` to ``count`` before the window is written again."""

    cell: int
    reader: int
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class Lease:
    """One buffer of one call.

    Attributes:
        window: index of the window, equal on all ranks.
        bases: value of each cell's words when the lease began; the schedule's values are added to it.
        credits: what the first write has to wait for.
    """

    window: int
    bases: tuple[int, ...]
    credits: tuple[Credit, ...]


class LeaseTable:
    """Leases of one rank.  ``windows`` and ``cells`` are what the segment was made with."""

    def __init__(self, windows: int, cells: int) -> None:
        self._counts = [[0] * cells for _ in range(windows)]
        self._credits: list[tuple[Credit, ...]] = [()] * windows
        self._free: list[int] = []  # least recently used first
        self._made = 0

    def lease(self) -> Lease:
        """Takes the window that has been free the longest.

        Raises:
            RuntimeError: all windows are leased; operators in flight were not finished.
        """
        windows = len(self._counts)
        if self._made < windows and (self._made < _ROTATION or not self._free):
            window = self._made
            self._made += 1
        elif self._free:
            window = self._free.pop(0)
        else:
            raise RuntimeError(f"all {windows} windows are leased: operators in flight were never finished")
        return Lease(window, tuple(self._counts[window]), self._credits[window])

    def give_back(self, lease: Lease, counts: tuple[int, ...], readers: tuple[tuple[int, ...], ...]) -> None:
        """Ends ``lease``, whose cells were advanced by ``counts`` and last read by ``readers``.

        Its own credits were collected before its first write, so only what this call's readers owe is carried on.
        ``readers`` is empty for a published buffer that nobody will read: a prefetch that was discarded.
        """
        owed: list[Credit] = []
        for cell, count in enumerate(counts):
            self._counts[lease.window][cell] += count
            if count and readers:
                owed.extend(Credit(cell, reader, self._counts[lease.window][cell]) for reader in readers[cell])
        self._credits[lease.window] = tuple(owed)
        self._free.append(lease.window)

    def restore(self, lease: Lease) -> None:
        """Undoes ``lease``, in which nothing was written: what its previous use is owed stays owed."""
        self._free.insert(0, lease.window)
