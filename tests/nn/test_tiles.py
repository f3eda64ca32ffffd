"""Feed-forward networks in tiles: results as without, bytes elsewhere (test_tile_bytes.py), memory as the formulas."""

from __future__ import annotations

import pytest
import tiled_mlp_cases as cases
import torch
from tiled_mlp_cases import CLASSES, SPECS, Problem

import odysseus_kernels as ody
from odysseus_kernels.planner.formulas import LayerShape
from odysseus_kernels.planner.memory import feed_forward_peak
from odysseus_kernels.testing.spawn import RankPools


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("strategy", CLASSES)
def test_output_and_gradients(ranks: RankPools, strategy: str, kind: str) -> None:
    one = {"kind": kind, "strategy": strategy}
    problems = [
        Problem(**one),  # 16 rows in tiles of 3: a rest of 1
        Problem(**one, dtype=torch.float32, tile_rows=100),
        Problem(**one, checkpointed=True),
        Problem(**one, mode="unfused"),
        Problem(**one, transport="collective"),
        Problem(**one, frozen=("x",)),
        Problem(**one, frozen=("up_proj", "c_fc", "down_proj.bias")),
        Problem(**one, ring=2),
    ]
    ranks(2).run(cases.check, problems)


def test_sums_over_tiles_do_not_lose_16_bits(ranks: RankPools) -> None:
    problem = Problem(dtype=torch.bfloat16, tile_rows=8, tokens=64, width=48, intermediate=96)
    for found in ranks(2).run(cases.errors_in_16_bits, problem):
        for name, (tiled, whole) in found.items():
            assert tiled <= 1.5 * whole, f"{name}: {tiled:.2e} with tiles, {whole:.2e} without"


@pytest.mark.parametrize(
    ("strategy", "kind", "rows"),
    [
        ("odysseus", "gated", 128),
        ("odysseus", "plain", 64),
        ("tp_sp", "gated", 64),
        ("tp_sp", "plain", 128),
        ("tp", "gated", 64),
        # Large tiles: the moment of the activation's gradient is the highest.
        ("tp_sp", "gated", 256),
        ("tp", "gated", 256),
    ],
)
def test_peak_equals_formula(ranks: RankPools, strategy: str, kind: str, rows: int) -> None:
    tokens, width, intermediate = 1024, 96, 768
    problem = Problem(kind, strategy, rows, tokens, 1, width, intermediate, torch.float32)
    shape = LayerShape(width, intermediate, 4, 4, width // 4, gated=kind == "gated")
    expected = feed_forward_peak(shape, strategy, 2, tokens=2 * tokens, tile_rows=rows)
    for found in ranks(2).run(cases.peaks, problem):
        for phase, formula in expected.items():
            # Biases, which the formula leaves out, are less than a hundredth.
            assert formula <= found[phase] <= 1.01 * formula, f"{phase}: {found[phase]}, formula {formula}"


def test_whole_intermediate_never_exists(ranks: RankPools) -> None:
    """Eight times the tokens take as much more as input and output do."""
    small, large = (Problem("gated", "odysseus", 64, n, 1, 32, 512, torch.float32) for n in (512, 4096))
    for before, after in zip(ranks(2).run(cases.peaks, small), ranks(2).run(cases.peaks, large), strict=True):
        for phase in ("forward", "backward"):
            assert after[phase] - before[phase] == (4096 - 512) * 32 * 4


def test_second_derivatives_and_autocast(ranks: RankPools) -> None:
    ranks(2).run(cases.refused_derivative)
    ranks(2).run(cases.under_autocast)


@pytest.mark.parametrize("rows", [0, True, 2.0, "4"])
def test_bad_rows(rows: object) -> None:
    with pytest.raises(ValueError, match="tile_rows: expected a whole number of tokens, 1 or more, or None"):
        ody.OverlapConfig(tile_rows=rows)  # type: ignore[arg-type]
    assert ody.OverlapConfig.from_key(ody.OverlapConfig(tile_rows=7).key()).tile_rows == 7


def test_formula_refuses_what_it_does_not_know() -> None:
    shape = LayerShape(96, 768, 4, 4, 24)
    with pytest.raises(ValueError, match="element_size: expected 4 or 8, got 2"):
        feed_forward_peak(shape, "odysseus", 2, tokens=64, tile_rows=8, element_size=2)
    with pytest.raises(ValueError, match="tile_rows: expected 1 or more, got 0"):
        feed_forward_peak(shape, "odysseus", 2, tokens=64, tile_rows=0)
