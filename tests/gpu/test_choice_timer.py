"""The timer of ``mode="auto"`` on a GPU."""

from __future__ import annotations

import pytest
import torch

from odysseus_kernels.comm.choice.measure import CudaTimer

pytestmark = pytest.mark.gpu


def test_cuda_timer() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    timer = CudaTimer(device)
    short, long = (timer.measure(lambda cycles=cycles: torch.cuda._sleep(cycles)) for cycles in (10**6, 10**8))
    assert 0 < short < long < 10
