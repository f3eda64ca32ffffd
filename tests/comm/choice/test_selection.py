"""``mode="auto"``: measured where asked for, visible, and refused where a mode cannot be had."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import selection_cases
import torch

import odysseus_kernels as ody
from odysseus_kernels import _ext
from odysseus_kernels.comm import groups
from odysseus_kernels.comm.choice.selection import Phase, Selection
from odysseus_kernels.testing.spawn import RankPool

PHASES = [
    f"{operator} {phase}"
    for operator in ("all_gather_linear", "linear_reduce_scatter", "zero3_linear")
    for phase in ("forward", "backward")
]


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_modes_are_measured_once_and_kept(tmp_path: Path, transport: str) -> None:
    """The second run of the program finds what the first has measured; timing is neither counted nor seen."""
    for how in ("measured", "cached"):
        with RankPool(2, timeout=60, environment={"ODYSSEUS_CACHE_DIR": str(tmp_path)}) as pool:
            for made, counted, table in pool.run(selection_cases.measured, transport):
                assert made == [f"{phase} {how}" for phase in PHASES]
                assert counted == [0, 0]
                assert "unfused" in table and "fused" in table and how in table
    assert [path.suffix for path in sorted(tmp_path.iterdir())].count(".json") == 1


def test_modes_are_predicted_alike(ranks: Any) -> None:
    one, other = ranks(2).run(selection_cases.modelled)
    assert one == other and len(one) >= len(PHASES)


def test_tiles_need_a_gpu(ranks: Any) -> None:
    for messages in ranks(2).run(selection_cases.refused):
        assert len(messages) == 6
        assert all("expected mode" in message and "CUDA tensors" in message for message in messages)


def test_tensors_of_a_gpu_without_one(ranks: Any) -> None:
    """Where the CUDA part is built there is no GPU; where it is not, the error says how to build it."""
    for messages in ranks(2).run(selection_cases.no_cuda):
        assert len(messages) == 4
        if not _ext.has_cuda():
            assert all(m.startswith("ExtensionNotBuiltError") and "pip install -e ." in m for m in messages[:2])
        assert "expected cpu tensors as in earlier calls" in messages[2]
        assert "expected CPU or CUDA tensors, got meta" in messages[3]


def test_a_build_without_cuda_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "has_cuda", lambda: False)
    reason = _ext.why_no_cuda()
    assert "pip install -e ." in reason and "nvcc" in reason and "ODYSSEUS_BUILD_CUDA" in reason


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="tune: expected one of"):
        ody.OverlapConfig(tune="guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tile_bytes: expected a whole number"):
        ody.OverlapConfig(tile_bytes=-1)
    config = ody.OverlapConfig(mode="tiles", tune="model", tile_bytes=5, chunks_per_rank=3)
    assert ody.OverlapConfig.from_key(config.key()) == config
    assert groups.explain.__doc__


def test_what_a_switch_makes_is_timed_apart() -> None:
    """A mode that was fastest from rank to rank need not be through the switch; what was kept before stays valid."""
    selection = Selection(torch.device("cpu"), lambda text: [text])
    phase = Phase("linear_reduce_scatter", "forward", "x [8]", "8", torch.bfloat16, 1000)
    transport: Any = SimpleNamespace(name="symmetric", world=2)
    keys = [
        selection._key(transport, ody.OverlapConfig(), dataclasses.replace(phase, switched=switched))
        for switched in (False, True)
    ]
    assert keys[0] != keys[1] and "switch" not in keys[0].settings
