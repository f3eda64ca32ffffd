"""Proof that a replay of captured calls cannot hang, on the edges of each rank's graph alone.

A captured graph keeps what depends on what, not the order in which it was enqueued: a replay may run the nodes of a
rank one at a time, in any order that the edges allow, while its waits spin.  :func:`prove_replays` shows that no choice
of orders hangs, whatever each rank chooses: it counts a signal as sent only once all waits that *could* run before it
have ended, and a wait as ended only once its signal is sent.  If every wait ends under this rule, it ends in every
replay; else the message names the waits that would not.

:func:`replayed` gives one such order, and by default a bad one: waits as early as the edges allow, signals as late.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from odysseus_kernels.comm.schedules.steps import Kind
from odysseus_kernels.testing.happens_before import Event, ScheduleError, SharedWord

__all__ = ["Node", "edges", "one_at_a_time", "prove_replays", "replayed"]


Node = tuple[Hashable, Hashable | None, Hashable | None]  # a node's stream, what it records, what it depends on


def edges(nodes: Sequence[Node]) -> list[list[int]]:
    """Successors of each node of a graph: the next of its stream, and what depends on what it records."""
    successors: list[list[int]] = [[] for _ in nodes]
    last: dict[Hashable, int] = {}
    recorded: dict[Hashable, int] = {}
    for index, (stream, records, depends) in enumerate(nodes):
        if stream in last:
            successors[last[stream]].append(index)
        last[stream] = index
        if records is not None:
            recorded[records] = index
        if depends is not None:
            successors[recorded[depends]].append(index)
    return successors


def _edges(events: Sequence[Event]) -> list[list[int]]:
    return edges(
        [
            (e.stream, e.event if e.kind is Kind.RECORD else None, e.event if e.kind is Kind.DEPEND else None)
            for e in events
        ]
    )


def _before_signals(events: Sequence[Event]) -> dict[int, int]:
    """For each signal, a bit for each wait of its rank that no edge puts behind it."""
    waits = {index: bit for bit, index in enumerate(i for i, event in enumerate(events) if event.kind is Kind.WAIT)}
    behind = [0] * len(events)
    successors = _edges(events)
    for index in range(len(events) - 1, -1, -1):  # a host enqueues in an order that all edges agree with
        for successor in successors[index]:
            behind[index] |= behind[successor] | (1 << waits[successor] if successor in waits else 0)
    every = (1 << len(waits)) - 1
    return {index: every & ~behind[index] for index, event in enumerate(events) if event.signals}


def prove_replays(events: Sequence[Sequence[Event]]) -> int:
    """Checks that the ranks' graphs end in whatever orders they are run; returns the number of waits.

    Args:
        events: of each rank, as ``testing/device_events.py`` binds them.

    Raises:
        ScheduleError: names waits that some orders of some ranks never end.
    """
    missing = [_before_signals(rank) for rank in events]
    signals: dict[SharedWord, list[tuple[int, int, int]]] = defaultdict(list)
    for number, rank in enumerate(events):
        for index, event in enumerate(rank):
            if event.signals and event.word is not None:
                signals[event.word].append((event.value, number, index))
    waiting: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)  # by signal: rank and bit of its waits
    ended = [0] * len(events)
    labels: list[list[Event]] = []
    for number, rank in enumerate(events):
        labels.append([event for event in rank if event.kind is Kind.WAIT])
        for bit, event in enumerate(labels[-1]):
            enough = [(source, index) for value, source, index in signals[_word(event)] if value >= event.value]
            if event.value <= 0:  # words begin at 0
                ended[number] |= 1 << bit
            elif not enough:
                raise ScheduleError(f"a wait has no signal: {event}")
            else:
                waiting[enough[0]].append((number, bit))
    progress = True
    while progress:
        progress = False
        for number, left in enumerate(missing):
            for index in [index for index, before in left.items() if not before & ~ended[number]]:
                del left[index]
                progress = True
                for rank_, bit in waiting.pop((number, index), ()):
                    ended[rank_] |= 1 << bit
    stuck = [
        str(event)
        for number, waits in enumerate(labels)
        for bit, event in enumerate(waits)
        if not ended[number] >> bit & 1
    ]
    if stuck:
        raise ScheduleError(f"deadlock: a replay in another order may never end: {'; '.join(stuck[:4])}")
    return sum(map(len, labels))


def _word(event: Event) -> SharedWord:
    assert event.word is not None
    return event.word


def replayed(events: Sequence[Event], seed: int, *, fair: bool = False) -> list[Event]:
    """One rank's events in an order in which a replay of their graph may run them, one at a time.

    Args:
        events: of one rank.
        seed: of the order.
        fair: any order; else waits come as early and signals as late as the edges allow.
    """
    choose = random.Random(seed)
    successors = _edges(events)
    # What leads to a wait before what leads to a signal.
    urgent = [event.kind is Kind.WAIT for event in events]
    for index in range(len(events) - 1, -1, -1):
        urgent[index] = urgent[index] or any(urgent[successor] for successor in successors[index])

    def first(index: int) -> tuple[int, float]:
        return (0 if fair else 2 * events[index].signals + (not urgent[index]), choose.random())

    return [events[index] for index in one_at_a_time(successors, first)]


def one_at_a_time(successors: Sequence[Sequence[int]], first: Callable[[int], Any]) -> list[int]:
    """An order of a graph's nodes that its edges allow; of nodes that may be next, the one with the least ``first``."""
    missing = [0] * len(successors)
    for following in successors:
        for index in following:
            missing[index] += 1
    ready = [index for index, count in enumerate(missing) if count == 0]
    order: list[int] = []
    while ready:
        index = min(ready, key=first)
        ready.remove(index)
        order.append(index)
        for successor in successors[index]:
            missing[successor] -= 1
            if missing[successor] == 0:
                ready.append(successor)
    return order
