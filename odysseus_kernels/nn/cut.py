"""How a batch was cut: a small tensor that travels with it, and what a model makes of it.

``shard_sequence`` puts it into the batch as ``sequence_cut``, int64 [B, 9], a row for each sequence.  It is moved,
copied, pickled, split and joined like every other tensor of the batch, and any of its rows describe the same rows of
the batch.  Its columns:

====  =================================================================================================================
0     1: cut by ``shard_sequence``; 2: declared by ``declare_cut``
1     R, the ring ranks that the sequence was cut over; under ``"tsp"`` all ranks of ring and seq
2     N, the ranks of seq; under ``"tsp"`` 1
3     1 where ranks of seq hold slices of their ring rank's part, 0 where each holds all of it (``"tp"``)
4     which part this is: ring rank * slices + slice
5     L, tokens of the sequence before padding
6     tokens with padding
7     pieces that a ring rank's part is striped in (``attention/layout.py``); 1: slices are contiguous
8     checksum of the sequence's row of the whole batch, before it was cut; 0 where it is not known
====  =================================================================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from odysseus_kernels.attention import layout
from odysseus_kernels.nn.group import SequenceGroup

__all__ = ["KEY", "RING_LAYOUT", "SequenceCut", "checksums", "digest", "natural_order", "part_positions"]

KEY = "sequence_cut"
# Balanced causal work: every ring rank has an early and a late block.
RING_LAYOUT: layout.Layout = "zigzag"
_BY_SHARDING, _DECLARED = 1, 2
_COLUMNS = 9
# Odd 64-bit numbers, for sums that are meant to overflow.
_STEP, _FACTOR = -7046029254386353131, -4658895280553007687


@dataclasses.dataclass(frozen=True)
class SequenceCut:
    """How the tokens of this rank were cut out of a batch.

    Attributes:
        ring: ring ranks R.
        size: ranks N of seq.
        sharded: whether ranks of seq hold tokens of their own.
        part: which part these tokens are, in the order of ring rank * slices + slice.
        length: tokens of each sequence before padding.
        padded: with padding.
        pieces: that a ring rank's tokens are cut into before each is cut into slices.
        declared: by the user, who has cut by hand.
        sums: checksum of each row of the whole batch; 0 where it is not known.
    """

    ring: int
    size: int
    sharded: bool
    part: int
    length: int
    padded: int
    pieces: int = 1
    declared: bool = False
    sums: tuple[int, ...] = ()

    @staticmethod
    def of(group: SequenceGroup, length: int, padded: int, *, pieces: int = 1, declared: bool = False) -> SequenceCut:
        """This rank's part of sequences of ``padded`` tokens."""
        sharded = group.tokens == "sharded"
        part = group.every_rank if sharded else group.ring_rank
        size = group.slices if sharded else group.size
        return SequenceCut(group.zigzag_size, size, sharded, part, length, padded, pieces, declared)

    @property
    def slices(self) -> int:
        """Parts that a ring rank's tokens are cut into."""
        return self.size if self.sharded else 1

    @property
    def padding(self) -> int:
        """Tokens of padding."""
        return self.padded - self.length

    def tensor(self, sums: Tensor) -> Tensor:
        """The descriptor [B, 9] of rows with these checksums [B], on their device."""
        kind = _DECLARED if self.declared else _BY_SHARDING
        numbers = [kind, self.ring, self.size, int(self.sharded), self.part, self.length, self.padded, self.pieces]
        fixed = torch.tensor(numbers, dtype=torch.int64).to(sums.device)
        return torch.cat((fixed.expand(sums.shape[0], -1), sums[:, None]), dim=1)

    @staticmethod
    def read(descriptor: Tensor) -> SequenceCut:
        """The cut that a descriptor [B, 9] describes; waits for the tensor's device.

        Raises:
            ValueError: if it is no such descriptor, or its rows were cut in different ways.
        """
        integers = isinstance(descriptor, Tensor) and descriptor.dtype == torch.int64
        if not integers or descriptor.ndim != 2 or descriptor.shape[1] != _COLUMNS or descriptor.shape[0] == 0:
            got = (
                f"{list(descriptor.shape)} {descriptor.dtype}"
                if isinstance(descriptor, Tensor)
                else type(descriptor).__name__
            )
            raise ValueError(f"{KEY}: expected what shard_sequence returned, int64 [B, {_COLUMNS}], got {got}")
        rows = descriptor.tolist()
        kind, ring, size, sharded, part, length, padded, pieces, _ = rows[0]
        if any(row[:-1] != rows[0][:-1] for row in rows):
            raise ValueError(
                f"{KEY}: expected sequences that were cut alike, got {len(rows)} of several lengths, cuts or ranks "
                f"in one batch: cut the whole batch at once"
            )
        if kind not in (_BY_SHARDING, _DECLARED):
            raise ValueError(f"{KEY}: expected what shard_sequence returned, got the numbers {rows[0]}")
        sums = tuple(row[-1] for row in rows)
        return SequenceCut(ring, size, bool(sharded), part, length, padded, pieces, kind == _DECLARED, sums)

    def positions(self, device: torch.device | None = None) -> Tensor:
        """int64 [s]: where in the padded sequences the tokens of this part lie."""
        return part_positions(self.ring, self.slices, self.part, self.padded, self.pieces, device)

    def check(self, group: SequenceGroup) -> None:
        """Raises ValueError unless this is the part that the ranks of ``group`` have this rank compute."""
        own = SequenceCut.of(group, self.length, self.padded)
        if (self.ring, self.slices) != (own.ring, own.slices):
            raise ValueError(
                f"{KEY}: this batch was cut {self.describe()}, and the model is parallelized so that it takes batches "
                f"cut {own.describe()}: call shard_sequence(batch, mesh, strategy) with the mesh and the strategy that "
                f"parallelize was given"
            )
        if self.part != own.part:
            raise ValueError(
                f"{KEY}: expected part {own.part} of {own.ring * own.slices} on this rank, got part {self.part}: every "
                f"rank calls shard_sequence itself, with the whole batch"
            )

    def describe(self) -> str:
        """In words."""
        if self.sharded and self.size == 1 and self.ring > 1:
            return f'in zigzag order over all {self.ring} ranks (as "tsp" has it, and a ring without "seq")'
        whole = 'which each rank of "seq" holds whole (as "tp" has it)'
        cut = f'cut over {self.size} ranks of "seq" (as "tp_sp", "ulysses" and "odysseus" have it)'
        parts = f'into parts for {self.ring} ranks of "ring", each ' if self.ring > 1 else "into one part, "
        striped = f", striped in {self.pieces} pieces" if self.pieces > 1 else ""
        return parts + (cut if self.sharded else whole) + striped


