"""Configurations: what is shipped, what a device can run, and which comes first."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import pytest
import torch

from odysseus_kernels.kernels.configs import DTYPES, Kernel, Problem, Target, TileConfig, candidates, shipped

_H200 = Target(90, 132, 227 * 1024)


def test_importing_configurations_does_not_import_triton() -> None:
    code = "import odysseus_kernels.kernels.configs, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_m": 96}, "block_m: expected a power of two from 16, got 96"),
        ({"block_k": 8}, "block_k: expected a power of two from 16, got 8"),
        ({"warps": 3}, "warps: expected a power of two from 1, got 3"),
        ({"stages": 0}, "stages: expected 1 or more, got 0"),
        ({"sms": 0}, "sms: expected None or 1 or more, got 0"),
        ({"schedule": "stream"}, "schedule: expected one of .*, got 'stream'"),
        ({"schedule": "pingpong"}, "schedule 'pingpong': expected descriptors and 4 warps, got descriptors=False"),
        (
            {"schedule": "cooperative", "descriptors": True, "warps": 8},
            "expected descriptors and 4 warps, got .*warps=8",
        ),
    ],
)
def test_wrong_configuration(fields: dict[str, Any], message: str) -> None:
    good = {"block_m": 64, "block_n": 64, "block_k": 32, "warps": 4, "stages": 3}
    with pytest.raises(ValueError, match=message):
        TileConfig(**(good | fields))


def test_programs() -> None:
    config = TileConfig(64, 64, 32, warps=4, stages=3, sms=10, per_sm=2)
    assert config.programs(tiles=1000, sms=132) == 20
    assert config.programs(tiles=7, sms=132) == 7
    assert config.programs(tiles=1000, sms=4) == 8


def test_tiles_cover_each_width_by_itself() -> None:
    config = TileConfig(64, 64, 32, warps=4, stages=3)
    assert Problem(8, 65, (64, 1, 100), 32).tiles(config) == 8 * 2 * (1 + 1 + 2)


@pytest.mark.parametrize("kernel", ["gather_matmul", "matmul_scatter", "weight_gradient"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_candidates_are_what_is_shipped_and_fits(kernel: str, dtype: torch.dtype) -> None:
    problem = Problem(8, 1024, (1536,), 4096)
    for architecture in (80, 90, 100):
        large = candidates(kernel, Target(architecture, 100, 227 * 1024), dtype, problem)
        assert set(large) == set(shipped(kernel, architecture, dtype))
        small = candidates(kernel, Target(architecture, 100, 99 * 1024), dtype, problem)
        assert small
        assert all(config.per_sm * config.shared_bytes(dtype.itemsize) <= 99 * 1024 for config in small)


def test_order_follows_the_problem() -> None:
    def first(rows: int, width: int, depth: int) -> TileConfig:
        return candidates("gather_matmul", _H200, torch.bfloat16, Problem(8, rows, (width,), depth))[0]

    large = first(8192, 8192, 8192)
    assert large.block_m * large.block_n == 128 * 256
    tiny = first(16, 128, 4096)
    assert tiny.block_m == 64
    # Little depth: the epilogue weighs more than traffic, and is hidden by another program.
    assert first(8192, 4096, 128).per_sm == 2


def test_specialized_configurations_are_hoppers_and_chosen_by_timing_alone() -> None:
    for architecture in (80, 90, 100):
        for kernel in get_args(Kernel):
            for dtype in DTYPES:
                configs = shipped(kernel, architecture, dtype)
                served = kernel == "gather_matmul" and architecture == 90 and dtype != torch.float32
                assert any(config.specialized for config in configs) == served
    for problem in (Problem(8, 1024, (768,), 4096), Problem(8, 8192, (8192,), 8192)):
        found = candidates("gather_matmul", _H200, torch.bfloat16, problem)
        assert [config.specialized for config in found] == [False] * 4 + [True] * 2
    assert {config.label for config in found[4:]} == {"128x256x64 cooperative", "128x128x64 pingpong"}
    for config in found[4:]:
        # Two groups and the warp that loads, whose group is never whole; a warp of a waiting kernel still fits beside.
        assert config.resident_warps == 12 and config.max_registers == 160


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("matmul", 90, torch.bfloat16), "kernel: expected one of .*, got 'matmul'"),
        (("gather_matmul", 70, torch.bfloat16), r"architecture: expected one of \[80, 90, 100\], got 70"),
        (("gather_matmul", 90, torch.float64), "dtype: expected one of .*, got torch.float64"),
    ],
)
def test_what_is_not_served(arguments: tuple[str, int, torch.dtype], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shipped(*arguments)
