"""The example with transformers' Trainer logs the same on one rank and on two."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.without_ranks

SCRIPT = Path(__file__).parents[2] / "examples" / "trainer.py"


def _logged(ranks: int, folder: Path, *options: str) -> list[dict[str, float]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, *launcher, str(SCRIPT), "--output", str(folder), "--steps", "3", "--length", "62"]
    done = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    entries = [ast.literal_eval(line) for line in re.findall(r"\{[^{}]*\}", done.stdout)]
    return [{name: float(value) for name, value in entry.items()} for entry in entries]


def test_logs_the_same_on_one_rank_and_on_two(tmp_path):
    assert len(SCRIPT.read_text().splitlines()) <= 40
    single = _logged(1, tmp_path / "1")
    double = _logged(2, tmp_path / "2", "--strategy", "ulysses")
    compared = 0
    assert len(single) == len(double), "each line once, whatever the number of ranks"
    for entry, other in zip(single, double, strict=True):
        for name in {"loss", "grad_norm", "eval_loss", "learning_rate"} & entry.keys():
            assert other[name] == pytest.approx(entry[name], rel=2e-3)
            compared += 1
    assert compared == 3 * 3 + 1
