"""From samples to tables, verdicts, files and plots."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import overlap
from benchmarks.common import machine
from benchmarks.common.cases import CONTRACT
from benchmarks.operators import plot, report
from benchmarks.operators.cases import Case, make_cases
from benchmarks.operators.predictions import PREDICTED, predicted_seconds

_TIMES = {
    "gemm": 10.0,
    "unfused symmetric": 13.0,
    "fused symmetric": 10.5,
    "communication symmetric": 3.0,
    "unfused collective": 15.0,
    "fused collective": 16.5,
    "communication collective": 5.0,
    "torch": 15.0,
}


def _row(*, wrong: tuple[str, ...] = (), error: float = 1e-7, **changes: Any) -> dict[str, Any]:
    samples = {name: [t / 1e3, t / 1e3, t / 0.9e3] for name, t in _TIMES.items() if name not in wrong}
    checked = [name for name in _TIMES if name != "gemm" and not name.startswith("comm")]
    return {
        "label": CONTRACT,
        "operator": "all_gather_linear",
        "tokens": 8192,
        "inner": 1024,
        "outer": (768,),
        "backward": False,
        "part": "forward",
        "shape": "L8192 1024>768",
        "tolerance": 1e-5,
        "errors": {name: {"output": error if name in wrong else 1e-7} for name in checked},
        "wrong": list(wrong),
        "samples_s": samples,
        **changes,
    }


def _document(*rows: dict[str, Any]) -> dict[str, Any]:
    return overlap.make_document(overlap.parse([]), 2, rows)


def _print(document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    out = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **options: Console(file=out, **options))
    overlap.print_document(document)
    return out.getvalue()


def test_figures_of_a_row() -> None:
    row = report.summarize(_row())
    assert row["medians_s"]["gemm"] == 0.01
    assert row["ratios"]["fused symmetric / gemm"]["paired"] == pytest.approx(1.05)
    assert row["hidden"]["symmetric"] == pytest.approx(2.5 / 3)
    assert row["hidden"]["collective"] == pytest.approx(-1.5 / 5)
    assert not any("communication" in name for name in row["ratios"])


def test_verdicts() -> None:
    verdicts = {v["what"]: v for v in report.judge([report.summarize(_row())])}
    assert verdicts["all_gather_linear forward: fused symmetric / gemm"]["reached"]
    assert verdicts["all_gather_linear forward: fused symmetric / unfused collective"]["reached"]
    assert verdicts["every row: fused symmetric / unfused symmetric"]["reached"]
    slower = verdicts["every row: fused collective / unfused collective"]
    assert not slower["reached"]
    assert slower["rows_missed"] == 1
    assert slower["measured"] == pytest.approx(1.1)
    assert len(verdicts) == 4  # nothing is said about rows that were not run


def test_rows_of_devices_have_predictions_and_a_host_that_keeps_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted = {"gemm": 8e-3, "communication symmetric": 3e-3, "unfused symmetric": 13e-3, "fused symmetric": 21e-3}
    ahead = _row(host_s={"fused symmetric": 5.25e-3, "unfused symmetric": 1.0}, predicted_s=predicted)
    late = _row(label="late", host_s={"fused symmetric": 12.6e-3}, predicted_s=predicted)
    document = _document(ahead, late)
    assert [row["host / fused"] for row in document["rows"]] == [pytest.approx(0.5), pytest.approx(1.2)]
    (verdict,) = [verdict for verdict in document["targets"] if "host" in verdict["what"]]
    assert verdict["what"] == "every row: host / fused symmetric" and verdict["measured"] == pytest.approx(1.2)
    assert (verdict["limit"], verdict["reached"], verdict["rows_missed"]) == (1.0, False, 1)
    text = _print(document, monkeypatch)
    for part in ("host and predictions, ms", "5.250", "0.50", "10.000 (1.25)", "3.000 (1.00)", "10.500 (0.50)"):
        assert part in text, text
    wrong = _document(_row(wrong=("fused symmetric",), host_s={"fused symmetric": 1e-3}, predicted_s=predicted))
    assert wrong["rows"][0]["host / fused"] is None
    assert "host and predictions" in _print(wrong, monkeypatch)
    assert "host and predictions" not in _print(_document(_row(host_s={}, predicted_s={})), monkeypatch)


@pytest.mark.parametrize("case", make_cases(8), ids=lambda case: case.name)
def test_every_row_of_devices_has_a_prediction(case: Case) -> None:
    found = predicted_seconds(case, 8, "bfloat16", "NVIDIA H200")
    assert tuple(found) == PREDICTED
    gemm, communication, unfused, fused = found.values()
    assert gemm == pytest.approx(case.flops(8) / 791.2e12)  # 0.8 of the data sheet's rate
    # Seven chunks for each gather and each scatter: one forward, and backward what autograd adds.
    rows, outer = case.tokens // 8, sum(case.outer)
    chunk = {"all_gather_linear": rows * case.inner, "linear_reduce_scatter": rows * outer}.get(
        case.operator, outer // 8 * case.inner
    )
    moved = (2 if case.operator == "linear_reduce_scatter" else 3) if case.backward else 1
    assert communication == pytest.approx(7 * 2 * chunk * moved / 360e9)  # 0.8 of 450 GB/s
    assert unfused > gemm + communication and fused > max(gemm, communication)


def test_without_rich_and_matplotlib_the_figures_are_in_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overlap.importlib.util, "find_spec", lambda name: None)
    document = _document(_row())
    overlap.print_document(document)
    assert "rich is not installed: no tables" in capsys.readouterr().out
    (path,) = overlap.write(document, tmp_path)
    assert "matplotlib is not installed: no plot" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"][0]["wrong"] == []


def test_wrong_result_has_no_time_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = _document(_row(wrong=("fused symmetric",), error=math.nan))
    row = document["rows"][0]
    assert "fused symmetric" not in row["samples_s"]
    assert "fused symmetric" not in row["medians_s"]
    assert not any("fused symmetric" in name.split(" / ") for name in row["ratios"])
    assert "symmetric" not in row["hidden"]
    verdict = document["targets"][0]
    assert verdict["measured"] is None
    assert not verdict["reached"]
    text = _print(document, monkeypatch)
    assert "WRONG fused symmetric nan" in text
    assert "no figure: wrong result" in text
    assert plot.draw(document, tmp_path / "plot.png") is None  # no bar, no failure


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    document = _document(_row())
    assert "busy" in _print({**document, "load_before": 3.5}, monkeypatch)
    assert "busy" not in _print({**document, "load_before": 0.1}, monkeypatch)


def test_tables_are_complete_and_of_fixed_width(monkeypatch: pytest.MonkeyPatch) -> None:
    long = _row(label="Llama-2-7B/8 down", operator="zero3_linear", backward=True, part="forward+backward")
    text = _print(_document(_row(), long), monkeypatch)
    assert "…" not in text  # nothing is cut off
    assert max(len(line) for line in text.splitlines()) <= 140
    assert "10.0±6%" in text
    assert "Llama-2-7B/8 down fwd+bwd" in text
    assert "Must reach" in text


def test_json_has_everything_and_reads_back(tmp_path: Path) -> None:
    document = _document(_row(wrong=("torch",), error=math.inf))
    path, image = overlap.write(document, tmp_path / "new")
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {"schema", "kind", "date", "machine", "versions", "commit", "arguments", "rows", "targets"} <= set(read)
    assert {"processor", "cores", "memory_gib"} <= set(read["machine"])
    assert {"python", "torch", "odysseus_kernels"} <= set(read["versions"])
    assert read["rows"][0]["samples_s"]["gemm"] == [0.01, 0.01, 10 / 900]
    assert read["rows"][0]["errors"]["torch"]["output"] == "inf"
    assert image.read_bytes().startswith(b"\x89PNG")


def test_plot_as_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, image = overlap.write(_document(_row(), _row(backward=True, part="forward+backward")), tmp_path)
    image.unlink()
    target = tmp_path / "again.png"
    monkeypatch.setattr("sys.argv", ["plot.py", str(path), "-o", str(target)])
    assert plot.main() == 0
    assert target.stat().st_size > 10_000
    path.write_text("{}")
    assert plot.main() == 1


def test_memory_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(extra: int, largest: int) -> dict[str, Any]:
        measured = {"private_peak": extra, "largest_allocation": largest, "reserved": 0, "extra": extra}
        shape = {"chunk_bytes": 1 << 20, "gathered_bytes": 4 << 20, "shape": "L8 2>4", "backward": False}
        names = {"operator": "zero3_linear", "label": CONTRACT, "part": "forward"}
        return {**names, **shape, "bytes": {"fused symmetric": measured}}

    rows = [row(2 << 20, 1 << 20), row((2 << 20) + 1, 1 << 20), row(4 << 20, 4 << 20)]
    verdicts = report.judge_memory(rows)
    assert [v["reached"] for v in verdicts] == [True, False, False]
    assert [v["holds_weight_whole"] for v in verdicts] == [False, False, True]
    text = _print(overlap.make_document(overlap.parse(["--memory"]), 2, rows), monkeypatch)
    assert "holds the weight whole" in text


def test_arguments() -> None:
    assert overlap.parse([]).repeats == 9
    assert overlap.parse(["--quick"]).repeats == 5
    assert overlap.parse(["--full"]).size == "full"
    with pytest.raises(SystemExit):
        overlap.parse(["--ranks", "0"])
    with pytest.raises(SystemExit):
        overlap.parse(["--quick", "--full"])


def test_machine_does_not_name_the_host() -> None:
    import platform

    described = json.dumps(machine.describe_machine("cpu"))
    assert platform.node() not in described or len(platform.node()) < 4
    assert machine.machine_tag("cpu").startswith("cpu-")
    assert machine.commit()
