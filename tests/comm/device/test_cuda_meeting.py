"""How ranks meet for GPUs: what is missing is said once, and named."""

from __future__ import annotations

import datetime
from typing import Any
from unittest import mock

import cuda_meeting_cases
import pytest
import torch
import torch.distributed as dist

import odysseus_kernels as ody
from odysseus_kernels import _ext
from odysseus_kernels.comm.device import cuda
from odysseus_kernels.comm.device.cuda import why_no_switch
from odysseus_kernels.comm.device.peer_memory import TorchSymmetricMemory
from odysseus_kernels.comm.device.rendezvous import CountingStore
from odysseus_kernels.comm.schedules import streams
from odysseus_kernels.comm.transport import CapacityExceededError


def test_no_access_between_devices_means_collectives_with_one_warning(ranks: Any) -> None:
    for first, second, asked in ranks(2).run(cuda_meeting_cases.fallback, ""):
        assert first[0] == second[0] == "collective"
        (warning,) = first[1]
        assert "use the process group's collectives" in warning
        assert "no peer-to-peer access from cuda:0 to rank 1 (GPU of rank 1)" in warning
        assert second[1] == asked[1] == []
        assert 'transport="symmetric" is not available' in asked[0] and "no peer-to-peer access" in asked[0]


def test_no_driver_is_the_reason(ranks: Any) -> None:
    for first, _, asked in ranks(2).run(cuda_meeting_cases.fallback, "no NVIDIA driver"):
        assert first[0] == "collective" and "no NVIDIA driver" in first[1][0]
        assert "no NVIDIA driver" in asked[0]


def test_peers_on_another_host_are_named(ranks: Any) -> None:
    for message, caught in ranks(2).run(cuda_meeting_cases.other_hosts):
        assert "needs all ranks on one host" in message and "node0, node1" in message
        assert caught == []


def test_ranks_with_tensors_of_different_devices(ranks: Any) -> None:
    for message in ranks(2).run(cuda_meeting_cases.kinds_of_tensors):
        assert "with cpu tensors" in message and "with cuda tensors" in message


def test_connecting_looks_at_the_number_of_hardware_queues_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Megatron's setting: it is read when ranks connect, and said once in a process."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    streams.check_queues.cache_clear()
    native = mock.Mock()
    native.cuda.why_unavailable.return_value, native.SymmetricHost.return_value.path = "", "path"
    group: Any = mock.Mock(rank=lambda: 0, size=lambda: 2)
    with (
        mock.patch.object(_ext, "load", return_value=native),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=mock.Mock(multi_processor_count=132)),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)),
        mock.patch.object(cuda, "unreachable", return_value=[]),
        mock.patch.object(cuda, "TorchSymmetricMemory", return_value=mock.Mock(multicasts=False)),
        mock.patch.multiple(
            cuda, Ledger=mock.DEFAULT, CudaDevice=mock.DEFAULT, SymmetricDeviceTransport=mock.DEFAULT
        ) as made,
    ):
        for _ in range(2):
            peers = [("GPU", "0"), ("GPU", "1")]
            found = cuda.connect(group, torch.device("cuda", 0), peers, 7, lambda text: [text, text])
            assert found is made["SymmetricDeviceTransport"].return_value
    streams.check_queues.cache_clear()
    (warning,) = [one for one in recwarn if issubclass(one.category, ody.FallbackWarning)]
    assert "expected at least 6, a queue for each stream" in str(warning.message) and "got 1." in str(warning.message)


def test_too_little_symmetric_memory_is_said_once_and_not_tried_again() -> None:
    """One rank has no room: all of them learn it in the same exchange, and use collectives for calls of that size."""
    memory = object.__new__(TorchSymmetricMemory)
    memory._device, memory._refused, memory._windows, memory.retain = torch.device("cuda", 0), None, {}, False
    exchange = mock.Mock(return_value=["", "OutOfMemoryError: CUDA out of memory"])
    memory._exchange = exchange
    free = mock.patch.object(torch.cuda, "synchronize")
    with free, mock.patch.object(TorchSymmetricMemory, "_empty", return_value=torch.empty(0)):
        with (
            pytest.warns(ody.CapacityWarning, match="3,000,000 bytes .* rank 1: OutOfMemoryError"),
            pytest.raises(CapacityExceededError),
        ):
            memory.grow({("shard", 0): 3_000_000})
        for nbytes in (3_000_000, 5_000_000):
            with pytest.raises(CapacityExceededError, match="refused before"):
                memory.grow({("receive", 1): nbytes})
    exchange.assert_called_once_with("")
    assert memory._windows == {}


