"""What tables of shapes have in common."""

from __future__ import annotations

from typing import Literal

__all__ = ["CONTRACT", "NEVER_SLOWER", "Size", "nearest_multiple"]

Size = Literal["quick", "default", "full"]

CONTRACT = "contract"  # label of the shapes that limits are for

NEVER_SLOWER = 1.03
"""Limit of fused / unfused on the same transport, for every row."""


def nearest_multiple(value: int, of: int) -> int:
    """The multiple of ``of`` nearest to ``value``, at least one."""
    return max(1, round(value / of)) * of
