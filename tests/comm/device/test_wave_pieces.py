"""In how many pieces the transport of devices sends sums: as its products fill the device, and alike on all ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from odysseus_kernels.comm.device.transport import SymmetricDeviceTransport
from odysseus_kernels.comm.transport import Call, Scatter
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.testing.simulated_device import SimulatedMachine

pytestmark = pytest.mark.without_ranks


@pytest.mark.parametrize(
    ("rows", "width", "multiprocessors", "pieces"),
    (
        (4096, 5120, 132, 6),  # 6 x 20 tiles in one wave instead of 8 x 20 in two
        (4096, 4096, 132, 4),  # 8 x 16 tiles fill one
        (4096, 5120, 0, 4),  # where that is not known, pieces of 1024 rows
        (1024, 5120, 132, 1),  # one piece, which is not cut for the sake of waves
        (16384, 5120, 132, 10),  # 1639 rows: 13 x 20 tiles in two waves instead of 16 x 20 in three
    ),
)
def test_pieces_of_a_sum(rows: int, width: int, multiprocessors: int, pieces: int) -> None:
    machine = SimulatedMachine(8)
    scatter = Scatter(torch.empty(1, rows, width, device="meta"), lambda target, start, stop, block: None)
    call = Call("operator", "forward", OverlapConfig(mode="fused"), scatter=scatter)
    for rank, device in enumerate(machine.devices):
        device.multiprocessors = multiprocessors
        transport = SymmetricDeviceTransport(device, rank, 8)
        assert transport._scatter_pieces(call, scatter) == pieces
        given = dataclasses.replace(call, config=dataclasses.replace(call.config, chunks_per_rank=2))
        assert transport._scatter_pieces(given, scatter) == 2, "what the caller asks for is done"
