"""What a launch makes of its arguments compiles, for odd sizes as well as for usual ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.without_ranks

pytest.importorskip("triton")


@pytest.mark.timeout(300)
def test_launches_compile_for_all_sizes(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("specialized_run.py"))]
    if request.config.getoption("complete"):
        command.append("--complete")
    result = subprocess.run(command, env=environment, text=True, capture_output=True, check=False, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
