"""Tiles of few tokens, so that small blocks of a ring have several parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from odysseus_kernels.attention import layout
from odysseus_kernels.planner import ring


@contextlib.contextmanager
def tiles_of(rows: int) -> Iterator[None]:
    """What is seen is decided for so many tokens at a time."""
    ring.parts_in_sight.cache_clear()
    with mock.patch.object(ring, "TILE", rows), mock.patch.object(layout, "TILE", rows):
        yield
    ring.parts_in_sight.cache_clear()