def part_positions(
    ring: int, slices: int, part: int, padded: int, pieces: int = 1, device: torch.device | None = None
) -> Tensor:
    """int64 [padded / (ring * slices)]: where in the padded sequence the tokens of a part lie."""
    ring_rank, slice_ = divmod(part, slices)
    own = layout.positions(ring_rank, ring, padded, RING_LAYOUT, device)
    return own[layout.striped_positions(slice_, slices, own.shape[0], pieces, device)]


def natural_order(parts: Tensor, ring: int, slices: int, pieces: int) -> Tensor:
    """[B, padded, ...], each ring rank's tokens in their order, from all ranks' slices one after another."""
    if pieces == 1:
        return parts
    everyone = parts.unflatten(1, (ring, slices, -1))
    sizes = layout.piece_rows(everyone.shape[3], pieces)
    return torch.cat([piece.flatten(2, 3) for piece in everyone.split(sizes, dim=3)], dim=2).flatten(1, 2)


def checksums(tensors: Mapping[str, Tensor], rows: int) -> Tensor:
    """int64 [rows], never 0: equal where all rows [L] of integers under the same names are, else almost surely not.

    A tensor with one row counts for all.  Nothing waits for the device.
    """
    total = None
    for name in sorted(tensors):
        tensor = tensors[name].to(torch.int64)
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
        mixed = torch.arange(1, tensor.shape[1] + 1, device=tensor.device).mul_(_STEP).add_(seed) + tensor
        for shift in (32, 29):
            mixed.bitwise_xor_(mixed >> shift).mul_(_FACTOR)
        part = mixed.bitwise_xor_(mixed >> 31).sum(1).expand(rows)
        total = part.clone() if total is None else total.mul_(_FACTOR).add_(part.to(total.device))
    assert total is not None, "a batch has tokens"
    return total.masked_fill_(total == 0, 1)


def digest(sums: tuple[int, ...]) -> str:
    """A short text that stands for checksums in their order."""
    return hashlib.blake2b(repr(sums).encode(), digest_size=6).hexdigest()
