"""torch.distributed underneath: names that changed between versions, and waits that end.

Supported are torch 2.10 and later.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["WaitTimeoutError", "all_gather_single", "exchange_device", "nccl_of", "reduce_scatter_single", "wait"]

# Renamed in 2.13, where the older names warn.
all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# A backend notices a lost peer only where it talks to it: in a ring, the ranks next to it.  So every wait looks for
# lost peers.
_SLICE_S = 0.2
_POLL_S = 0.001
# A backend's clock overflows beyond centuries, and ``timeout_s`` may be infinite.
_LONGEST_S = 1e6


class WaitTimeoutError(TimeoutError):
    """A collective was not complete in time."""


def exchange_device(group: dist.ProcessGroup) -> torch.device:
    """Where tensors lie by which ranks tell one another small things: the CPU if the group serves it."""
    if torch.device("cpu") in group._device_types:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def nccl_of(group: dist.ProcessGroup) -> Any:
    """NCCL's class of backends if the group's collectives of CUDA tensors are NCCL's, else None."""
    nccl, cuda = getattr(dist, "ProcessGroupNCCL", None), torch.device("cuda")
    if nccl is None or cuda not in group._device_types or not isinstance(group._get_backend(cuda), nccl):
        return None
    return nccl


def wait(work: dist.Work, timeout_s: float, look: Callable[[], None], *, on_gpu: bool = False) -> None:
    """Waits for ``work``, calling ``look`` (which may raise) several times a second.

    With ``on_gpu`` the host asks whether it is complete: a wait with a time limit would make NCCL abort at that limit.

    Raises:
        WaitTimeoutError: not complete within ``timeout_s``.
        RuntimeError: the backend's error.
    """
    deadline = time.monotonic() + min(timeout_s, _LONGEST_S)
    while on_gpu and not work.is_completed():
        if time.monotonic() >= deadline:
            raise WaitTimeoutError(f"not complete within {timeout_s:g} s")
        look()
        time.sleep(_POLL_S)
    while True:
        left = max(deadline - time.monotonic(), 0.001)
        try:
            work.wait(datetime.timedelta(seconds=min(left, _SLICE_S)))
            return
        except RuntimeError as error:
            if work.is_completed():
                work.wait()  # complete after all, or failed: then this says how
                return
            if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
                raise
            if time.monotonic() >= deadline:
                raise WaitTimeoutError(f"not complete within {timeout_s:g} s") from error
        look()
