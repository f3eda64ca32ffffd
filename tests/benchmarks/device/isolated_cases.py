"""Rows of ``test_isolated.py``, which import nothing that takes time."""

from __future__ import annotations

import os
import time


def double(number: int) -> int:
    return 2 * number


def fail() -> None:
    raise RuntimeError("out of memory")


def hang() -> None:
    time.sleep(60)


def die() -> None:
    os._exit(7)


def interrupt() -> None:
    raise KeyboardInterrupt
