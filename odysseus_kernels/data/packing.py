"""Which documents share a row: best-fit-decreasing bin packing."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

__all__ = ["best_fit"]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items into rows, the longest first, each into the fullest row that has room for it.

    Rows are kept sorted by their room, so that each item takes one binary search.  (The package ``binpacking`` fills
    the emptiest row that has room, for which it looks at all of them.)

    Args:
        lengths: of each item, from 1 to ``capacity``.
        capacity: of each row.

    Returns:
        For each row the items in it, rising.  Any two rows hold more than ``capacity`` together.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, row), sorted
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        place = bisect.bisect_left(room, (lengths[item], 0))
        if place == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(item)
        bisect.insort(room, (left - lengths[item], row))
    return [sorted(row) for row in rows]
