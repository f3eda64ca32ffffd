"""Rounds of several runs taken together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pooled import main, pool

_KINDS = {
    "odysseus alone": ("alone", "", ""),
    "odysseus unfused symmetric": ("ours", "unfused", "symmetric"),
    "odysseus fused symmetric": ("ours", "fused", "symmetric"),
    "torch TP": ("peer", "", ""),
}


def _run(processor: str = "some", **samples: list[float]) -> dict[str, Any]:
    names = dict(zip(("alone", "unfused", "fused", "peer"), _KINDS, strict=True))
    variants = {
        name: {"kind": kind, "mode": mode, "transport": transport, "alone": "odysseus alone"}
        for name, (kind, mode, transport) in _KINDS.items()
    }
    row = {"sizes": "L8", "world": 2, "dtype": "float32", "variants": variants}
    row["samples_s"] = {names[name]: values for name, values in samples.items()}
    machine = {"processor": processor, "instructions": "AVX2"}
    return {"kind": "layer", "machine": machine, "arguments": {"threads": 1}, "rows": [row]}


FIRST = _run(alone=[1.0, 2.0], unfused=[2.0, 4.0], fused=[1.5, 2.0], peer=[3.0, 2.0])
SECOND = _run(alone=[4.0], fused=[8.0])


def test_ratios_are_within_rounds_and_of_all_runs() -> None:
    found = {(p.variant.split()[1], p.base): p for p in pool([FIRST, SECOND])}
    alone = found["fused", "odysseus alone"]
    assert (alone.low, alone.median, alone.high) == (1.25, 1.5, 1.75)  # of 1.5, 1.0 and 2.0
    assert (alone.rounds, alone.runs) == (3, 2)
    unfused = found["fused", "odysseus unfused symmetric"]
    assert (unfused.median, unfused.rounds, unfused.runs) == (0.625, 2, 1)
    assert found["fused", "torch TP"].median == 0.75
    assert set(found) == {("fused", base) for base in _KINDS if "fused symmetric" not in base or "un" in base} | {
        ("unfused", "odysseus alone")
    }


def test_what_cannot_be_taken_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="one machine"):
        pool([FIRST, _run("other", alone=[1.0], fused=[1.0])])
    with pytest.raises(ValueError, match="'model'"):
        pool([{**FIRST, "kind": "model"}])
    path = tmp_path / "run.json"
    path.write_text("{}")
    assert main([str(path)]) == 2
    assert "got None" in capsys.readouterr().err


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(SECOND))
    assert main([str(path)]) == 0
    assert "2.000" in capsys.readouterr().out
