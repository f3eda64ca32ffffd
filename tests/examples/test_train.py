"""The example is one program on one process and on several ranks, and goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program_cases import output_of

pytestmark = pytest.mark.without_ranks

SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"
SIZES = ["--seq-len", "62", "--batch-size", "2", "--hidden", "48", "--layers", "1", "--heads", "4", "--kv-heads", "2"]
STEPS, HALF = 6, 3
LIMIT_S = 120


def _train(ranks: int, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What a run writes and prints."""
    printed = output_of(SCRIPT, ranks, *_arguments(folder), *options, limit_s=LIMIT_S)
    return _written(ranks, folder), printed


def _alone(folder: Path, *options: str) -> dict[str, Any]:
    """What a run on one process writes that is started as a user starts it."""
    # The root on the path: the test must not depend on how, or where, the package is installed.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), *_arguments(folder), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return _written(1, folder)


def _arguments(folder: Path) -> list[str]:
    return ["--output", str(folder), "--text-limit", "300000", *SIZES, "--threads", "1", "--timeout", "60"]


def _written(ranks: int, folder: Path) -> dict[str, Any]:
    name = "odysseus" if ranks > 1 else "stock"
    return json.loads((folder / f"loss-N{ranks}-{name}.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on 1 and 2 ranks; the latter left a checkpoint half-way."""
    folder = tmp_path_factory.mktemp("train")
    single = _alone(folder, "--steps", str(STEPS))
    options = ("--steps", str(STEPS), "--eval-every", str(HALF), "--checkpoint", str(folder / "checkpoints"), "--plot")
    double, printed = _train(2, folder, *options, "--resume")  # there is none yet
    return {"folder": folder, 1: single, 2: double, "printed": printed}


def test_same_losses_on_one_and_two_ranks(runs):
    for step, loss in runs[1]["losses"].items():
        assert runs[2]["losses"][step] == pytest.approx(loss, rel=1e-4)
    assert len(runs[2]["losses"]) == STEPS
    last = str(STEPS)
    assert runs[2]["losses"][last] < runs[2]["losses"]["1"]
    bits = {ranks: runs[ranks]["validation_bits_per_byte"][last] for ranks in (1, 2)}
    assert bits[2] == pytest.approx(bits[1], rel=1e-4)
    assert 0 < bits[1] < 8.5


def test_what_a_run_leaves(runs):
    assert (runs["folder"] / "loss.png").read_bytes().startswith(b"\x89PNG")
    for ranks in (1, 2):
        assert len(runs[ranks]["peak_memory_bytes"]) == ranks
        assert min(runs[ranks]["peak_memory_bytes"]) > 2**20
        assert runs[ranks]["tokens_per_second"] > 0
        assert runs[ranks]["versions"].keys() == {"python", "torch", "transformers", "odysseus_kernels"}
    for line in ("2 ranks", f"loss at step {STEPS}", "validation, bits per byte", "tokens/s", "rank 1", "MiB"):
        assert line in runs["printed"]
    assert runs["printed"].count("--resume: no complete checkpoint in ") == 1
    assert "\x1b" not in runs["printed"], "no progress bar and no colours where nobody watches"


@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupted_run_goes_on(runs, tmp_path, ranks):
    """From the checkpoint of 2 ranks; a newer one that was not finished is passed over."""
    kept = runs["folder"] / "checkpoints"
    shutil.copytree(kept / f"step-{HALF}", tmp_path / f"step-{HALF}")
    (tmp_path / f"step-{STEPS - 1}").mkdir()
    options = ("--steps", str(STEPS), "--checkpoint", str(tmp_path), "--resume")
    resumed, _ = _train(ranks, tmp_path, *options)
    assert len(resumed["seconds"]) == STEPS - HALF
    if ranks == 2:
        assert resumed["losses"] == runs[2]["losses"], "the same ranks must go on to the bit"
        assert resumed["validation_bits_per_byte"][str(STEPS)] == runs[2]["validation_bits_per_byte"][str(STEPS)]
    for step, loss in runs[1]["losses"].items():
        assert resumed["losses"][step] == pytest.approx(loss, rel=1e-4)
