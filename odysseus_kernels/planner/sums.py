"""How many of a device's multiprocessors add up received parts while products run on the others.

A sum that holds few multiprocessors leaves products alone: on an H200, of 132 multiprocessors, a library's product was
reported to fall to 65 % with 32 of them held, and to lose nothing with 4.  But a sum must not fall behind the link
either, or the link waits for receive slots.

The rate of one multiprocessor follows from Little's law.  A block of 1,024 threads, which fills it, has from 3 to 8
loads of 16 bytes a thread in flight (as many as there are sources; twice two with two), 48 to 128 KiB.  Memory that few
read from answers in 0.6 to 0.7 µs, so these would bring 70 GB/s and more; the path to the L2 cache, 64 bytes a clock,
ends that at 110 GB/s (1.75 GHz).  60 to 100 GB/s are expected and 80 assumed: estimates, which no device has shown yet.

So 4 multiprocessors read 320 GB/s.  Of N ranks' parts N - 1 come over the link, so a link that brings R bytes/s needs
R * N / (N - 1) read: with 8 ranks PCIe 5.0 (64 GB/s) needs 73 GB/s, where 4 are plenty, and NVLink 4 (450 GB/s) needs
514 GB/s, where with 4 a call that waits for its link anyway would take 1.6 times as long; there 7 are held.  Either way
a sum needs as much time of multiprocessors: it holds more of them for less long.

A sum that an NVLink switch makes (``planner/switch.py``) reads and writes only what it returns.  Every rank's link then
brings each of N owners R / N bytes/s of sums, and a rank stores its chunk to all at R / N: 56 GB/s with 8 ranks on
NVLink 4.  A thread has 4 accesses of 16 bytes in flight, a multiprocessor 64 KiB; over the switch they take 1 to 2 µs
(an estimate), so one brings 32 to 64 GB/s and the 4 that are held anyway suffice.
"""

from __future__ import annotations

import math

__all__ = [
    "SUM_BYTES_PER_S",
    "SUM_MULTIPROCESSORS",
    "SWITCH_BYTES_PER_S",
    "sum_multiprocessors",
    "switch_multiprocessors",
]

SUM_MULTIPROCESSORS = 4
"""Held by a sum beside products, unless the link is faster than these add."""

SUM_BYTES_PER_S = 80e9
"""That one multiprocessor of a sum reads: an estimate, see the module."""

SWITCH_BYTES_PER_S = 32e9
"""Of sums, or of what is stored to all ranks, that one multiprocessor moves through a switch: likewise an estimate."""

_MOST = 16  # half of what is known to slow products down


def sum_multiprocessors(world: int, link_bytes_per_s: float) -> int:
    """The most multiprocessors that a sum of ``world`` ranks' parts holds beside products.

    Args:
        world: ranks, at least 2.
        link_bytes_per_s: that the link brings in one direction; 0 where it is not known.

    Example::

        sum_multiprocessors(8, 64e9)  # PCIe 5.0: 4
        sum_multiprocessors(8, 450e9)  # NVLink 4: 7

    Raises:
        ValueError: fewer than two ranks, or a rate that is negative or no number.
    """
    _check(world, link_bytes_per_s)
    needed = math.ceil(link_bytes_per_s * world / (world - 1) / SUM_BYTES_PER_S)
    return min(max(SUM_MULTIPROCESSORS, needed), _MOST)


def switch_multiprocessors(world: int, link_bytes_per_s: float) -> int:
    """The most multiprocessors that a sum or a store through the switch holds beside products.

    Args:
        world, link_bytes_per_s: as for :func:`sum_multiprocessors`.

    Example::

        switch_multiprocessors(8, 450e9)  # NVLink 4: 4
        switch_multiprocessors(2, 900e9)  # NVLink 5, two ranks: 15

    Raises:
        ValueError: as :func:`sum_multiprocessors`.
    """
    _check(world, link_bytes_per_s)
    needed = math.ceil(link_bytes_per_s / world / SWITCH_BYTES_PER_S)
    return min(max(SUM_MULTIPROCESSORS, needed), _MOST)


def _check(world: int, link_bytes_per_s: float) -> None:
    if world < 2:
        raise ValueError(f"world: expected at least 2, got {world}")
    if not 0 <= link_bytes_per_s < math.inf:
        raise ValueError(f"link_bytes_per_s: expected a finite rate of at least 0, got {link_bytes_per_s}")
