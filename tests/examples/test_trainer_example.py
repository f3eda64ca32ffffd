"""The example with transformers' Trainer logs the same on one rank and on two."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from program_cases import output_of

pytestmark = pytest.mark.without_ranks

SCRIPT = Path(__file__).parents[2] / "examples" / "trainer.py"


def _logged(printed: str) -> list[dict[str, float]]:
    entries = [ast.literal_eval(line) for line in re.findall(r"\{[^{}]*\}", printed)]
    return [{name: float(value) for name, value in entry.items()} for entry in entries]


def _options(folder: Path) -> list[str]:
    return ["--output", str(folder), "--steps", "3", "--length", "62"]


def _alone(folder: Path) -> str:
    """As a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), *_options(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_logs_the_same_on_one_rank_and_on_two(tmp_path):
    assert len(SCRIPT.read_text().splitlines()) <= 40
    single = _logged(_alone(tmp_path / "1"))
    double = _logged(output_of(SCRIPT, 2, *_options(tmp_path / "2"), "--strategy", "ulysses", limit_s=120))
    compared = 0
    assert len(single) == len(double), "each line once, whatever the number of ranks"
    for entry, other in zip(single, double, strict=True):
        for name in {"loss", "grad_norm", "eval_loss", "learning_rate"} & entry.keys():
            assert other[name] == pytest.approx(entry[name], rel=2e-3)
            compared += 1
    assert compared == 3 * 3 + 1
