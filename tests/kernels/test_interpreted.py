"""All kernels on the CPU, in Triton's interpreter, against fp64; and two ranks that wait for each other's words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

pytest.importorskip("triton")

_SCRIPT = Path(__file__).with_name("interpreted_run.py")
_LIMITS = Path(__file__).with_name("interpreted_limits.py")
_NUMPY = tuple(int(part) for part in numpy.__version__.split(".")[:2])

# Triton's interpreter relies on conversions of arrays to numbers that NumPy 2.5 refuses.
pytestmark = [
    pytest.mark.without_ranks,
    pytest.mark.skipif(_NUMPY >= (2, 5), reason=f"the interpreter needs NumPy < 2.5, got {numpy.__version__}"),
]


def _start(*arguments: str, script: Path = _SCRIPT) -> subprocess.Popen[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(script), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _finish(*processes: subprocess.Popen[str]) -> None:
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


@pytest.mark.parametrize("check", ["gather", "scatter", "gradient", "fallback", "arguments", "aborted", "prepared"])
def test_kernels(check: str) -> None:
    _finish(_start(check))


def test_a_wait_for_what_never_comes_is_an_error_with_names() -> None:
    _finish(_start(script=_LIMITS))


@pytest.mark.parametrize("check", ["two_gather", "two_scatter"])
def test_two_ranks(check: str, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.write_bytes(bytes(1 << 20))
    _finish(*(_start(check, str(rank), str(shared)) for rank in range(2)))
