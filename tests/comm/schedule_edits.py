"""Ways to break the steps of a schedule, which a proof has to notice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from odysseus_kernels.comm.schedules.device import PREVIOUS_USE
from odysseus_kernels.comm.schedules.steps import Kind, Step

Edit = Callable[[list[Step], int], list[Step]]


def without(match: Callable[[Step], bool]) -> Edit:
    return lambda steps, rank: [step for step in steps if not match(step)]


def waits_for(buffer: str, previous: bool) -> Callable[[Step], bool]:
    return lambda s: (
        s.kind is Kind.WAIT and s.word is not None and s.word.buffer == buffer and (s.value == PREVIOUS_USE) == previous
    )


def depends(stream: str, on: str) -> Edit:
    """Takes out the dependencies of some streams on others, given by how their names begin."""

    def edit(steps: list[Step], rank: int) -> list[Step]:
        recorded = {step.event: step.stream for step in steps if step.kind is Kind.RECORD}

        def matches(step: Step) -> bool:
            return step.kind is Kind.DEPEND and step.stream.startswith(stream) and recorded[step.event].startswith(on)

        return [step for step in steps if not matches(step)]

    return edit


def only_begin(stream: str, on: str) -> Edit:
    """Streams that would come after others come only after the begin of the call, which every stream does."""

    def edit(steps: list[Step], rank: int) -> list[Step]:
        recorded = {step.event: step.stream for step in steps if step.kind is Kind.RECORD}

        def changed(step: Step) -> Step:
            matches = step.kind is Kind.DEPEND and step.stream == stream and recorded[step.event] == on
            return dataclasses.replace(step, event=steps[0].event) if matches else step

        return [changed(step) for step in steps]

    return edit


def swap(first: Callable[[Step], bool]) -> Edit:
    """Exchanges the first step that matches with the next one of its stream."""

    def edit(steps: list[Step], rank: int) -> list[Step]:
        for index, step in enumerate(steps):
            if first(step):
                later = next(i for i in range(index + 1, len(steps)) if steps[i].stream == step.stream)
                steps[index], steps[later] = steps[later], steps[index]
                return steps
        return steps

    return edit


def one_part(buffer: str) -> Edit:
    def move(step: Step) -> Step:
        return dataclasses.replace(
            step,
            reads=tuple(r._replace(part=0) if r.buffer == buffer else r for r in step.reads),
            writes=tuple(w._replace(part=0) if w.buffer == buffer else w for w in step.writes),
        )

    return lambda steps, rank: [move(step) for step in steps]
