"""Whether all ranks make the same call, checked beside the calls: for collectives of a GPU.

A host that runs ahead of its GPU must not stop at each call.  Where the process group serves CPU tensors too, as
``"cpu:gloo,cuda:nccl"`` does, every call is compared by an asynchronous exchange that later calls look at.  Where it
does not, the comparison is a collective of the GPU, and only the first call of each kind is compared.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from odysseus_kernels.comm.meeting.backend import all_gather_single, exchange_device, wait
from odysseus_kernels.comm.mismatch import describe_mismatch, signature_hash
from odysseus_kernels.errors import FallbackWarning, RankMismatchError

__all__ = ["Handshakes"]

_HASH_BYTES = 8
_TEXT_BYTES = 384
# Exchanges that may be under way before a call waits for the oldest.
_UNDER_WAY = 16


@dataclasses.dataclass(frozen=True)
class _Exchange:
    sequence: int
    own: Tensor
    everyone: Tensor
    work: dist.Work
    timeout_s: float


class Handshakes:
    """Comparisons of one group's calls.

    Attributes:
        beside: whether every call is compared, or only the first of each kind.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._under_way: deque[_Exchange] = deque()
        self._seen: set[int] = set()
        self.beside = exchange_device(group).type == "cpu"
        if not self.beside:
            warnings.warn(
                f"process group {group.group_name} serves no CPU tensors: only the first call of each kind is compared "
                f"between ranks, and ranks that later make such calls in different orders wait for one another or "
                f'exchange wrong data; init_process_group("cpu:gloo,cuda:nccl") has every call compared',
                FallbackWarning,
                stacklevel=2,
            )

    def compare(
        self, group: dist.ProcessGroup, signature: str, sequence: int, timeout_s: float, look: Callable[[], None]
    ) -> None:
        """Begins to compare a call, and completes comparisons that have come back.

        Raises:
            RankMismatchError: ranks differ in this call or an earlier one; every rank gets it, at this call or later.
        """
        digest = signature_hash(signature)
        if not self.beside:
            if digest in self._seen:
                return
            self._seen.add(digest)
        record = digest.to_bytes(_HASH_BYTES, "little") + signature.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES)
        own = torch.frombuffer(bytearray(record), dtype=torch.uint8).to(exchange_device(group))
        everyone = own.new_empty((group.size(), own.numel()))
        work = all_gather_single(everyone.view(-1), own, group, async_op=True)
        self._under_way.append(_Exchange(sequence, own, everyone, work, timeout_s))
        most = _UNDER_WAY if self.beside else 0
        while self._under_way and (self._under_way[0].work.is_completed() or len(self._under_way) > most):
            self._end(self._under_way.popleft(), look)

    def finish(self, look: Callable[[], None]) -> None:
        """Ends all comparisons that are under way."""
        while self._under_way:
            self._end(self._under_way.popleft(), look)

    def _end(self, exchange: _Exchange, look: Callable[[], None]) -> None:
        wait(exchange.work, exchange.timeout_s, look, on_gpu=exchange.own.is_cuda)
        calls = {}
        for rank, row in enumerate(exchange.everyone.tolist()):
            digest = int.from_bytes(bytes(row[:_HASH_BYTES]), "little")
            calls[rank] = (digest, bytes(row[_HASH_BYTES:]).decode(errors="replace").strip())
        if len({digest for digest, _ in calls.values()}) > 1:
            raise RankMismatchError(describe_mismatch(calls, exchange.sequence))
