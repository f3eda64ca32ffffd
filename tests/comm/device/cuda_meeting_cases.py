"""What ranks run in the tests of how they meet for GPUs: GPUs are made up, everything between processes is real."""

from __future__ import annotations

import dataclasses
import datetime
import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import _SymmetricMemory

import odysseus_kernels as ody
from odysseus_kernels import _ext
from odysseus_kernels.comm import groups
from odysseus_kernels.comm.device import cuda, rendezvous
from odysseus_kernels.comm.device.peer_memory import TorchSymmetricMemory
from odysseus_kernels.comm.meeting import texts as meeting
from odysseus_kernels.comm.meeting.membership import this_member

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
        mock.patch.object(cuda, "device_identity", lambda device: identities[device.index]),
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


class _StoreExchange:
    """Torch's: messages are numbered by one counter for all groups of a process."""

    number = 0

    @classmethod
    def all_gather(cls, store: dist.Store, rank: int, world: int, value: str) -> list[str]:
        keys = [f"CUDASymmetricMemory/{cls.number}/{peer}" for peer in range(world)]
        cls.number += 1
        store.set(keys[rank], value)
        found = []
        for peer in range(world):
            store.wait([keys[peer]])
            found.append(store.get(keys[peer]).decode())
        return found


class _Handle:
    """What a rendezvous leads to: here memory whose addresses are made up, and equal for equal groups and windows."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        return mock.Mock(data_ptr=lambda: self.told[rank])


class _Torch:
    """Torch's rendezvous, as far as it talks.  Older versions take the store from what they were told of a group."""

    def __init__(self, *, told: bool) -> None:
        self._infos: dict[str, tuple[int, int, dist.Store]] | None = {} if told else None

    def set_group_info(self, name: str, rank: int, world: int, store: dist.Store) -> None:
        assert self._infos is not None and name not in self._infos
        self._infos[name] = rank, world, store

    def rendezvous(self, tensor: torch.Tensor, name: str) -> _Handle:
        if self._infos is None:
            group = c10d._resolve_process_group(name)  # type: ignore[arg-type]
            rank, world, store = group.rank(), group.size(), group.get_group_store()
        elif name in self._infos:
            rank, world, store = self._infos[name]
        else:
            raise RuntimeError(f"get_group_info: no group info associated with the group name {name}")
        # From C++, as torch does it: not by the methods that Python would find.
        store = dist.PrefixStore("", store)
        told = []
        for message in range(3):
            text = f"{message}, {tensor.numel()} bytes of rank {rank}"
            told = _StoreExchange.all_gather(store, rank, world, text)
        return _Handle(told)


def overlapping_groups(rank: int, world: int, told: bool) -> list[list[Any]]:
    """Groups 0-1, 1-2 and 0-1-2 grow their windows different numbers of times, in turns."""
    members = {"left": [0, 1], "right": [1, 2], "all": [0, 1, 2]}
    groups = {name: dist.new_group(ranks) for name, ranks in members.items()}
    texts = {name: meeting.Meeting(group) for name, group in groups.items() if rank in members[name]}
    config = ody.OverlapConfig(timeout_s=20)
    stand_in = _Torch(told=told)
    counter = mock.patch.object(_StoreExchange, "number", 0)
    native = mock.patch.multiple(
        _SymmetricMemory,
        empty_strided_p2p=lambda size, stride, dtype, device: torch.empty(size, dtype=dtype),
        rendezvous=stand_in.rendezvous,
        set_group_info=stand_in.set_group_info,
    )
    limit = mock.patch.object(rendezvous, "_TIMEOUT", datetime.timedelta(seconds=20))
    made: dict[str, TorchSymmetricMemory] = {}
    found = []
    with native, counter, limit, mock.patch.object(torch.cuda, "synchronize"):
        for number, name in enumerate(["left", "left", "right", "all", "right", "left", "all", "right"]):
            if name not in texts:
                continue
            if name not in made:

                def exchange(text: str, name: str = name) -> list[str]:
                    return texts[name].exchange(text, config)

                made[name] = TorchSymmetricMemory(groups[name], torch.device("cpu"), exchange, 17)
            made[name].grow({("shard", 0): (number + 1) << 21})
            found.append([name, *(made[name].window(peer, ("shard", 0)) for peer in range(len(members[name])))])
        for memory in made.values():
            memory.close()
    return found


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
