"""From trace events to what a timeline draws: what each rank's thread and each of its links did when.

A *panel* is one step of one variant, as ``ranks.py`` traced it: ``spans`` has begin and end of the step on each rank in
microseconds since 1970, ``events`` the trace events of all ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

__all__ = ["KINDS", "LANES", "Interval", "Kind", "Lane", "intervals_of", "merge_events", "totals_ms"]

Event = dict[str, Any]
Lane = Literal["works", "sends", "receives"]
Kind = Literal["own", "peer", "other", "wait", "copy", "send", "receive"]

LANES: tuple[Lane, ...] = ("works", "sends", "receives")
"""Lanes of a rank: its thread, and what leaves and arrives beside it."""

KINDS: dict[Kind, str] = {
    "own": "computes on its own chunk",
    "peer": "computes on another rank's chunk",
    "other": "computes outside of chunks (attention, norms, unfused products)",
    "wait": "waits",
    "copy": "copies",
    "send": "sends, until it has arrived",
    "receive": "receives",
}
"""What a rank can do, in words."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """What one lane of one rank did, in milliseconds since the first rank began the step.

    Attributes:
        rank, lane: where.
        kind: one of :data:`KINDS`.
        begin, end: when.
        peer: the rank that was waited for, or whose chunk it was, where the trace names one.
        phase: ``"forward"`` or ``"backward"``, where the trace says so.
    """

    rank: int
    lane: Lane
    kind: Kind
    begin: float
    end: float
    peer: int | None = None
    phase: str = ""


def intervals_of(panel: Mapping[str, Any]) -> list[Interval]:
    """All intervals of a panel, by rank and lane, in order of time.

    A rank's thread is never idle: what no step of the trace covers it computes outside of them.  So the intervals of
    its lane follow one another without gaps from begin to end of the step.
    """
    origin = min(begin for begin, _ in panel["spans"])
    found: list[Interval] = []
    for rank, (begin, end) in enumerate(panel["spans"]):
        mine = [event for event in panel["events"] if event["pid"] == rank and event["ph"] == "X"]
        mine.sort(key=lambda event: float(event["ts"]))
        found += _work(rank, mine, begin, end, origin)
        # A rank sends until its peer has it all: the kernel takes a block long before that has left.
        arrived = [event for event in panel["events"] if event.get("cat") == "receive"]
        leaving = [event for event in arrived if event["args"]["peer"] == rank]
        found += _moves(rank, "sends", "send", leaving, "pid", (begin, end, origin))
        arriving = [event for event in arrived if event["pid"] == rank]
        found += _moves(rank, "receives", "receive", arriving, "peer", (begin, end, origin))
    return found


def totals_ms(intervals: Sequence[Interval], ranks: int) -> list[dict[Kind, float]]:
    """Milliseconds of each kind, for each rank."""
    totals: list[dict[Kind, float]] = [dict.fromkeys(KINDS, 0.0) for _ in range(ranks)]
    for one in intervals:
        totals[one.rank][one.kind] += one.end - one.begin
    return totals


def merge_events(documents: Sequence[Mapping[str, Any]]) -> list[Event]:
    """The events of all ranks' traces; of arrows only those with both ends.

    What is under way when a rank's trace begins or ends may have been seen by its peer alone.
    """
    events = [event for document in documents for event in document["traceEvents"]]
    ends = {kind: {event["id"] for event in events if event["ph"] == kind} for kind in "sf"}
    whole = ends["s"] & ends["f"]
    return [event for event in events if event["ph"] not in ends or event["id"] in whole]


def _work(rank: int, events: Sequence[Event], begin: float, end: float, origin: float) -> Iterator[Interval]:
    def interval(kind: Kind, first: float, last: float, event: Event | None = None) -> Interval:
        args = {} if event is None else event["args"]
        times = (first - origin) / 1000, (last - origin) / 1000
        return Interval(rank, "works", kind, *times, args.get("peer"), args.get("phase", ""))

    at = begin
    for event in events:
        kind = _kind(event)
        if kind is None:
            continue
        first, last = max(float(event["ts"]), at), min(float(event["ts"] + event["dur"]), end)
        if last <= first:
            continue
        if first > at:
            yield interval("other", at, first)
        yield interval(kind, first, last, event)
        at = last
    if at < end:
        yield interval("other", at, end)


def _kind(event: Event) -> Kind | None:
    """None for what other events cover, for what links do, and for what takes no time worth a colour."""
    category = event["cat"]
    if category == "compute":
        return "peer" if "peer" in event["args"] else "own"
    return category if category in ("wait", "copy") else None


def _moves(
    rank: int, lane: Lane, kind: Kind, arrived: Sequence[Event], other: str, span: tuple[float, float, float]
) -> Iterator[Interval]:
    """``arrived``: events of blocks, in which ``other`` names the other end; ``span``: begin, end, origin."""
    begin, end, origin = span
    for event in sorted(arrived, key=lambda event: float(event["ts"])):
        first, last = max(float(event["ts"]), begin), min(float(event["ts"] + event["dur"]), end)
        peer = event["pid"] if other == "pid" else event["args"]["peer"]
        if last > first:
            yield Interval(rank, lane, kind, (first - origin) / 1000, (last - origin) / 1000, peer)
