"""How ranks meet for GPUs: what is missing is said once, and named."""

from __future__ import annotations

from typing import Any
from unittest import mock

import cuda_meeting_cases
import pytest
import torch

import odysseus_kernels as ody
from odysseus_kernels.comm.peer_memory import TorchSymmetricMemory
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
