"""Rows of documents: nothing is lost, no row is too long, and little room is left."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odysseus_kernels.data.packing import best_fit

pytestmark = pytest.mark.without_ranks


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 40))
    return draw(st.lists(st.integers(1, capacity), max_size=60)), capacity


@given(problems())
def test_every_item_once_and_no_row_over_its_capacity(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    rows = best_fit(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in rows)
    filled = [sum(lengths[item] for item in row) for row in rows]
    assert all(0 < total <= capacity for total in filled)
    # A row was begun only where no other had room: so at most twice the rows that any packing needs.
    assert all(a + b > capacity for a, b in itertools.combinations(filled, 2))


def _first_fit(lengths: list[int], capacity: int) -> int:
    """Rows that are used by putting each item, in order, into the first row with room."""
    left: list[int] = []
    for length in lengths:
        for row, room in enumerate(left):
            if length <= room:
                left[row] -= length
                break
        else:
            left.append(capacity - length)
    return len(left)


@pytest.mark.parametrize("longest", [16, 64, 128])
def test_no_more_rows_than_first_fit(longest: int) -> None:
    """Of random lengths; there are chosen ones for which the order of arrival happens to be better."""
    generator = random.Random(longest)
    for _ in range(200):
        lengths = [generator.randint(1, longest) for _ in range(200)]
        rows = best_fit(lengths, 128)
        assert len(rows) <= _first_fit(lengths, 128)
        assert len(rows) >= -(-sum(lengths) // 128)


def test_equal_items_go_in_order() -> None:
    assert best_fit([2, 2, 2, 2, 1], 4) == [[0, 1], [2, 3], [4]]
    assert best_fit([1, 5, 3, 4, 2], 5) == [[1], [0, 3], [2, 4]]
    assert best_fit([], 5) == []
