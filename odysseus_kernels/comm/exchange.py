"""What a call that visits every rank once says: what is given at each visit, and what is made there.

Ulysses' projections, Ring attention's backward and losses with a distributed head are all of this form: for each rank
r, in ring order, blocks of rank r arrive, a product uses them, and what it makes for r travels back while the next rank
is visited.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from odysseus_kernels.planner.ring import Pairs

__all__ = ["Exchange", "Visit", "spread"]

Visit = Callable[[int, tuple[Tensor, ...], tuple[Tensor, ...]], None]
# What the reductions of both transports add.
_SUMMED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Visits every rank of the group, this one included, or those that ``pairs`` or ``parts`` name.

    ``visit(rank, given, made)`` is called once for each rank that is visited.  ``given`` holds that rank's ``shared``
    tensors and then the parts of its ``addressed`` tensors that are for this rank; ``made`` holds a block for each of
    ``sums`` and then of ``received``, which the callback fills, whatever it holds, with what this rank makes for
    ``rank``.  ``given`` must not be written, kept, or read after the callback returns; nor must ``made``.  A visit is
    in ring order, the own rank first where nothing is made and last where something is.

    Attributes:
        visit: the callback.
        shared: this rank's tensors that all others get whole (collective ``all_gather``); any shape, contiguous.
        addressed: [world, ...], contiguous; part r is for rank r alone (collective ``all_to_all``).
        sums: receives the sum over all ranks of what they made for this one, added in the accumulator's type in the
            schedule's order (collective ``reduce_scatter``); contiguous.
        received: [world, batch, rows, width] with contiguous rows, possibly a strided view; part r becomes what rank r
            made for this one (collective ``all_to_all``).  Blocks for it in ``made`` are [batch, rows, width] with
            contiguous rows.
        pairs: ``pairs[r][s]``: whether rank r visits rank s; equal on all ranks, and every rank visits itself.  Where
            it does not, nothing travels either way and nothing is added.  None: every rank visits all.  Only with
            ``shared`` and ``sums``.
        parts: the same for each of ``shared``, and of ``sums``, by itself; instead of ``pairs``.  A rank visits those
            of which it takes anything.  In place of what it does not take ``given``, and ``made``, hold an empty
            tensor.  Tensors may then be slices: those of ``shared`` any, those of ``sums`` along the last dimension
            but one of contiguous tensors.
    """

    visit: Visit
    shared: tuple[Tensor, ...] = ()
    addressed: tuple[Tensor, ...] = ()
    sums: tuple[Tensor, ...] = ()
    received: tuple[Tensor, ...] = ()
    pairs: Pairs | None = None
    parts: tuple[Pairs, ...] = ()

    @property
    def everyone(self) -> bool:
        """Whether every rank visits all, for all that is shared and made."""
        return self.pairs is None and not self.parts

    def takes(self, rank: int, other: int, index: int) -> bool:
        """Whether ``rank`` gets ``other``'s ``shared[index]``, and makes something for its ``sums[index]``."""
        table = self.parts[index] if self.parts else self.pairs
        return table is None or table[rank][other]

    def taken(self, rank: int, other: int, kind: Literal["shared", "sums"]) -> tuple[bool, ...]:
        """The same of each of ``other``'s tensors of a kind."""
        return tuple(self.takes(rank, other, index) for index in range(len(getattr(self, kind))))

    def visits(self, rank: int, other: int) -> bool:
        """Whether ``rank`` visits ``other``."""
        return any(self.takes(rank, other, index) for index in range(len(self.parts) or 1))

    def served(self, rank: int, world: int, index: int) -> int:
        """How many others of ``world`` get ``rank``'s ``shared[index]``."""
        return sum(self.takes(other, rank, index) for other in range(world)) - 1

    def visited(self, rank: int, world: int, index: int) -> int:
        """For how many others of ``world`` ``rank`` makes something that is added to their ``sums[index]``."""
        return sum(self.takes(rank, other, index) for other in range(world)) - 1

    @property
    def described_pairs(self) -> str:
        """Equal where ``pairs``, and ``parts``, are; empty without them."""
        if self.everyone:
            return ""
        bits = bytes(taken for table in self.parts or (self.pairs,) for row in table or () for taken in row)
        return f"{sum(bits)} of {len(bits)} visits {hashlib.blake2b(bits, digest_size=6).hexdigest()}"

    @property
    def gives(self) -> bool:
        """Whether anything travels to the rank that visits."""
        return bool(self.shared or self.addressed)

    @property
    def makes(self) -> bool:
        """Whether anything travels back."""
        return bool(self.sums or self.received)

    def own_given(self, rank: int) -> tuple[Tensor, ...]:
        """What ``visit`` is given for this rank itself, in place."""
        return (*self.shared, *(tensor[rank] for tensor in self.addressed))

    def own_made(self, rank: int) -> tuple[Tensor, ...]:
        """Where ``visit`` puts what it makes for this rank itself: the sums hold that part first."""
        return (*self.sums, *(tensor[rank] for tensor in self.received))

    def check(self, name: str, world: int) -> None:
        """For ``world`` ranks.

        Raises:
            ValueError: nothing is given or made, or a tensor is not as the attributes say; ``name`` is the call's.
        """
        if not (self.gives or self.makes):
            raise ValueError(f"{name}: expected an exchange that gives or makes something, got one without tensors")
        self._check_pairs(name, world)
        for kind in ("shared", "addressed", "sums", "received"):
            for index, tensor in enumerate(getattr(self, kind)):
                expected = _expected(kind, tensor, world, sliced=bool(self.parts))
                if expected:
                    raise ValueError(
                        f"{name}: {kind}[{index}]: expected {expected}, got shape {list(tensor.shape)} with strides "
                        f"{list(tensor.stride())} in {tensor.dtype}"
                    )

    def _check_pairs(self, name: str, world: int) -> None:
        if self.everyone:
            return
        what = "parts" if self.parts else "pairs"
        if self.addressed or self.received:
            raise ValueError(
                f"{name}: {what}: expected only shared tensors and sums beside them, got parts for each rank"
            )
        if self.parts and self.pairs is not None:
            raise ValueError(f"{name}: parts: expected no pairs beside them, got both")
        counts = [len(tensors) for tensors in (self.shared, self.sums) if tensors]
        if self.parts and counts != [len(self.parts)] * len(counts):
            raise ValueError(f"{name}: parts: expected one for each of {counts} tensors, got {len(self.parts)}")
        for table in self.parts or (self.pairs,):
            if table is None or [len(row) for row in table] != [world] * world or not _all_with_themselves(table):
                raise ValueError(f"{name}: {what}: expected {world} x {world}, every rank with itself, got {table}")


