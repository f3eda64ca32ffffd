"""How well a product fills a device: tiles, and the waves in which its multiprocessors take them.

A library's product cuts its output into tiles, of which each multiprocessor computes one at a time.  A wave is one tile
for every multiprocessor; the last wave of a product is rarely full, and what it leaves idle is lost.  A product of few
rows has few waves, so cutting a chunk into pieces can cost more than overlap gains.
"""

from __future__ import annotations

__all__ = ["LIBRARY_TILE", "fill", "tiles", "wave_pieces", "waves"]

LIBRARY_TILE = (128, 256)
"""Rows and columns of the output tile that is assumed of a library's large 16-bit product on Hopper: an estimate, as
libraries choose among several; for smaller products they have smaller tiles, too."""

_WORTH = 0.05
"""Share of the fill by which another number of pieces has to be better: a launch costs about as much."""


def tiles(rows: int, columns: int, tile: tuple[int, int] = LIBRARY_TILE) -> int:
    """Output tiles of a product [rows, columns]."""
    return -(-rows // tile[0]) * -(-columns // tile[1])


def waves(rows: int, columns: int, multiprocessors: int, tile: tuple[int, int] = LIBRARY_TILE) -> int:
    """Waves of a product [rows, columns]."""
    return -(-tiles(rows, columns, tile) // multiprocessors)


def fill(rows: int, columns: int, multiprocessors: int, tile: tuple[int, int] = LIBRARY_TILE) -> float:
    """Share of the multiprocessors' tiles that a product [rows, columns] uses, over all of its waves.

    Parts of tiles beyond the product's edge count as used up, not as useful: a product of 129 rows fills as little as
    129 / 256 of its tiles.

    Example::

        fill(2048, 1280, multiprocessors=132)  # 80 tiles on 132 multiprocessors: 0.61

    Raises:
        ValueError: a size that is not positive.
    """
    for name, value in (("rows", rows), ("columns", columns), ("multiprocessors", multiprocessors)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    offered = waves(rows, columns, multiprocessors, tile) * multiprocessors * tile[0] * tile[1]
    return rows * columns / offered


def wave_pieces(
    rows: int,
    columns: int,
    multiprocessors: int,
    *,
    least: int,
    most: int,
    tile: tuple[int, int] = LIBRARY_TILE,
) -> int:
    """The number of pieces, from ``least`` to ``most``, whose products of ``rows / pieces`` rows fill waves best.

    ``least``, unless another number is better by more than a launch is worth; the fewer of equals.

    Raises:
        ValueError: sizes that are not positive, or ``most`` below ``least``.
    """
    if not 1 <= least <= most:
        raise ValueError(f"pieces: expected 1 <= least <= most, got {least} and {most}")
    filled = {pieces: fill(-(-rows // pieces), columns, multiprocessors, tile) for pieces in range(least, most + 1)}
    best = max(filled, key=lambda pieces: (filled[pieces], -pieces))
    return best if filled[best] > filled[least] * (1 + _WORTH) else least
