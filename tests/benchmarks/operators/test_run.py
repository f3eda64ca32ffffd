"""The benchmark as a whole, on ranks: small shapes, real operators."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.operators import workload
from benchmarks.operators.cases import Case
from benchmarks.operators.run import run_rows
from benchmarks.operators.workload import Settings
from odysseus_kernels.testing.spawn import RankPool

_ROOT = Path(__file__).resolve().parents[3]

_CASES = (
    Case("small", "all_gather_linear", 64, 32, (24, 8), True),
    Case("small", "linear_reduce_scatter", 64, 32, (24,), True),
    Case("small", "zero3_linear", 64, 32, (24,), True),
)


def _run_with_a_wrong_operator(rank: int, world_size: int, settings: Settings) -> list[dict[str, Any]]:
    right = workload.ops.all_gather_linear

    def wrong(*arguments: Any, config: Any, **others: Any) -> Any:
        y = right(*arguments, config=config, **others)
        # A diagonal of wrong elements on one rank, in one of two outputs, must be enough.
        return (y[0] + torch.eye(*y[0].shape) * (rank == 1), *y[1:]) if config.mode == "fused" else y

    workload.ops.all_gather_linear = wrong
    try:
        return run_rows(rank, world_size, settings)
    finally:
        workload.ops.all_gather_linear = right


@pytest.mark.without_ranks
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_variants_are_right_and_timed(dtype: str) -> None:
    with RankPool(2) as pool:
        rows, again = pool.run(run_rows, Settings(rows=_CASES, dtype=dtype, device="cpu", repeats=3))
        assert rows == again
        for row in rows:
            assert row["wrong"] == []
            assert row["host_s"] == row["predicted_s"] == {}, "of devices alone"
            assert len(row["samples_s"]) == 8
            assert all(len(samples) == 3 and min(samples) > 0 for samples in row["samples_s"].values())
            assert {"output", "input gradient", "weight gradient"} <= {
                name.removesuffix(" 0") for name in row["errors"]["fused symmetric"]
            }

        settings = Settings(rows=_CASES[:1], dtype=dtype, device="cpu", repeats=1, variants="^fused|torch")
        (row,) = pool.run(run_rows, settings)[0]
        assert list(row["samples_s"]) == ["gemm", "fused symmetric", "fused collective", "torch"]

        settings = Settings(rows=_CASES[:1], dtype=dtype, device="cpu", repeats=1)
        (row,) = pool.run(_run_with_a_wrong_operator, settings)[0]
        assert sorted(row["wrong"]) == ["fused collective", "fused symmetric"]
        assert "fused symmetric" not in row["samples_s"]
        assert "unfused symmetric" in row["samples_s"]


def test_variants_are_checked_before_ranks_start() -> None:
    names = {"unfused symmetric", "fused symmetric", "communication symmetric", "torch"}
    for name in names:
        workload.check_variants(f"^{name}$", ["symmetric"])
    with pytest.raises(ValueError, match=r"found in no name; the names are\n  unfused symmetric") as error:
        workload.check_variants("pipelined", ["symmetric"])
    assert {line.strip() for line in str(error.value).splitlines()[1:]} == names
    with pytest.raises(ValueError, match="not a regular expression"):
        workload.check_variants("(", ["symmetric"])


@pytest.mark.without_ranks
def test_memory_of_all_variants() -> None:
    with RankPool(2) as pool:
        settings = Settings(rows=_CASES, dtype="float32", device="cpu", repeats=1, memory=True)
        for row in pool.run(run_rows, settings)[0]:
            assert row["gathered_bytes"] == 2 * row["chunk_bytes"]
            assert set(row["bytes"]) == {
                "unfused symmetric",
                "fused symmetric",
                "unfused collective",
                "fused collective",
                "torch",
            }
            # Unfused, the gathered tensor is held whole: the accounting must see it.
            assert row["bytes"]["torch"]["extra"] >= row["gathered_bytes"]


@pytest.mark.without_ranks
def test_program(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/overlap.py", "--quick", "--repeats", "1", "--cases", "qkv.*forward$"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=_ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "all_gather_linear" in done.stdout
    (path,) = tmp_path.glob("overlap-*.json")
    assert json.loads(path.read_text())["rows"][0]["wrong"] == []
    assert path.with_suffix(".png").exists()

    done = subprocess.run(
        [*command[:2], "--cases", "nothing"], cwd=_ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "is found in no row" in done.stderr
