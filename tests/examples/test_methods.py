"""Policies and preferences are trained by one program on one process and on several ranks, to the same numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import method_cases as cases
import pytest
import torch
from program_cases import output_of

EXAMPLES = Path(__file__).parents[2] / "examples"
METHODS = ("grpo", "dpo")
LIMIT_S = 120


def printed(method: str, ranks: int) -> list[list[float]]:
    """The numbers of each line; on one process as a user runs it."""
    script, options = EXAMPLES / f"{method}.py", ("--steps", "3", "--timeout", "60")
    text = output_of(script, ranks, *options, limit_s=LIMIT_S) if ranks > 1 else _alone(script, *options)
    return [[float(n) for n in re.findall(r"-?\d+\.?\d*", line)] for line in text.splitlines()]


def _alone(script: Path, *options: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, str(script), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.without_ranks
def test_same_numbers_on_one_and_two_ranks(method):
    single, double = printed(method, 1), printed(method, 2)
    assert len(single) == len(double) == 3
    for mine, truth in zip(double, single, strict=True):
        # Six digits are printed; Adam's steps are the sign of a gradient where it is as small as its rounding.
        assert mine == pytest.approx(truth, rel=1e-3, abs=2e-5)
    assert single[-1][1] < single[0][1], "the loss falls"
    assert single[-1][2] != single[0][2], "the policy moves"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", ("odysseus", "tp"))
def test_loss_and_gradients_are_those_of_the_stock_model(ranks, method, strategy):
    """fp32: products of 96 numbers, and gradients over some 60 tokens."""
    truth = cases.step(None, method, strategy)
    for found in ranks(2).run(cases.parallel_step, method, strategy):
        assert torch.equal(found["batch"], truth["batch"])
        assert found["loss"] == pytest.approx(truth["loss"], rel=2e-5, abs=2e-6)
        torch.testing.assert_close(found["other"], truth["other"], rtol=1e-4, atol=2e-5)
        for name, gradient in found["gradients"].items():
            expected = truth["gradients"][name]
            assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name
