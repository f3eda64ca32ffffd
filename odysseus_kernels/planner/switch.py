"""Bytes and seconds of collectives that an NVLink switch makes: sums by loads, copies by stores of a multicast address.

With N ranks and a chunk of b bytes for each, what crosses one rank's link:

=================  ==============  =============  ==========================================================
collective         rank sends      rank receives  instead of, rank by rank
=================  ==============  =============  ==========================================================
reduce-scatter     N · b           b              (N − 1) · b both ways
all-gather         b               N · b          (N − 1) · b both ways
all-reduce: both   (N + 1) · b     (N + 1) · b    2 (N − 1) · b both ways
=================  ==============  =============  ==========================================================

The switch loads a part from *every* rank's memory for every owner, the owner's own part included (PTX ISA 9.1,
9.7.9.14: a load of a multicast address reduces what is loaded from all memory locations behind it), and a store reaches
all ranks' memory, the storing rank's included.  That these own copies cross the link like the others follows from where
the switch is; no device has shown it yet.

So neither collective alone takes less of the link's busier direction than one that goes from rank to rank: at N = 8 it
is 8/7.  What it saves is at the ends: a sum reads b bytes where it read N · b, from slots into which N · b had been
written, by copies from stages that had been written and read as well.  Memory traffic of a product's results falls to
a write and a read, and few multiprocessors suffice for a sum (``switch_multiprocessors`` in ``planner/sums.py``).
An all-reduce fills both directions: at N = 8 it takes 9/14 of the link's time.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["SwitchTraffic", "switch_link_bytes", "switch_traffic"]


class SwitchTraffic(NamedTuple):
    """Bytes over one rank's link.

    Attributes:
        sent: by the rank, to the switch.
        received: by the rank, from the switch.
    """

    sent: int
    received: int


def switch_traffic(collective: Literal["all_gather", "reduce_scatter"], nbytes: int, world: int) -> SwitchTraffic:
    """What one rank sends and receives.

    Args:
        collective: which one; an all-reduce is one of each.
        nbytes: of one rank's chunk.
        world: ranks; nothing moves where there is one.

    Raises:
        ValueError: another collective.
    """
    if collective not in ("all_gather", "reduce_scatter"):
        raise ValueError(f'collective: expected "all_gather" or "reduce_scatter", got {collective!r}')
    if world == 1:
        return SwitchTraffic(0, 0)
    once, from_all = nbytes, world * nbytes
    return SwitchTraffic(from_all, once) if collective == "reduce_scatter" else SwitchTraffic(once, from_all)


def switch_link_bytes(gathered: float, scattered: float, world: int) -> float:
    """Bytes of the busier direction of a rank's link, for chunks that are gathered and scattered in one phase."""
    if world == 1:
        return 0.0
    return max(world * scattered + gathered, world * gathered + scattered)
