"""From samples of layers to figures, verdicts, tables, files and plots."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import overlap
from benchmarks.common.cases import CONTRACT
from benchmarks.layers import plot as layer_plot
from benchmarks.layers import report as layer_report
from benchmarks.layers.cases import FSDP_ULYSSES, TORCH_TP_SP, LayerCase, make_variants

CASE = LayerCase(CONTRACT, "layer", 4096, 512, 1408, 8, 8)
TIMES = {
    "odysseus alone": 100.0,
    "odysseus unfused symmetric": 120.0,
    "odysseus fused symmetric": 105.0,
    TORCH_TP_SP: 140.0,
    FSDP_ULYSSES: 104.0,
}


def _row(*, wrong: tuple[str, ...] = (), equal: bool = True, saved: int = 1000) -> dict[str, Any]:
    variants = {v.name: v for v in make_variants(("odysseus",), ("symmetric",), peers=(TORCH_TP_SP, FSDP_ULYSSES))}
    ours = [name for name, v in variants.items() if v.kind == "ours"]
    sent = {"forward all_gather_linear all_gather": 3 << 20, "forward zero3_linear all_gather": 1 << 20}
    memory = {"saved": saved, "peak": 1500, "gradients": 10, "reserved": 7}
    return {
        **dataclasses.asdict(CASE),
        "sizes": CASE.sizes,
        "flops_per_rank": CASE.flops(2),
        "world": 2,
        "variants": {name: {**dataclasses.asdict(v), "alone": v.alone} for name, v in variants.items()},
        "refused": {"tp fused symmetric": "expected heads that 2 ranks divide"},
        "truth": "float64",
        "limits": {"output": 1e-5, "gradient": 1e-4},
        "loss": None,
        "errors": {name: {"output": 1e-7} for name in variants if name != "odysseus alone"},
        "wrong": list(wrong),
        "bytes": {name: {"recorded": sent, "formula": sent, "beside": {}, "equal": equal} for name in ours},
        "memory": {name: {**memory, **({"formula": {"all": 1000}} if name in ours else {})} for name in variants},
        "checks": {n: {"descriptor": 2e-4, "comparison": 1e-4, "step": 1e-5} for n in ours if n not in wrong},
        "samples_s": {name: [t / 1e3, t / 1e3, t / 0.9e3] for name, t in TIMES.items() if name not in wrong},
    }


def _document(*rows: dict[str, Any], arguments: tuple[str, ...] = ("--level", "layer")) -> dict[str, Any]:
    return overlap.make_document(overlap.parse(arguments), 2, rows)


def _print(document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    out = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **options: Console(file=out, **options))
    overlap.print_document(document)
    return out.getvalue()


def test_figures() -> None:
    figures = layer_report.summarize_layer({**_row(), "dtype": "float32"})["figures"]
    fused = figures["odysseus fused symmetric"]
    assert fused["over_alone"] == pytest.approx(1.05)
    assert fused["exposed_s"] == pytest.approx(0.005)
    assert fused["over_unfused"] == pytest.approx(0.875)
    assert fused["hidden"] == pytest.approx(0.75)
    assert fused["tokens_per_s"] == pytest.approx(4096 / 0.105)
    # No compute alone of "tp_sp" was measured, which the peer's ratio would be to.
    assert "over_alone" not in figures[TORCH_TP_SP]


def test_verdicts() -> None:
    verdicts = {v["what"]: v for v in _document(_row())["targets"]}
    assert verdicts["odysseus fused symmetric / odysseus alone"]["reached"]
    assert verdicts[f"odysseus fused symmetric / {TORCH_TP_SP}"]["reached"]
    assert not verdicts[f"odysseus fused symmetric / {FSDP_ULYSSES}"]["reached"]
    assert verdicts["every odysseus: fused / unfused"]["reached"]
    assert verdicts["bytes that differ from the formula, variants"]["measured"] == 0
    assert verdicts["saved for backward: distance from the formula"]["reached"]
    checks = verdicts["descriptor and checks / step"]
    assert checks["reached"]
    assert checks["measured"] == pytest.approx(0.31 / 105)
    assert len(verdicts) == 7  # nothing is said about variants and cases that were not run

    slow = _row()
    slow["variants"]["odysseus auto symmetric"] = {**slow["variants"]["odysseus fused symmetric"], "mode": "auto"}
    slow["samples_s"]["odysseus auto symmetric"] = [0.126] * 3
    verdicts = {v["what"]: v for v in _document(slow)["targets"]}
    assert verdicts["every odysseus: fused / unfused"]["reached"]
    auto = verdicts["every odysseus: auto / unfused"]
    assert auto["measured"] == pytest.approx(1.05) and auto["missed"] == 1

    verdicts = {v["what"]: v for v in _document(_row(equal=False, saved=1011))["targets"]}
    assert verdicts["bytes that differ from the formula, variants"]["measured"] == 2
    assert not verdicts["saved for backward: distance from the formula"]["reached"]


def test_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _print(_document(_row()), monkeypatch)
    assert "…" not in text  # nothing is cut off
    assert "Must reach" in text
    assert "105.0±6%" in text
    assert " 310 " in text  # microseconds of the checks
    assert "0.00295 (limit 0.005)" in text
    assert "expected heads that 2 ranks divide" in text  # a strategy that refused says why
    assert "ring-flash-attn: not here: needs CUDA" in text
    published = text.index("Odysseus+ZeRO3  ")
    assert "odysseus fused symmetric" in text[published:]  # the measured row under the published one
    assert "counts forward only" in text
    assert "≠" not in text
    text = _print(_document(_row(equal=False)), monkeypatch)
    assert "≠" in text


def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = _document(_row(wrong=("odysseus fused symmetric",)))
    assert "odysseus fused symmetric" not in document["rows"][0]["figures"]
    text = _print(document, monkeypatch)
    assert "WRONG" in text
    assert "no figure: wrong result" in text
    assert overlap.write(document, tmp_path)[1].exists()


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, image = overlap.write(_document(_row()), tmp_path)
    assert path.name.startswith("layer-")
    read = json.loads(path.read_text())
    assert read["rows"][0]["samples_s"][TORCH_TP_SP][0] == 0.14
    assert read["arguments"]["level"] == "layer"
    assert image.read_bytes().startswith(b"\x89PNG")
    target = tmp_path / "again.png"
    monkeypatch.setattr("sys.argv", ["layer_plot.py", str(path), "-o", str(target)])
    assert layer_plot.main() == 0
    assert target.stat().st_size > 10_000
    path.write_text("{}")
    assert layer_plot.main() == 1


def test_other_settings_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _print(_document(_row(), arguments=("--level", "layer", "--dtype", "bfloat16")), monkeypatch)
    assert "For orientation" in text


@pytest.mark.parametrize(
    "arguments",
    (
        ("--ring", "2"),
        ("--level", "layer", "--ring", "3"),
        ("--level", "layer", "--device", "cuda"),
        ("--level", "model", "--memory"),
        ("--level", "other"),
    ),
)
def test_options_that_do_not_go_together(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        overlap.parse(arguments)


def test_unknown_strategy() -> None:
    arguments = overlap.parse(["--level", "layer", "--strategies", "other"])
    with pytest.raises(ValueError, match="--strategies: expected some of"):
        overlap.make_settings(arguments, 2)
    assert overlap.parse(["--level", "layer"]).repeats == 5
