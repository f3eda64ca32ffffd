"""What the Trace Event Format, as Chrome and Perfetto read it, asks of the events that ``ody.trace`` writes.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU: complete events (X), flow events (s, f)
and metadata (M).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

Event = dict[str, Any]

_METADATA = {
    "process_name": "name",
    "process_sort_index": "sort_index",
    "thread_name": "name",
    "thread_sort_index": "sort_index",
}


def problems_of(document: dict[str, Any]) -> list[str]:
    """One line for each rule that an event breaks; empty for a valid trace."""
    events = document["traceEvents"]
    problems = [problem for event in events for problem in _fields(event)]
    if problems:
        return problems  # the other rules compare fields
    slices = [event for event in events if event["ph"] == "X"]
    return [*_metadata(events, slices), *_nesting(slices), *_arrows(events, slices)]


def _fields(event: Event) -> list[str]:
    kind = event.get("ph")
    if kind not in ("X", "M", "s", "f"):
        return [f"ph: expected X, M, s or f, got {kind!r} in {event}"]
    expected: dict[str, type] = {"name": str, "pid": int, "tid": int}
    if kind != "M":
        # Whole: of a float, Perfetto keeps steps of 256 ns at times since 1970, and drops slices that then overlap.
        # Nor does it show arrows whose "id" is a text.
        expected |= {"ts": int, "cat": str}
    expected |= {"X": {"dur": int, "args": dict}, "M": {"args": dict}}.get(kind, {"id": int})
    problems = [
        f"{field}: expected {types}, got {event.get(field)!r} in {event}"
        for field, types in expected.items()
        if not isinstance(event.get(field), types)
    ]
    for field in ("ts", "dur"):
        value = event.get(field, 0)
        if isinstance(value, int) and value < 0:
            problems.append(f"{field}: expected a time, got {value} in {event}")
    if kind == "f" and event.get("bp") != "e":
        problems.append(f'bp: expected "e", or the arrow ends at the next slice, in {event}')
    return problems


def _metadata(events: list[Event], slices: list[Event]) -> list[str]:
    metadata = [event for event in events if event["ph"] == "M"]
    problems = [
        f"metadata: expected {_METADATA}, got {event}"
        for event in metadata
        if _METADATA.get(event["name"]) not in event["args"]
    ]
    given = Counter((event["name"], event["pid"], event["tid"] * ("thread" in event["name"])) for event in metadata)
    problems += [f"metadata: given {count} times: {key}" for key, count in given.items() if count > 1]
    for pid, tid in sorted({(event["pid"], event["tid"]) for event in slices}):
        if ("process_name", pid, 0) not in given or ("thread_name", pid, tid) not in given:
            problems.append(f"metadata: process {pid}, thread {tid} has no name")
    return problems


def _nesting(slices: list[Event]) -> list[str]:
    lanes = defaultdict(list)
    for event in slices:
        lanes[event["pid"], event["tid"]].append((event["ts"], -event["dur"], event["name"]))
    problems = []
    for lane, found in lanes.items():
        around: list[tuple[float, str]] = []  # ends of what is open
        for begin, negative, name in sorted(found):
            end = begin - negative
            while around and around[-1][0] <= begin:
                around.pop()
            if around and end > around[-1][0]:
                problems.append(f"{lane}: {name} and {around[-1][1]} overlap, and neither is within the other")
            around.append((end, name))
    return problems


def _arrows(events: list[Event], slices: list[Event]) -> list[str]:
    ends: dict[Any, dict[str, list[Event]]] = defaultdict(lambda: {"s": [], "f": []})
    for event in events:
        if event["ph"] in "sf":
            ends[event["cat"], event["name"], event["id"]][event["ph"]].append(event)
    problems = []
    for key, both in ends.items():
        if len(both["s"]) != 1 or len(both["f"]) != 1:
            lacks = "no begin" if not both["s"] else "no end" if not both["f"] else "several ends"
            problems.append(f"arrow {key} has {lacks}")
        elif both["s"][0]["ts"] > both["f"][0]["ts"]:
            problems.append(f"arrow {key} ends before it begins")
        for end in (*both["s"], *both["f"]):
            around = any(
                (one["pid"], one["tid"]) == (end["pid"], end["tid"])
                and one["ts"] <= end["ts"] <= one["ts"] + one["dur"]
                for one in slices
            )
            if not around:
                problems.append(f"arrow {key} points at no slice: {end}")
    return problems
