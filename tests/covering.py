"""Cases of a test with several independent axes: every pair of values by default, all combinations with --complete."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

Row = tuple[Any, ...]


def _pairs(row: Sequence[int]) -> set[tuple[tuple[int, int], ...]]:
    """Of each two axes, which values meet in ``row``."""
    return set(itertools.combinations(enumerate(row), 2))


def cover(rows: Sequence[Sequence[int]], chosen: Iterable[Sequence[int]] = ()) -> list[Sequence[int]]:
    """Those of ``rows`` in which, with the ``chosen`` ones, every two values of two axes meet that meet in any row.

    Greedy: always the row with most pairs that no row before it has, the first one of several.  That is within a few
    rows of the fewest, which are the product of the two longest axes.
    """
    found = list(chosen)
    left = set().union(*map(_pairs, rows)).difference(*map(_pairs, found))
    while left:
        best = max(rows, key=lambda row: len(_pairs(row) & left))
        left -= _pairs(best)
        found.append(best)
    return found


def covering(axes: Sequence[Sequence[Any]], allowed: Callable[..., bool] = lambda *_: True) -> list[Row]:
    """Rows of the axes' product in which every two values of two axes meet that meet in any row that is ``allowed``."""
    product = [
        row
        for row in itertools.product(*(range(len(axis)) for axis in axes))
        if allowed(*(axis[index] for axis, index in zip(axes, row, strict=True)))
    ]
    return [tuple(axis[index] for axis, index in zip(axes, row, strict=True)) for row in sorted(cover(product))]


def every_pair(
    *, allowed: Callable[..., bool] = lambda *_: True, always: Iterable[Row] = (), **axes: Iterable[Any]
) -> pytest.MarkDecorator:
    """``pytest.mark.parametrize`` over the product of ``axes``, whose rows beyond a covering run with --complete only.

    Args:
        allowed: which rows exist at all.
        always: rows that run by default whatever pairs they bring: they once caught a fault.
        **axes: of each argument of the test, its values.
    """
    values = [list(axis) for axis in axes.values()]
    chosen = [*covering(values, allowed), *always]
    rows = [
        row if row in chosen else pytest.param(*row, marks=pytest.mark.complete)
        for row in itertools.product(*values)
        if allowed(*row)
    ]
    return pytest.mark.parametrize(tuple(axes), rows)
