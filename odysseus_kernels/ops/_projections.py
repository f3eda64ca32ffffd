"""What Ulysses' projections are given: which rank has which rows of their weights, and which of their outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.ops._heads import HeadCut, check_head_counts
from odysseus_kernels.ops._validate import group_by_name

__all__ = ["Projections", "check_projections"]


def check_projections(
    operator: str, weights: Sequence[Tensor], heads: int | Sequence[int] | None, world: int, owners: int
) -> list[int]:
    """Ranks that share a head, for each projection.

    Raises:
        ValueError: ``owners`` ranks with shards of the weights, ``heads`` and ``world`` ranks do not fit.
    """
    if owners % world:
        raise ValueError(
            f"{operator}: expected zero3_group to have a multiple of the group's {world} ranks, got {owners} ranks"
        )
    if heads is None:
        return [1] * len(weights)
    if not isinstance(heads, int | list | tuple):
        raise TypeError(f"{operator}: expected heads to be whole numbers or None, got {heads!r}")
    counts = [heads] if isinstance(heads, int) else list(heads)
    if len(counts) != len(weights):
        raise ValueError(f"{operator}: expected heads for each of {len(weights)} weights, got {tuple(counts)}")
    sharers = check_head_counts(operator, counts, world)
    for count, weight in zip(counts, weights, strict=True):
        if weight.shape[0] * owners % count:
            raise ValueError(
                f"{operator}: expected the {weight.shape[0] * owners} rows of a weight ({owners} shards of "
                f"{weight.shape[0]}) to divide by its {count} heads"
            )
    return sharers


class Projections:
    """Groups and sizes of one call.

    Attributes:
        group, owners: the ranks that exchange, and those that the weights are cut over.
        together: whether these are the same, so that one exchange does all.
        cuts: of each projection.
        split: projections whose shards belong to one rank's heads.
        whole: the others, whose weights are gathered whole: fewer heads than ranks.
    """

    def __init__(
        self,
        operator: str,
        x: Tensor,
        weights: Sequence[Tensor],
        sharers: Sequence[int],
        group_name: str,
        owners_name: str,
    ) -> None:
        self._operator = operator
        self.group, self.owners = group_by_name(group_name), group_by_name(owners_name)
        self.together = group_name == owners_name
        self.world, self.shards = self.group.size(), self.owners.size()
        self.rows, self.features = x.shape[-2:]
        self.lines = x.shape[:-1].numel()
        self.batch = x.shape[:-2].numel()
        self.cuts = [
            HeadCut(weight.shape[0] * self.shards, self.world, count)
            for weight, count in zip(weights, sharers, strict=True)
        ]
        self.split = [index for index, count in enumerate(sharers) if count == 1]
        self.whole = [index for index, count in enumerate(sharers) if count > 1]
        self.shapes = f"x {list(x.shape)}, sharers {list(sharers)}"

    def phase(self, phase: str, dtype: torch.dtype, weights: Sequence[Tensor], *, gathers: bool, sums: bool) -> Phase:
        nbytes = sum(weight.nbytes for weight in weights)
        flops = 2 * self.lines * self.shards * sum(weight.numel() for weight in weights)
        return Phase(
            operator=self._operator,
            phase=phase,
            shapes=f"{self.shapes}, weights {[list(weight.shape) for weight in weights]}, {gathers}, {sums}",
            own="",
            dtype=dtype,
            flops=flops * max(1, gathers + sums),
            gathered_bytes=nbytes if gathers else 0,
            scattered_bytes=nbytes if sums else 0,
        )
