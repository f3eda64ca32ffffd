"""How fast a rank receives: an all-gather by each transport, large for its rate and tiny for its latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.comm.groups import synchronize
from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.config import OverlapConfig, TransportName
from odysseus_kernels.doctor.report import Rate

__all__ = ["measure", "received_per_s"]

SHARD_BYTES = 8 << 20
_TINY_BYTES = 4096
_ROUNDS, _TINY_ROUNDS = 7, 20
_WARM_UP = 4  # buffers take turns: the first rounds back them with memory


def measure(group: dist.ProcessGroup, transport: TransportName, device: torch.device, timeout_s: float) -> Rate:
    """Medians of this rank; every rank of ``group`` calls it.

    A result includes what an operator's ``unfused`` mode does: bytes lie in one tensor of this rank in the end.
    """
    config = OverlapConfig(transport=transport, timeout_s=timeout_s)
    with CommRecorder() as record:
        large = _median_s(group, SHARD_BYTES, config, device, _ROUNDS)
        carried = "+".join(sorted({str(row["transport"]) for row in record.rows()}))
    tiny = _median_s(group, _TINY_BYTES, config, device, _TINY_ROUNDS)
    return Rate(transport, carried, SHARD_BYTES, (group.size() - 1) * SHARD_BYTES / large, tiny)


def received_per_s(
    group: dist.ProcessGroup,
    shard_bytes: int,
    transport: TransportName,
    device: torch.device,
    timeout_s: float,
    rounds: int,
) -> float:
    """Bytes per second that this rank receives in all-gathers of ``shard_bytes`` a rank; all of ``group`` call it.

    The median of ``rounds`` that follow a warm-up.
    """
    config = OverlapConfig(transport=transport, timeout_s=timeout_s)
    return (group.size() - 1) * shard_bytes / _median_s(group, shard_bytes, config, device, rounds)


def _median_s(group: dist.ProcessGroup, nbytes: int, config: OverlapConfig, device: torch.device, rounds: int) -> float:
    shard = torch.ones(nbytes // 4, device=device)
    seconds = [_seconds(lambda: all_gather(shard, group, config=config), group) for _ in range(_WARM_UP + rounds)]
    return statistics.median(seconds[_WARM_UP:])


def _seconds(call: Callable[[], object], group: dist.ProcessGroup) -> float:
    begin = time.perf_counter()
    call()
    synchronize(group)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
