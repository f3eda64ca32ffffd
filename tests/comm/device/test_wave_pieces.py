"""In how many pieces the transport of devices sends sums: as its products fill the device, and alike on all ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from odysseus_kernels.comm.device.pieces import of_scatter
from odysseus_kernels.comm.transport import Call, Scatter
from odysseus_kernels.config import OverlapConfig

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
    scatter = Scatter(torch.empty(1, rows, width, device="meta"), lambda target, start, stop, block: None)
    call = Call("operator", "forward", OverlapConfig(mode="fused"), scatter=scatter)
    assert of_scatter(call, scatter, 8, multiprocessors) == pieces
    given = dataclasses.replace(call, config=dataclasses.replace(call.config, chunks_per_rank=2))
    assert of_scatter(given, scatter, 8, multiprocessors) == 2, "what the caller asks for is done"
