"""The script for machines with a GPU, on machines without: it says why nothing can run, and stops at nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_ROOT = Path(__file__).resolve().parents[1]
_SCRIPT = "tests/run_gpu.sh"


def _run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ODYSSEUS_PYTHON": sys.executable, **variables}
    command = ["bash", _SCRIPT, *arguments]
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_syntax() -> None:
    subprocess.run(["bash", "-n", _SCRIPT], cwd=_ROOT, check=True, timeout=20)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = _run(str(tmp_path / "results"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "no GPU: torch.cuda.is_available() is false\n"


@pytest.mark.parametrize(
    ("arguments", "said"), ((("--only", "everything"), "usage:"), (("a", "b"), "usage:"), (("--fast",), "usage:"))
)
def test_usage(arguments: tuple[str, ...], said: str) -> None:
    done = _run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(said)


def test_without_python_it_says_so_in_one_line() -> None:
    done = _run(ODYSSEUS_PYTHON="/nonexistent/python")
    assert done.returncode == 2
    assert done.stderr == "no Python: /nonexistent/python is not a program; set ODYSSEUS_PYTHON\n"


_PRETENDED_GPU = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda index=0: "Pretended GPU"
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_part_that_fails_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    """With a GPU that is only pretended, the benchmark fails; its status and the summary say so."""
    (tmp_path / "sitecustomize.py").write_text(_PRETENDED_GPU)
    results = tmp_path / "results"
    done = _run(str(results), "--only", "bench", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "bench: failed" in done.stdout
    status = (results / "bench.status").read_text().split("\t")
    assert status[0] == "failed"
    assert len(status) == 4
    summary = (results / "summary.md").read_text()
    assert "| bench | failed |" in summary
    assert "| tests | never run |" in summary
    assert (results / "bench.log").read_text()

    done = _run(str(results), "--only", "bench", PYTHONPATH=str(tmp_path), ODYSSEUS_GPU_SECONDS="5")
    assert done.returncode == 1
    assert "bench: not run: no time left" in done.stdout
