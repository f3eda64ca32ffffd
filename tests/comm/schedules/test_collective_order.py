"""Orders of asynchronous collectives for a slow link: buffers in flight are left alone, and the link does not idle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from odysseus_kernels.comm.schedules.collective import collective_schedule, tapered_spans
from odysseus_kernels.comm.schedules.steps import Kind, Step, Task

pytestmark = pytest.mark.without_ranks

PROGRAMS = ("gather", "scatter", "gather+scatter")
WORLDS = (2, 3, 4, 7, 16)


def order(program: Any, world: int, rank: int, gathered: int, scattered: int | None = None) -> list[Step]:
    pieces = {"gather_pieces": gathered, "scatter_pieces": gathered if scattered is None else scattered}
    return list(collective_schedule(program, world, rank, cuts_own=True, **pieces).steps)


def check(steps: Sequence[Step], world: int, rank: int, pieces: int) -> None:
    """No buffer in flight is touched, all that is read has arrived, and a sum's last part comes after the own one."""
    flying: dict[tuple[Any, int], set[Any]] = {}
    filled: set[Any] = set()
    done: set[tuple[Any, int, int]] = set()
    for step in steps:
        busy = set().union(*flying.values())
        if step.kind is Kind.ISSUE:
            assert not busy & {*step.writes, *step.reads}, f"in flight: {step}"
            assert set(step.reads) <= filled, f"sent before it was made: {step}"
            flying[step.task, step.piece] = {*step.reads, *step.writes}
            filled -= set(step.writes)
        elif step.kind is Kind.FINISH:
            filled |= flying.pop((step.task, step.piece))
        else:
            assert not busy & {*step.reads, *step.writes}, f"in flight: {step}"
            assert set(step.reads) <= filled, f"not arrived: {step}"
            assert (step.task, step.rank, step.piece) not in done, f"twice: {step}"
            done.add((step.task, step.rank, step.piece))
            filled |= set(step.writes)
            if step.task is Task.ADD:
                assert (Task.PRODUCE, rank, step.piece) in done, f"before the own part: {step}"
    assert not flying
    others = [peer for peer in range(world) if peer != rank]
    for task in {task for task, _, _ in done}:
        found = {(peer, piece) for one, peer, piece in done if one is task}
        own = [] if task is Task.ADD else [(rank, piece) for piece in range(pieces)]
        if (rank, -1) in found:
            own = [(rank, -1)]
        assert found == {*own, *((peer, piece) for peer in others for piece in range(pieces))}, task


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("pieces", (1, 2, 4, 6))
def test_buffers_in_flight_are_left_alone(program: str, world: int, pieces: int) -> None:
    issued = []
    for rank in range(world):
        steps = order(program, world, rank, pieces)
        check(steps, world, rank, pieces)
        issued.append([(step.task, step.piece) for step in steps if step.kind is Kind.ISSUE])
    assert all(one == issued[0] for one in issued)


@pytest.mark.parametrize("gathered", (1, 2, 6))
@pytest.mark.parametrize("scattered", (1, 2, 6))
def test_pieces_of_both_parts_may_differ(gathered: int, scattered: int) -> None:
    steps = order("gather+scatter", 3, 1, gathered, scattered)
    for task, pieces in ((Task.ALL_GATHER, gathered), (Task.ALL_TO_ALL, scattered)):
        for kind in (Kind.ISSUE, Kind.FINISH):
            assert [s.piece for s in steps if s.task is task and s.kind is kind] == list(range(pieces))


def moved(steps: list[Step], match: Callable[[Step], bool], by: int) -> list[Step]:
    index = next(index for index, step in enumerate(steps) if match(step))
    step = steps.pop(index)
    steps.insert(index + by, step)
    return steps


