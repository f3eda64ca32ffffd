"""A shard that was sent ahead of the call that gathers it, and which call that is."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from odysseus_kernels.comm.transport import Call

__all__ = ["SentAhead"]


@dataclasses.dataclass(frozen=True)
class SentAhead:
    """A shard that was prefetched, and its version at that time.

    It serves the very next call of the same phase, or nothing: no optimizer's step lies between two calls of one
    backward pass, or of one forward pass.  (Versions alone would not tell: an optimizer changes the local tensor of a
    DTensor without counting.)  The shard is held meanwhile, so that its memory cannot become another tensor's: an
    equal address then means the same storage.
    """

    shard: Tensor
    version: int
    pieces: int
    phase: str

    @staticmethod
    def of(call: Call, shard: Tensor, pieces: int) -> SentAhead:
        return SentAhead(shard, shard._version, pieces, call.phase)

    def serves(self, call: Call, pieces: int) -> bool:
        """Whether ``call`` gathers this shard, unchanged, cut into ``pieces``."""
        if call.gather is None or call.phase != self.phase:
            return False
        mine, shard = self.shard, call.gather.shard
        return (
            mine.data_ptr() == shard.data_ptr()
            and mine.shape == shard.shape
            and mine.dtype == shard.dtype
            and mine._version == self.version == shard._version
            and pieces == self.pieces
        )
