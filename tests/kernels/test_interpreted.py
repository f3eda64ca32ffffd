"""All kernels on the CPU, in Triton's interpreter, against fp64; and two ranks that wait for each other's words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

pytest.importorskip("triton")

_SCRIPT = Path(__file__).with_name("interpreted_run.py")
_NUMPY = tuple(int(part) for part in numpy.__version__.split(".")[:2])
_CHECKS = ("gather", "scatter", "gradient", "fallback", "arguments", "aborted", "prepared")
_LIMITS = "limits"
_TWO_RANKS = ("two_gather", "two_scatter")

# Triton's interpreter relies on conversions of arrays to numbers that NumPy 2.5 refuses.
pytestmark = [
    pytest.mark.without_ranks,
    pytest.mark.skipif(_NUMPY >= (2, 5), reason=f"the interpreter needs NumPy < 2.5, got {numpy.__version__}"),
]


@pytest.fixture(scope="module")
def failures(request: pytest.FixtureRequest) -> dict[str, str]:
    """Of each check that was asked for, what failed; one process for all, since importing Triton takes seconds."""
    items = [item for item in request.session.items if item.path == request.path]
    asked = [getattr(item, "callspec", None) for item in items]
    wanted = [call.params["check"] if call else _LIMITS for call in asked]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(_SCRIPT), *wanted]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("check", _CHECKS)
def test_kernels(failures: dict[str, str], check: str) -> None:
    assert not failures[check], failures[check]


def test_a_wait_for_what_never_comes_is_an_error_with_names(failures: dict[str, str]) -> None:
    assert not failures[_LIMITS], failures[_LIMITS]


@pytest.mark.parametrize("check", _TWO_RANKS)
def test_two_ranks(failures: dict[str, str], check: str) -> None:
    assert not failures[check], failures[check]