def spread(tensors: Sequence[Tensor], taken: Sequence[bool], like: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` at the places that are ``taken``, one after another; at others empty ones, of ``like``'s kind."""
    rest = iter(tensors)
    return tuple(next(rest) if one else like.new_empty(0) for one in taken)


def _all_with_themselves(table: Pairs) -> bool:
    return all(row[rank] for rank, row in enumerate(table))


def _expected(kind: str, tensor: Tensor, world: int, *, sliced: bool) -> str:
    """What a tensor should be; empty if it is.  ``sliced``: whether it may be a slice."""
    if kind in ("addressed", "received") and (tensor.ndim == 0 or tensor.shape[0] != world):
        return f"a part for each of {world} ranks"
    if kind == "sums" and tensor.dtype not in _SUMMED:
        return "a floating dtype to add up"
    if kind != "received":
        if tensor.is_contiguous() or (sliced and (kind == "shared" or _is_slice(tensor))):
            return ""
        return "a slice of a contiguous tensor's rows" if sliced else "a contiguous tensor"
    if tensor.ndim != 4 or (tensor.shape[3] > 1 and tensor.stride(3) != 1):
        return "[world, batch, rows, width] with contiguous rows"
    return ""


def _is_slice(tensor: Tensor) -> bool:
    """Whether it is a slice along the last dimension but one: contiguous rows [.., rows, width], evenly apart."""
    if tensor.ndim < 2 or not tensor[(0,) * (tensor.ndim - 2)].is_contiguous():
        return False
    sizes, strides = tensor.shape[:-2], tensor.stride()[:-2]
    lead = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size > 1]
    return all(outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(lead))
