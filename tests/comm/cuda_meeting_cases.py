"""What ranks run in the tests of how they meet for GPUs: GPUs are made up, everything between processes is real."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import odysseus_kernels as ody
from odysseus_kernels import _ext
from odysseus_kernels.comm import groups, meeting, symmetric_cuda
from odysseus_kernels.comm.membership import this_member

DEVICE = torch.device("cuda", 0)


def _choose(transport: str, group: dist.ProcessGroup) -> tuple[str, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            config = ody.OverlapConfig(transport=transport, timeout_s=20)  # type: ignore[arg-type]
            result = groups.group_transports(group).choose(config, DEVICE).name
        except ValueError as error:
            result = str(error)
    return result, [str(one.message) for one in caught if issubclass(one.category, ody.FallbackWarning)]


def _made_up(rank: int, *, driver: str, reachable: bool) -> Any:
    """Each rank has a GPU, and sees the other's as ``cuda:1``."""
    identities = [(f"GPU of rank {rank}", f"uuid {rank}"), (f"GPU of rank {1 - rank}", f"uuid {1 - rank}")]
    native = mock.Mock(wraps=_ext.load())
    native.cuda = mock.Mock()  # also where the CUDA part is not built
    native.cuda.why_unavailable.return_value = driver
    return [
        mock.patch.object(_ext, "has_cuda", return_value=True),
        mock.patch.object(_ext, "load", return_value=native),
        mock.patch.object(symmetric_cuda, "device_identity", lambda device: identities[device.index]),
        mock.patch.object(torch.cuda, "device_count", return_value=2),
        mock.patch.object(torch.cuda, "can_device_access_peer", return_value=reachable),
    ]


def fallback(rank: int, world: int, driver: str) -> list[tuple[str, list[str]]]:
    """What automatic choice and an explicit wish lead to, twice: there is one warning for a group."""
    results = []
    stack = _made_up(rank, driver=driver, reachable=False)
    for patch in stack:
        patch.start()
    try:
        group = dist.new_group([0, 1])
        results = [_choose(transport, group) for transport in ("auto", "auto", "symmetric")]
    finally:
        for patch in stack:
            patch.stop()
    return results


def other_hosts(rank: int, world: int) -> tuple[str, list[str]]:
    """Ranks on two machines that ask for the symmetric transport."""
    member = dataclasses.replace(this_member(), host=f"node{rank}", machine=f"machine {rank}")
    stack = [*_made_up(rank, driver="", reachable=True), mock.patch.object(meeting, "this_member", return_value=member)]
    for patch in stack:
        patch.start()
    try:
        return _choose("symmetric", dist.new_group([0, 1]))
    finally:
        for patch in stack:
            patch.stop()


def kinds_of_tensors(rank: int, world: int) -> str:
    """One rank comes with CPU tensors, the other with a GPU's."""
    stack = _made_up(rank, driver="", reachable=True)
    for patch in stack:
        patch.start()
    try:
        config = ody.OverlapConfig(timeout_s=20)
        device = DEVICE if rank else torch.device("cpu")
        groups.group_transports(dist.new_group([0, 1])).choose(config, device)
    except ody.RankMismatchError as error:
        return str(error)
    finally:
        for patch in stack:
            patch.stop()
    return ""
