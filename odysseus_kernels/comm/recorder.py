"""Bytes that each rank sends, by operator, phase and collective.

The one place that counts is :meth:`Transport.execute <odysseus_kernels.comm.transport.Transport.execute>`, so that
operators and benchmarks cannot count differently from one another.  What is counted is what the usual formulas give:
(N-1)/N of the global tensor for an all-gather or a reduce-scatter, twice that for an all-reduce.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Literal

__all__ = ["CommRecorder", "Outcome", "Traffic", "not_recorded", "record", "record_ahead"]

# How a gather began: with shards that an earlier call had sent ahead, or in the open; and shards sent for nothing.
Outcome = Literal["served", "open", "dropped"]

_lock = threading.Lock()
_active: list[CommRecorder] = []
_paused = threading.local()


@dataclasses.dataclass(frozen=True, order=True)
class Traffic:
    """What was sent: operator, phase (``"forward"`` or ``"backward"``), collective and transport."""

    operator: str
    phase: str
    collective: str
    transport: str


class CommRecorder:
    """Counts the bytes that this rank sends while it is entered.

    Recorders may be nested; each counts everything within it.  Backward passes run on other threads in some setups,
    so counting is by process, not by thread.

    Example:
        >>> with ody.CommRecorder() as record:
        ...     y = ody.all_gather_linear(torch.ones(8, 16), torch.ones(6, 16), group=group)
        >>> record.bytes(collective="all_gather")  # 8 x 16 numbers of 4 bytes, to one peer
        512
        >>> print(record.table())
        operator           phase    collective  transport  calls  bytes
        all_gather_linear  forward  all_gather  symmetric      1    512
        total                                                  1    512
    """

    def __init__(self) -> None:
        self._bytes: Counter[Traffic] = Counter()
        self._calls: Counter[Traffic] = Counter()
        self._ahead: Counter[tuple[str, str, Outcome]] = Counter()

    def __enter__(self) -> CommRecorder:
        with _lock:
            _active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            _active.remove(self)

    def bytes(self, *, operator: str | None = None, phase: str | None = None, collective: str | None = None) -> int:
        """Bytes sent by this rank, of all traffic that matches what is given."""
        wanted = {"operator": operator, "phase": phase, "collective": collective}
        with _lock:
            counted = list(self._bytes.items())
        return sum(
            count
            for traffic, count in counted
            if all(value is None or getattr(traffic, name) == value for name, value in wanted.items())
        )

    def ahead(self, *, operator: str | None = None, phase: str | None = None) -> dict[str, int]:
        """How gathers began: ``served`` by what was sent ahead, or in the ``open``; and what was ``dropped``.

        Gathers of activations, which nothing can send ahead, are among the open ones of their operators.  What is
        dropped is counted for the operator that came instead of the one that it was sent for, and is in no bytes.
        """
        found = {"served": 0, "open": 0, "dropped": 0}
        with _lock:
            counted = list(self._ahead.items())
        for (its_operator, its_phase, outcome), count in counted:
            if operator in (None, its_operator) and phase in (None, its_phase):
                found[outcome] += count
        return found

    def rows(self) -> list[dict[str, str | int]]:
        """One row for each kind of traffic: operator, phase, collective, transport, calls, bytes."""
        with _lock:
            counted = sorted(self._bytes)
        return [
            {**dataclasses.asdict(traffic), "calls": self._calls[traffic], "bytes": self._bytes[traffic]}
            for traffic in counted
        ]

    def table(self) -> str:
        """The rows as text, with a total."""
        header = ("operator", "phase", "collective", "transport", "calls", "bytes")
        lines = [header, *((*(str(row[name]) for name in header[:5]), f"{row['bytes']:,}") for row in self.rows())]
        lines.append(("total", "", "", "", str(sum(self._calls.values())), f"{self.bytes():,}"))
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        numbers = (4, 5)

        def cell(column: int, text: str) -> str:
            return text.rjust(widths[column]) if column in numbers else text.ljust(widths[column])

        return "\n".join("  ".join(cell(i, text) for i, text in enumerate(line)).rstrip() for line in lines)

    def _add(self, traffic: Traffic, count: int, calls: int) -> None:
        self._bytes[traffic] += count
        self._calls[traffic] += calls


@contextlib.contextmanager
def not_recorded() -> Iterator[None]:
    """What this thread sends meanwhile is not counted: runs that only find out which mode is fastest."""
    before = getattr(_paused, "on", False)
    _paused.on = True
    try:
        yield
    finally:
        _paused.on = before


def record(traffic: Traffic, count: int, calls: int = 1) -> None:
    """Adds ``count`` bytes sent by this rank in ``calls`` calls to every entered recorder."""
    if getattr(_paused, "on", False):
        return
    with _lock:
        for recorder in _active:
            recorder._add(traffic, count, calls)


def record_ahead(operator: str, phase: str, outcome: Outcome) -> None:
    """Adds how a gather of ``operator`` began, or that it came instead of the one that something was sent for."""
    if getattr(_paused, "on", False):
        return
    with _lock:
        for recorder in _active:
            recorder._ahead[operator, phase, outcome] += 1