@pytest.mark.parametrize(
    ("devices", "mapped", "said"),
    (
        ([True, True], [True, True], ""),
        ([True, False], [False, False], "the GPU or driver of rank 1 knows no multicast addresses"),
        ([True, True], [False, True], "the memory that ranks share got no multicast address on rank 0"),
    ),
)
def test_why_no_switch_adds(devices: list[bool], mapped: list[bool], said: str) -> None:
    assert why_no_switch(devices, mapped) == said


@pytest.mark.parametrize("given", ("everywhere", "not here", "not there"))
def test_windows_that_get_no_multicast_address_are_refused_on_all_ranks(given: str) -> None:
    memory = object.__new__(TorchSymmetricMemory)
    memory._device, memory._refused, memory._windows, memory.retain = torch.device("cuda", 0), None, {}, False
    memory._trial = False
    told = iter(["", "", "none" if given == "not there" else ""])  # the other rank has room, and room, and
    memory._exchange = exchange = mock.Mock(side_effect=lambda text: [text, next(told)])
    handle = mock.Mock(multicast_ptr=0 if given == "not here" else 1 << 40)
    free = mock.patch.object(torch.cuda, "synchronize")
    made = mock.patch.object(TorchSymmetricMemory, "_empty", return_value=torch.empty(64, dtype=torch.uint8))
    met = mock.patch.object(TorchSymmetricMemory, "_meet", return_value=([1, 2], handle))
    with free, made, met:
        memory.grow({("receive", 1): 64})  # which needs none
        assert exchange.call_count == 1
        if given == "everywhere":
            memory.grow({("parts", 0): 64})
            assert memory.multicast(("parts", 0)) == 1 << 40 and memory.own_window(("parts", 0)).numel() == 64
            return
        rank = 0 if given == "not here" else 1
        with pytest.raises(ValueError, match=f"got none on rank {rank}: the driver has no more to give; use reduce"):
            memory.grow({("parts", 0): 64})
    assert memory.backed(("parts", 0)) == 0 and memory.backed(("receive", 1)) == 64


@pytest.mark.parametrize("told", (False, True))
def test_groups_that_overlap_grow_in_their_own_time(ranks: Any, told: bool) -> None:
    """Ranks have taken part in different numbers of rendezvous, of which torch counts all in one counter."""
    turns = ["left", "left", "right", "all", "right", "left", "all", "right"]
    members = {"left": [0, 1], "right": [1, 2], "all": [0, 1, 2]}
    for rank, found in enumerate(ranks(3).run(cuda_meeting_cases.overlapping_groups, told)):
        expected = [
            [name, *(f"2, {(number + 1) << 21} bytes of rank {peer}" for peer in range(len(members[name])))]
            for number, name in enumerate(turns)
            if rank in members[name]
        ]
        assert found == expected


def test_messages_are_numbered_as_a_group_comes_to_them() -> None:
    """By what they are for; anything else goes through as it is."""
    inner = dist.HashStore()
    first, second = CountingStore(inner), CountingStore(inner)
    for store, numbers in ((first, (7, 9, 12)), (second, (0, 1, 5))):
        for place, number in enumerate(numbers):
            rank = int(store is second)
            store.set(f"memory/{number}/{rank}", f"{place} of {rank}")
            store.set(f"other/{number + 1}/{rank}", "other")
        store.set(f"name {rank}", "as it is")
    for place, number in enumerate((7, 9, 12)):
        first.wait([f"memory/{number}/1"], datetime.timedelta(seconds=1))
        assert first.get(f"memory/{number}/1") == f"{place} of 1".encode()
        assert first.get(f"other/{number + 1}/1") == b"other"
    assert inner.get("name 0") == inner.get("name 1") == b"as it is"
    with pytest.raises(RuntimeError):
        first.wait(["memory/99/1"], datetime.timedelta(seconds=0.01))
