"""The recorder against an independent count: what the kernel sees on the loopback interface while Gloo moves data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import loopback_run
import pytest

from odysseus_kernels.strategies import STRATEGIES

pytestmark = pytest.mark.without_ranks

_PROGRAM = Path(loopback_run.__file__)
_ROOT = _PROGRAM.resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
# Three ranks tell N - 1 from N / 2 and from 1, which two cannot.
@pytest.mark.parametrize("ranks", (pytest.param(2, marks=pytest.mark.complete), 3))
def test_the_kernel_counts_what_the_recorder_counts(ranks: int) -> None:
    command = [sys.executable, str(_PROGRAM), str(ranks), *STRATEGIES]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=200, check=False)
    if done.returncode == loopback_run.NOT_POSSIBLE:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(STRATEGIES)
    for strategy, (counted, recorded) in found.items():
        # Never less than the data; at most 3 % more for headers, acknowledgements and handshakes.
        assert recorded <= counted <= 1.03 * recorded, f"{strategy}: {counted} bytes on lo, {recorded} recorded"
