"""What a call that visits every rank once says: what is given at each visit, and what is made there.

Ulysses' projections, Ring attention's backward and losses with a distributed head are all of this form: for each rank
r, in ring order, blocks of rank r arrive, a product uses them, and what it makes for r travels back while the next rank
is visited.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from odysseus_kernels.planner.ring import Pairs, RingPeers, ring_peers

__all__ = ["Exchange", "Visit"]

Visit = Callable[[int, tuple[Tensor, ...], tuple[Tensor, ...]], None]
# What the reductions of both transports add.
_SUMMED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Visits every rank of the group, this one included, or those that ``pairs`` names.

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
    """

    visit: Visit
    shared: tuple[Tensor, ...] = ()
    addressed: tuple[Tensor, ...] = ()
    sums: tuple[Tensor, ...] = ()
    received: tuple[Tensor, ...] = ()
    pairs: Pairs | None = None

    def visits(self, rank: int, other: int) -> bool:
        """Whether ``rank`` visits ``other``."""
        return self.pairs is None or self.pairs[rank][other]

    def peers(self, rank: int, world: int) -> RingPeers:
        """How many others of ``world`` visit ``rank``, and how many it visits."""
        return RingPeers(world - 1, world - 1) if self.pairs is None else ring_peers(self.pairs, rank)

    @property
    def described_pairs(self) -> str:
        """Equal where ``pairs`` are; empty without them."""
        if self.pairs is None:
            return ""
        bits = bytes(seen for row in self.pairs for seen in row)
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
                expected = _expected(kind, tensor, world)
                if expected:
                    raise ValueError(
                        f"{name}: {kind}[{index}]: expected {expected}, got shape {list(tensor.shape)} with strides "
                        f"{list(tensor.stride())} in {tensor.dtype}"
                    )

    def _check_pairs(self, name: str, world: int) -> None:
        if self.pairs is None:
            return
        if self.addressed or self.received:
            raise ValueError(
                f"{name}: pairs: expected only shared tensors and sums beside them, got parts for each rank"
            )
        if [len(row) for row in self.pairs] != [world] * world or not all(self.pairs[r][r] for r in range(world)):
            raise ValueError(f"{name}: pairs: expected {world} x {world}, every rank with itself, got {self.pairs}")


def _expected(kind: str, tensor: Tensor, world: int) -> str:
    """What a tensor should be; empty if it is."""
    if kind in ("addressed", "received") and (tensor.ndim == 0 or tensor.shape[0] != world):
        return f"a part for each of {world} ranks"
    if kind == "sums" and tensor.dtype not in _SUMMED:
        return "a floating dtype to add up"
    if kind != "received":
        return "" if tensor.is_contiguous() else "a contiguous tensor"
    if tensor.ndim != 4 or (tensor.shape[3] > 1 and tensor.stride(3) != 1):
        return "[world, batch, rows, width] with contiguous rows"
    return ""
