"""What a call that visits every rank once says: what is given at each visit, and what is made there.

Ulysses' projections, Ring attention's backward and losses with a distributed head are all of this form: for each rank
r, in ring order, blocks of rank r arrive, a product uses them, and what it makes for r travels back while the next rank
is visited.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Exchange", "Visit"]

Visit = Callable[[int, tuple[Tensor, ...], tuple[Tensor, ...]], None]
# What the reductions of both transports add.
_SUMMED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Visits every rank of the group, this one included.

    ``visit(rank, given, made)`` is called once for each rank.  ``given`` holds that rank's ``shared`` tensors and then
    the parts of its ``addressed`` tensors that are for this rank; ``made`` holds a block for each of ``sums`` and then
    of ``received``, which the callback fills, whatever it holds, with what this rank makes for ``rank``.  ``given``
    must not be written, kept, or read after the callback returns; nor must ``made``.  A visit is in ring order, the
    own rank first where nothing is made and last where something is.

    Attributes:
        visit: the callback.
        shared: this rank's tensors that all others get whole (collective ``all_gather``); any shape, contiguous.
        addressed: [world, ...], contiguous; part r is for rank r alone (collective ``all_to_all``).
        sums: receives the sum over all ranks of what they made for this one, added in the accumulator's type in the
            schedule's order (collective ``reduce_scatter``); contiguous.
        received: [world, batch, rows, width] with contiguous rows, possibly a strided view; part r becomes what rank r
            made for this one (collective ``all_to_all``).  Blocks for it in ``made`` are [batch, rows, width] with
            contiguous rows.
    """

    visit: Visit
    shared: tuple[Tensor, ...] = ()
    addressed: tuple[Tensor, ...] = ()
    sums: tuple[Tensor, ...] = ()
    received: tuple[Tensor, ...] = ()

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
        for kind in ("shared", "addressed", "sums", "received"):
            for index, tensor in enumerate(getattr(self, kind)):
                expected = _expected(kind, tensor, world)
                if expected:
                    raise ValueError(
                        f"{name}: {kind}[{index}]: expected {expected}, got shape {list(tensor.shape)} with strides "
                        f"{list(tensor.stride())} in {tensor.dtype}"
                    )


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
