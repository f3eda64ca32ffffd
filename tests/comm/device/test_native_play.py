"""A whole schedule by one native call: the same launches and callbacks as operation by operation, or an error."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from odysseus_kernels import _ext
from odysseus_kernels.comm.device.lowering import Plan
from odysseus_kernels.comm.schedules.steps import Kind
from odysseus_kernels.comm.schedules.streams import COPY_STREAMS, STREAMS
from odysseus_kernels.testing.rehearsal import (
    BASE_ADDRESSES,
    STREAM_HANDLES,
    ListedOperations,
    RehearsedCall,
    rehearsed,
)

pytestmark = [
    pytest.mark.without_ranks,
    pytest.mark.skipif(not _ext.has_cuda(), reason="the extension was built without CUDA"),
]

CALLS = (
    [
        RehearsedCall(program, layout, world, rank, pieces, batch, 24, 16, published, ahead)  # type: ignore[arg-type]
        for world, rank in ((2, 1), (3, 0), (8, 5))
        for pieces in (1, 3)
        for batch in (1, 2)
        for program, layout, published, ahead in (
            ("gather", "cells", False, False),
            ("gather", "cells", True, False),
            ("gather", "cells", False, True),
            ("gather", "ranks", False, False),
            ("gather", "visits", False, False),
            ("scatter", "cells", False, False),
            ("scatter", "cells", False, True),
            ("scatter", "ranks", False, False),
            ("gather+scatter", "cells", False, False),
            ("gather+scatter", "cells", True, False),
        )
    ]
    + [
        RehearsedCall(program, "cells", world, 1, pieces, batch, 24, 16, switched=True)  # type: ignore[arg-type]
        for world in (2, 8)
        for pieces, batch in ((1, 2), (3, 1))
        for program in ("gather", "scatter", "gather+scatter")
    ]
    + [RehearsedCall("scatter", "visits", world, 1, 1, rows=24, width=16) for world in (2, 8)]
)


def native(call: RehearsedCall, **options: Any) -> Any:
    operations = _ext.load().cuda.host_side.Rehearsal()
    return operations, rehearsed(call, operations, **options)


def listed(call: RehearsedCall, **options: Any) -> Any:
    operations = ListedOperations()
    return operations, rehearsed(call, operations, **options)


def log_of(operations: Any, plan: Plan, *, skip: set[int] = frozenset()) -> list[Any]:  # type: ignore[assignment]
    """Everything that happens, callbacks by their index among the plan's actions; ``skip`` are None."""
    log: list[Any] = []

    def drain() -> None:
        if isinstance(operations, ListedOperations):
            log.extend(operations.launches)
            operations.launches.clear()
        else:
            log.extend(operations.take_launches())

    def callback(index: int) -> Callable[[], None]:
        def called() -> None:
            drain()
            log.append(index)

        return called

    steps = enumerate(action.step for action in plan.actions)
    callbacks = [None if step is None or index in skip else callback(index) for index, step in steps]
    operations.play(plan.stops, callbacks, STREAM_HANDLES, BASE_ADDRESSES, 1.0)
    drain()
    return log


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_one_native_call_enqueues_what_single_operations_do(call: RehearsedCall) -> None:
    wanted = log_of(*listed(call))
    operations, plan = native(call)
    assert log_of(operations, plan) == wanted
    assert operations.launched == sum(not isinstance(entry, int) for entry in wanted) > 4
    assert [entry for entry in wanted if isinstance(entry, int)] == [
        index for index, action in enumerate(plan.actions) if action.step is not None
    ]
    assert log_of(operations, plan) == wanted, "a program is run any number of times"
    skip = set(range(0, len(plan.actions), 2))
    assert log_of(operations, plan, skip=skip) == log_of(*listed(call), skip=skip)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_broken_variant_of_any_program_differs(call: RehearsedCall) -> None:
    """A step that is missing or doubled, or a signal of another value, is seen in what is enqueued."""
    schedule, choose = call.schedule(), random.Random(str(call))
    right, steps = log_of(*native(call)), schedule.steps
    kinds = (Kind.SIGNAL, Kind.RELEASE, Kind.COPY)
    outside = [index for index, step in enumerate(steps) if not step.inside and step.kind in kinds]
    for _ in range(4):
        index = choose.choice(outside)
        gone = dataclasses.replace(schedule, steps=(*steps[:index], *steps[index + 1 :]))
        twice = dataclasses.replace(schedule, steps=(*steps[: index + 1], *steps[index:]))
        for broken in (gone, twice):
            found = log_of(*native(call, schedule=broken))
            assert found == log_of(*listed(call, schedule=broken)) != right
    signal = next(index for index in outside if steps[index].kind is not Kind.COPY)
    later = dataclasses.replace(steps[signal], value=steps[signal].value - 1)
    broken = dataclasses.replace(schedule, steps=(*steps[:signal], later, *steps[signal + 1 :]))
    assert log_of(*native(call, schedule=broken)) == log_of(*listed(call, schedule=broken)) != right


