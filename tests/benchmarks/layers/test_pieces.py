"""The cost of pieces: right numbers, both phases, and what is said of mistakes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.layers import pieces
from benchmarks.layers.pieces import PiecesCase, measure_pieces


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_pieces_are_the_whole(dtype: torch.dtype) -> None:
    samples = measure_pieces(PiecesCase(96, 4, 2, 16, 5, dtype), rounds=2)
    assert set(samples) == {f"{phase} {how}" for phase in ("forward", "backward") for how in ("whole", "pieces")}
    assert all(len(times) == 2 and min(times) > 0 for times in samples.values())


def test_a_wrong_piece_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pieces.PrefixAttention.backward

    def wrong(self: object, start: int, stop: int, *rest: torch.Tensor) -> torch.Tensor:
        return right(self, start, stop, *rest) * (1 if start else 1.01)  # type: ignore[arg-type]

    monkeypatch.setattr(pieces.PrefixAttention, "backward", wrong)
    with pytest.raises(ArithmeticError, match="backward: expected the whole's numbers"):
        measure_pieces(PiecesCase(96, 4, 2, 16, 5), rounds=1)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--tokens", "64", "--heads", "2", "--head-dim", "16", "--rounds", "1"]
    assert pieces.main([*small, "--pieces", "2", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" s in ")[1].split()[0] for line in lines] == ["2", "2", "4", "4"]
    assert pieces.main([*small, "--pieces", "65"]) == 1
    assert "expected 1 to 64 pieces" in capsys.readouterr().out