@pytest.mark.parametrize(
    ("program", "match", "by", "found"),
    (
        ("gather", lambda s: s.kind is Kind.ISSUE and s.piece == 2, -1, "in flight"),
        ("gather", lambda s: s.kind is Kind.FINISH, 1, "in flight"),
        ("scatter", lambda s: s.kind is Kind.FINISH and s.piece == 1, 2, "in flight"),
        ("scatter", lambda s: s.task is Task.PRODUCE and s.rank == 0 and s.piece == 0, 2, "before the own part"),
        ("scatter", lambda s: s.kind is Kind.ISSUE and s.piece == 1, -1, "sent before it was made"),
        ("gather+scatter", lambda s: s.task is Task.ALL_GATHER and s.kind is Kind.ISSUE and s.piece == 2, -1, "flight"),
    ),
)
def test_broken_orders_are_caught(program: str, match: Callable[[Step], bool], by: int, found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        check(moved(order(program, 2, 0, 4), match, by), 2, 0, 4)


def makespan(steps: Sequence[Step], rank: int, world: int, pieces: int, product: float, tapered: bool) -> float:
    """When the last step ends, if a shard crosses the link in 1 and each part's products take ``product`` together.

    The link moves one collective after another; the host multiplies and waits.  Sums cost nothing.
    """

    def share(step: Step) -> float:
        if step.piece < 0:
            return 1.0
        scattered = step.task in (Task.ALL_TO_ALL, Task.PRODUCE)
        equal = (3600 * step.piece // pieces, 3600 * (step.piece + 1) // pieces)
        start, stop = tapered_spans(3600, pieces, scattered=scattered)[step.piece] if tapered else equal
        return (stop - start) / 3600

    now = free = 0.0
    arrives = {}
    for step in steps:
        if step.kind is Kind.ISSUE:
            arrives[step.task, step.piece] = free = max(free, now) + share(step)
        elif step.kind is Kind.FINISH:
            now = max(now, arrives[step.task, step.piece])
        elif step.task is not Task.ADD:
            now += product / world * share(step)
    return now


# Bounds above the longer of link and products: the small piece's product, a sixteenth or an eighth of a half.
@pytest.mark.parametrize(("pieces", "slack"), ((6, 0.04), (4, 0.07)))
@pytest.mark.parametrize("program", ("gather", "scatter"))
def test_two_ranks_keep_the_link_busy(program: str, pieces: int, slack: float) -> None:
    for product in (0.2, 0.5, 0.8, 1.0, 1.1, 1.3, 2.0, 5.0):
        took = makespan(order(program, 2, 0, pieces), 0, 2, pieces, product, tapered=True)
        assert took <= (1 + slack) * max(product, 1.0), product
        usual = collective_schedule(program, 2, 0, gather_pieces=4, scatter_pieces=4).steps  # type: ignore[arg-type]
        assert took <= makespan(usual, 0, 2, 4, product, tapered=False) + 1e-9, product


@pytest.mark.parametrize("world", (2, 4, 8))
def test_a_gather_beside_a_scatter_keeps_the_link_busy(world: int) -> None:
    for product in (0.2, 0.5, 0.8, 1.0, 1.1, 1.3, 2.0, 5.0):
        took = makespan(order("gather+scatter", world, 0, 6), 0, world, 6, product, tapered=True) / 2
        assert took <= (1.08 if world == 2 else 1.14) * max(product, 1.0), product
    usual = collective_schedule("gather+scatter", world, 0, gather_pieces=4, scatter_pieces=4).steps
    took = makespan(order("gather+scatter", world, 0, 6), 0, world, 6, 1.0, tapered=True)
    assert took < makespan(usual, 0, world, 4, 1.0, tapered=False) - 0.15


@pytest.mark.parametrize("pieces", (1, 2, 4, 6))
@pytest.mark.parametrize("rows", (0, 1, 2, 5, 16, 17, 1000))
def test_tapered_spans_cover_all_rows(rows: int, pieces: int) -> None:
    gathered, scattered = (tapered_spans(rows, pieces, scattered=one) for one in (False, True))
    for spans in (gathered, scattered):
        assert spans[0][0] == 0 and spans[-1][1] == rows
        assert all(one[1] == two[0] for one, two in itertools.pairwise(spans))
        assert rows == 0 or all(stop > start for start, stop in spans)
    if rows == 1000 and pieces > 1:
        sizes = [stop - start for start, stop in gathered]
        assert sizes[-1] == min(sizes) and max(sizes) <= rows * (0.67 if pieces == 2 else 0.38)
        assert abs((scattered[0][1] - scattered[0][0]) - sizes[-1]) <= 1


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("pieces", (1, 2, 5))
def test_an_own_shard_that_is_cut_is_consumed_once_and_ahead(pieces: int, world: int) -> None:
    for rank in range(world):
        steps = collective_schedule("gather", world, rank, gather_pieces=pieces, cuts_own=True).steps
        consumed = [(step.rank, step.piece) for step in steps if step.task is Task.CONSUME]
        assert sorted(consumed) == sorted((peer, piece) for peer in range(world) for piece in range(pieces))
        for index, step in enumerate(steps):
            if step.kind is Kind.FINISH and step.task is Task.ALL_GATHER:
                own = [s.piece for s in steps[:index] if s.task is Task.CONSUME and s.rank == rank]
                assert own == list(range(min(step.piece + world, pieces)))


def gathering_time(
    steps: tuple[Step, ...], rank: int, pieces: int, product: float, wire: float, ahead: int = 0
) -> float:
    """When a gather's last product ends, if all products together take ``product`` and what arrives ``wire``.

    Two ranks.  The link moves one piece after another, from when it was issued; the host multiplies and waits.  The
    first ``ahead`` pieces have arrived before.
    """
    now, free, arrives = 0.0, 0.0, {}
    for step in steps:
        if step.kind is Kind.ISSUE:
            free = max(free, now) + (wire / pieces if step.piece >= ahead else 0.0)
            arrives[step.piece] = free
        elif step.kind is Kind.FINISH:
            now = max(now, arrives[step.piece])
        else:
            now += product / 2 / (pieces if step.piece >= 0 else 1)
    return now


@pytest.mark.parametrize("pieces", (2, 4, 8))
@pytest.mark.parametrize("product", (0.5, 1.0, 1.5, 3.0))
def test_a_cut_own_shard_keeps_the_link_busy(pieces: int, product: float) -> None:
    """The wire and the last product, or the products without a wait; a whole own shard first is slower."""
    steps = collective_schedule("gather", 2, 0, gather_pieces=pieces, cuts_own=True).steps
    took = gathering_time(steps, 0, pieces, product, wire=1.0)
    last = product / 2 / pieces
    assert took == pytest.approx(max(1.0 + last, product))
    whole = collective_schedule("gather", 2, 0, gather_pieces=pieces).steps
    slower = gathering_time(whole, 0, pieces, product, wire=1.0)
    assert slower >= took - 1e-9
    if pieces > 2 and product == 1.0:
        assert slower > took + 0.1


@pytest.mark.parametrize("pieces", (4, 8))
@pytest.mark.parametrize("product", (0.5, 1.0, 2.0))
def test_what_was_sent_ahead_is_consumed_first(pieces: int, product: float) -> None:
    """Its buffers are free after one product, and the link carries the next pieces while the own shard's are made."""
    steps = collective_schedule("gather", 2, 0, gather_pieces=pieces, cuts_own=True, ahead=2).steps
    last = product / 2 / pieces
    took = gathering_time(steps, 0, pieces, product, wire=1.0, ahead=2)
    assert took == pytest.approx(max(last + 1.0 - 2 / pieces + last, product))
    usual = collective_schedule("gather", 2, 0, gather_pieces=pieces, cuts_own=True).steps
    behind = gathering_time(usual, 0, pieces, product, wire=1.0, ahead=2)
    assert behind >= took - 1e-9
    if product == 0.5:  # the link is the narrow place
        assert behind == pytest.approx(took + 2 * last)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("pieces", (1, 2, 3, 6))
def test_products_are_the_same_whatever_was_sent_ahead(pieces: int, world: int) -> None:
    """Pieces of the own shard that follow one another are one product, whose bits depend on how many they are."""

    def products(ahead: int) -> list[tuple[int, ...]]:
        steps = collective_schedule("gather", world, 1, gather_pieces=pieces, cuts_own=True, ahead=ahead).steps
        consumed = [step for step in steps if step.kind is not Kind.ISSUE]
        groups = itertools.groupby(consumed, key=lambda step: step.kind is Kind.COMPUTE and step.rank == 1)
        return [tuple(step.piece for step in group) for own, group in groups if own]

    assert products(0) == products(1) == products(2)
    first = next(
        step
        for step in collective_schedule("gather", world, 1, gather_pieces=pieces, cuts_own=True, ahead=1).steps
        if step.kind is Kind.COMPUTE
    )
    assert first.rank != 1
