"""What runs by default has every pair of values; what is left out runs with --complete."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from covering import covering, every_pair

Beyond = type(pytest.param())  # a row with a mark
AXES = {
    "families": (range(8), range(5), range(5)),
    "two values each": (range(2),) * 6,
    "uneven": (range(10), range(5), range(3), range(2)),
    "two axes": (range(3), range(4)),
    "one value": (range(1), range(4), range(3)),
}


def _met(rows: list[tuple[int, ...]]) -> set[tuple[tuple[int, int], ...]]:
    return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_every_pair_is_there(axes: tuple[range, ...]) -> None:
    product, rows = list(itertools.product(*axes)), covering(axes)
    assert set(rows) <= set(product) and len(set(rows)) == len(rows)
    assert _met(rows) == _met(product)
    fewest = max(len(one) * len(other) for one, other in itertools.combinations(axes, 2))
    assert fewest <= len(rows) <= 1.3 * fewest + 3


def test_rows_that_do_not_exist_are_not_taken() -> None:
    def allowed(*row: int) -> bool:
        return row[0] != 2 or row[1] == 0

    axes = (range(4), range(3), range(3))
    rows = covering(axes, allowed)
    assert all(allowed(*row) for row in rows)
    assert _met(rows) == _met([row for row in itertools.product(*axes) if allowed(*row)])


def test_rows_beyond_are_marked_and_none_is_lost() -> None:
    always = (4, 3, 2)
    mark = every_pair(one=range(5), other=range(4), third=range(3), always=[always]).mark
    names, rows = mark.args
    assert names == ("one", "other", "third")
    beyond = [tuple(row.values) for row in rows if isinstance(row, Beyond)]
    default = [row for row in rows if not isinstance(row, Beyond)]
    assert always in default and len(beyond) > len(default)
    assert {*default, *beyond} == {*itertools.product(range(5), range(4), range(3))}
    assert _met(default) == _met([*default, *beyond])


@pytest.mark.parametrize("complete", (False, True))
def test_rows_beyond_run_with_complete_only(request: pytest.FixtureRequest, complete: bool) -> None:
    (ours,) = (
        plugin
        for plugin in request.config.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", None) == str(Path(__file__).parents[1] / "conftest.py")
    )
    left_out: list[object] = []
    config = SimpleNamespace(
        getoption={"complete": complete}.__getitem__,
        hook=SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items)),
    )
    usual, beyond = (SimpleNamespace(get_closest_marker={name: True}.get) for name in ("usual", "complete"))
    items = [usual, beyond]
    ours.pytest_collection_modifyitems(config, items)
    assert (items, left_out) == (([usual, beyond], []) if complete else ([usual], [beyond]))