def _window_of(address: int) -> int | None:
    """The rank in whose window an address of a rehearsal lies; None for memory of the call."""
    return (address - (1 << 52)) >> 44 if 1 << 52 <= address < 1 << 53 else None


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_only_copies_between_ranks_are_left_to_copy_engines(call: RehearsedCall) -> None:
    """Within a device an engine is far slower than its multiprocessors, and everybody waits for such copies."""
    copies = [entry for entry in log_of(*native(call)) if not isinstance(entry, int) and entry[0] == "copy"]
    within = 0
    for _, stream, (dst, src), (*_, over_link) in copies:
        owners = {_window_of(dst), _window_of(src)} - {None}
        assert len(owners) == 1, "each copy has one end in memory that ranks share"
        assert over_link == (owners != {call.rank}), "a peer's, and only then"
        name = STREAMS[STREAM_HANDLES.index(stream)]
        assert (name in COPY_STREAMS) == bool(over_link), "none between ranks is behind one that multiprocessors make"
        within += not over_link
    published = "gather" in call.program and not (call.published or call.switched)
    assert within == call.pieces * (published + (call.ahead and not call.switched))


def test_addresses_of_a_call_are_patched_by_index() -> None:
    operations, plan = native(RehearsedCall("gather+scatter", world=3, rows=24, width=16))
    first = log_of(operations, plan)
    moved = [0, *(base + 4096 * index for index, base in enumerate(BASE_ADDRESSES[1:], 1))]
    operations.play(plan.stops, [None] * len(plan.stops), STREAM_HANDLES, moved, 1.0)
    launches = operations.take_launches()
    before = [entry for entry in first if not isinstance(entry, int)]
    assert [(kind, stream, values) for kind, stream, _, values in launches] == [
        (kind, stream, values) for kind, stream, _, values in before
    ]
    shifts = {
        new - old
        for (_, _, addresses, _), (_, _, others, _) in zip(launches, before, strict=True)
        for new, old in zip(addresses, others, strict=True)
    }
    assert shifts == {0, *(4096 * index for index in range(1, 5))}  # nothing was sent ahead


def test_what_a_callback_raises_ends_the_call_there() -> None:
    operations, plan = native(RehearsedCall("gather", world=3, rows=24, width=16))

    def fail() -> None:
        raise KeyError("of the operator")

    later = [lambda: pytest.fail("called after an error")] * (len(plan.stops) - 1)
    with pytest.raises(KeyError, match="of the operator"):
        operations.play(plan.stops, [fail, *later], STREAM_HANDLES, BASE_ADDRESSES, 1.0)
    assert operations.launched == plan.stops[0]
    assert log_of(operations, plan)[plan.stops[0] :], "the program can be run again"


def test_everything_is_checked_before_the_first_launch() -> None:
    operations, plan = native(RehearsedCall("scatter", world=3, rows=24, width=16))
    count, nothing = len(operations), [None] * len(plan.stops)
    called: list[int] = []
    for stops, callbacks, streams, bases, timeout_s, said in (
        (plan.stops[:-1], nothing, STREAM_HANDLES, BASE_ADDRESSES, 1.0, "each stop has one callback"),
        ([2, 1], [None, None], STREAM_HANDLES, BASE_ADDRESSES, 1.0, "not before the one ahead of it"),
        ([-1], [None], STREAM_HANDLES, BASE_ADDRESSES, 1.0, "not before the one ahead of it"),
        ([count + 1], [None], STREAM_HANDLES, BASE_ADDRESSES, 1.0, "a stop is a number of operations"),
        (plan.stops, nothing, STREAM_HANDLES[:1], BASE_ADDRESSES, 1.0, "stream of operation"),
        (plan.stops, nothing, STREAM_HANDLES, BASE_ADDRESSES[:3], 1.0, "base of"),
        (plan.stops, nothing, STREAM_HANDLES, [0] * len(BASE_ADDRESSES), 1.0, "is a null pointer"),
        (plan.stops, nothing, STREAM_HANDLES, BASE_ADDRESSES, math.nan, "no timeout"),
    ):
        with pytest.raises(ValueError, match=said):
            operations.play(
                stops, [callback or (lambda: called.append(1)) for callback in callbacks], streams, bases, timeout_s
            )
    assert operations.launched == 0 and not called
    operations.play([], [], STREAM_HANDLES, BASE_ADDRESSES, math.inf)
    assert operations.launched == count
