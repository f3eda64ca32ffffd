"""Keys and values of ring ranks in parts: how an exchange names those that somebody sees, and what a visit finds.

A part's tensors are slices [B, H, n, D] of the whole ones.  In an exchange they stand part after part: k and v of the
first, then those of the next.  Where all tokens are one part they are the whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from odysseus_kernels.comm.exchange import Exchange, Visit
from odysseus_kernels.planner.ring import Part

__all__ = ["all_seen", "cut_of", "exchange_of", "seen_of"]


def all_seen(parts: Sequence[Part]) -> bool:
    """Whether every rank sees something of what all have."""
    return len(parts) == 1 and all(map(all, parts[0].pairs))


def cut_of(parts: Sequence[Part], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``tensors`` [B, H, S, D] cut into ``parts``."""
    if len(parts) == 1:
        return tuple(tensors)
    return tuple(tensor[:, :, part.rows] for part in parts for tensor in tensors)


def exchange_of(
    parts: Sequence[Part], visit: Visit, shared: Sequence[Tensor] = (), sums: Sequence[Tensor] = ()
) -> Exchange:
    """Of ``shared`` and ``sums`` [B, H, S, D], one for one, or of one kind only; parts go where they are seen."""
    given, made = cut_of(parts, shared), cut_of(parts, sums)
    if len(parts) == 1:
        return Exchange(visit, given, sums=made, pairs=None if all_seen(parts) else parts[0].pairs)
    tables = tuple(part.pairs for part in parts for _ in range(len(given or made) // len(parts)))
    return Exchange(visit, given, sums=made, parts=tables)


def seen_of(
    parts: Sequence[Part], rank: int, other: int, *groups: Sequence[Tensor]
) -> Iterator[tuple[Part, tuple[Tensor, ...]]]:
    """The parts of ``other``'s tokens that ``rank`` sees, each with its tensors of all ``groups``.

    A group is what a visit is given, or makes.
    """
    for index, part in enumerate(parts):
        if part.pairs[rank][other]:
            found: list[Tensor] = []
            for group in groups:
                count = len(group) // len(parts)
                found += group[index * count : (index + 1) * count]
            yield part, tuple(found)
