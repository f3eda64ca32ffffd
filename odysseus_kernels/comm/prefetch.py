"""What a call sends ahead: the weight shards that the next call of its group gathers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

__all__ = ["Prefetch"]


@dataclasses.dataclass(frozen=True)
class Prefetch:
    """Shards to be sent while another call computes.  They must not change before the call that gathers them.

    Attributes:
        kind: how they are gathered: by a ``"gather"``, or as all that is ``"shared"`` in an exchange.
        tensors: contiguous; of a gather one [batch, rows, width], else what the exchange shares, in its order.
    """

    kind: Literal["gather", "shared"]
    tensors: tuple[Tensor, ...]

    @staticmethod
    def of_gather(shard: Tensor) -> Prefetch | None:
        """``shard`` [batch, rows, width]; None if it cannot be sent ahead."""
        return _sendable("gather", (shard,))

    @staticmethod
    def of_shared(tensors: Sequence[Tensor]) -> Prefetch | None:
        """What an exchange shares; None if it cannot be sent ahead."""
        return _sendable("shared", tuple(tensors))

    @property
    def shard(self) -> Tensor:
        """The one tensor of a gather."""
        (shard,) = self.tensors
        return shard


def _sendable(kind: Literal["gather", "shared"], tensors: tuple[Tensor, ...]) -> Prefetch | None:
    """Only tensors that a transport will be given again, and whose changes are counted."""
    if not tensors or any(not one.is_contiguous() or one.is_inference() for one in tensors):
        return None
    return Prefetch(kind, tensors)
