"""Fault injection does what it says, so that tests of faults test faults."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from odysseus_kernels.testing.faults import Jitter, frozen_for


def test_jitter_is_seeded_and_differs_by_rank() -> None:
    def draw(seed: int, rank: int) -> list[float]:
        jitter = Jitter(seed, rank, longest_s=1e-4, share=0.5)
        return [jitter() for _ in range(50)]

    assert draw(1, 0) == draw(1, 0)
    assert draw(1, 0) != draw(1, 1)
    assert draw(1, 0) != draw(2, 0)
    assert 5 < sum(seconds > 0 for seconds in draw(1, 0)) < 45
    assert sum(Jitter(0, 0, share=0.0)() for _ in range(20)) == 0
    with pytest.raises(ValueError, match="share"):
        Jitter(0, 0, share=2)


def test_frozen_process_goes_on_afterwards() -> None:
    program = "import time\nfor _ in range(20): time.sleep(0.01)"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        with frozen_for(process.pid, 0.5):
            begin = time.monotonic()
        assert time.monotonic() - begin >= 0.4
        assert process.wait(timeout=20) == 0
