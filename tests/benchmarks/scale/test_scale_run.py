"""``overlap.py --hosts 2``: options, limits, tables and plots from given rows, and one run on real hosts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import overlap
from benchmarks.layers.cases import LayerCase, make_layer_cases, make_variants
from benchmarks.scale import plot, report
from benchmarks.scale import run as scale_run
from benchmarks.scale.hosts import HostsError, check_machine

ROOT = Path(__file__).resolve().parents[3]
RATE = 80e6  # 10 MB/s


def _variant(name: str, kind: str, strategy: str, alone: str) -> dict[str, str]:
    return {"name": name, "kind": kind, "strategy": strategy, "alone": alone}


def _layer_row(tokens: int = 2048) -> dict[str, Any]:
    case = LayerCase("given", "layer", tokens, 512, 1408, 8, 8)
    fused, peer = "tp_sp fused collective", "torch SP-TP"
    variants = {
        "tp_sp alone": _variant("tp_sp alone", "alone", "tp_sp", "tp_sp alone"),
        fused: _variant(fused, "ours", "tp_sp", "tp_sp alone"),
        peer: _variant(peer, "peer", "", "tp_sp alone"),
    }
    return {
        "label": "given",
        "sizes": case.sizes,
        "tokens": tokens,
        "hidden": 512,
        "variants": variants,
        "refused": {"tp unfused collective": "why not"},
        "wrong": [],
        "errors": {fused: {"output": 1e-7}, peer: {"output": 2e-7}},
        "bytes": {fused: {"recorded": {"forward tp_sp all_gather": 19_000_000}, "beside": {"x": 1_000_000}}},
        "peer_bytes": {peer: 15_000_000},
        "interface_bytes": {fused: 20_500_000, peer: 24_000_000},
        "samples_s": {"tp_sp alone": [1.0, 1.0, 4.0], fused: [3.0, 2.5, 4.0], peer: [4.0, 4.0, 8.0]},
    }


def _operator_row() -> dict[str, Any]:
    times = {"gemm": [0.1], "unfused collective": [0.5], "communication collective": [0.4], "torch": [0.6]}
    names = {"operator": "zero3_linear", "label": "quick", "shape": "L8", "part": "forward", "wrong": ["torch"]}
    return {
        **names,
        "errors": {"torch": {"output": 0.5}},
        "bytes": {"unfused collective": 2_000_000},
        "samples_s": times,
    }


def _parse(*others: str) -> Any:
    return overlap.parse(["--hosts", "2", *others])


def test_limit_is_the_longer_of_compute_and_wire_in_each_round() -> None:
    fused, peer = report.summarize(_layer_row(), RATE)["entries"]
    assert (fused["bytes"], fused["wire_s"], fused["alone_s"]) == (20_000_000, 2.0, 1.0)
    assert fused["limit_s"] == 2.0
    assert fused["over_limit"] == 1.25  # of 3/2, 2.5/2 and 4/4
    assert (peer["bytes"], peer["interface_bytes"]) == (15_000_000, 24_000_000)
    assert (peer["limit_s"], peer["over_limit"]) == (1.5, 8 / 3)  # of 4/1.5, 4/1.5 and 8/4
    del (row := _layer_row())["samples_s"]["tp_sp alone"]
    assert not any("limit_s" in entry for entry in report.summarize(row, RATE)["entries"])  # half of it is unknown
    unfused, alone, _ = report.summarize(_operator_row(), RATE)["entries"]
    assert (unfused["wire_s"], unfused["over_limit"]) == (0.2, 2.5)
    assert (alone["alone_s"], alone["over_limit"]) == (None, 2.0)


def test_tables_and_plots_say_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = [json.dumps([_layer_row(2048), _layer_row(4096)]), json.dumps([_layer_row(2048)])]

    def ask(rate: float, command: list[str], **others: Any) -> tuple[list[int], str]:
        if "benchmarks.scale.rate" in command:
            return [0, 0], "71e9\n70e9\n"
        assert command[1:3] == ["--hosts", "2"]
        return [0, 0], replies.pop(0)

    monkeypatch.setattr(scale_run, "ask_hosts", ask)
    monkeypatch.setattr(scale_run, "check_machine", lambda: None)
    arguments = _parse("--level", "layer", "--link", "h100-nvlink@8", "1000")
    document = scale_run.run(arguments, Path("overlap.py"), overlap.describe_run(arguments, 2))
    text = capsys.readouterr().out
    assert text.count("scale model of h100-nvlink@8, 2 hosts (91 Mb/s): layer given, L2048 d512") == 1
    assert "scale model of 1000 Mb/s, 2 hosts (1000 Mb/s)" in text
    assert "(70.0 GFLOP/s / 791 TFLOP/s)" in text  # the slower host's rate
    assert "tp unfused collective: why not" in text
    titles = []
    monkeypatch.setattr(plot.plt.Axes, "set_title", lambda self, title, **others: titles.append(title))
    (path, image) = overlap.write(document, tmp_path)
    assert image.stat().st_size > 10_000
    assert json.loads(path.read_text())["parts"][0]["label"] == "h100-nvlink@8"
    assert all("scale model" in title and "2 hosts" in title for title in titles)
    assert sum("over the length" in title for title in titles) == 1
    assert sum("over the link's rate" in title for title in titles) == 1


def test_a_rank_that_failed_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scale_run, "ask_hosts", lambda *a, **k: ([0, 3], ""))
    monkeypatch.setattr(scale_run, "check_machine", lambda: None)
    monkeypatch.setattr(sys, "argv", ["overlap.py", "--hosts", "2", "--link", "80", "--quick"])
    assert overlap.main() == 2
    assert "scale model of 80 Mb/s, 2 hosts: ranks ended with [0, 3]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--hosts", "2"], "--hosts: expected --link beside it, such as --link"),
        (["--hosts", "2", "--link", "h800@8"], "expected one of a100-nvlink, h100-nvlink"),
        (["--hosts", "2", "--link", "12x"], "rate: expected Mb/s"),
        (["--hosts", "3", "--link", "100"], "invalid choice: 3"),
        (["--link", "h100-nvlink@8"], "--link h100-nvlink@8: expected --hosts 2 beside it"),
        (["--link", "120"], "--link 120: expected --hosts 2 or --device cuda beside it"),
        (["--measure", "links"], "--measure: expected --device cuda beside it"),
        (["--hosts", "2", "--link", "100", "--threads", "2"], "expected --threads 1, got 2"),
        (["--hosts", "2", "--link", "100", "--level", "model"], "expected --level operator or layer, got model"),
        (["--hosts", "2", "--link", "100", "--transports", "symmetric"], "hosts share no memory, got symmetric"),
        (["--level", "layer", "--shapes", "2048"], "expected tokens x hidden size, such as 2048x512"),
        (["--level", "layer", "--shapes", "2048x512x0"], "or with a number of layers behind it, such as 2048x512x2"),
        (["--shapes", "2048x512"], "expected --level layer or model beside them"),
        (["--gathered", "save"], "expected --level layer or model beside them"),
        (["--level", "layer", "--pipeline", "1"], "--pipeline: expected 2 to 64 pieces, got 1"),
    ),
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        overlap.parse(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_and_variants_of_hosts() -> None:
    arguments = _parse("--link", "100", "--level", "layer", "--shapes", "2048x512", "8192x1024")
    cases = make_layer_cases("layer", 2, shapes=arguments.shapes)
    assert [(case.tokens, case.hidden, case.heads) for case in cases] == [(2048, 512, 8), (8192, 1024, 16)]
    assert [case.layers for case in cases] == [1, 1]
    variants = make_variants(("tp_sp", "ulysses", "odysseus"), arguments.transports, pipeline=arguments.pipeline)
    pipelined = {variant.name: variant.pipeline for variant in variants if variant.pipeline is not None}
    assert pipelined == {f"{strategy} pipelined collective": 8 for strategy in ("tp_sp", "ulysses", "odysseus")}
    assert not any("symmetric" in variant.name for variant in variants)


@pytest.mark.without_ranks
def test_layers_behind_one_another() -> None:
    arguments = _parse("--link", "100", "--level", "layer", "--shapes", "2048x512x3", "2048x512")
    three, one = make_layer_cases("layer", 2, shapes=arguments.shapes)
    assert (three.layers, three.sizes, one.sizes) == (3, "L2048 d512 i1408 MHA x3", "L2048 d512 i1408 MHA")
    assert three.flops(2) == 3 * one.flops(2)
    (model,) = make_layer_cases("model", 2, shapes=arguments.shapes[1:])
    assert model.layers == 2


@pytest.mark.without_ranks
def test_a_run_on_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        check_machine()
    except HostsError as error:
        pytest.skip(str(error))
    options = ["--hosts", "2", "--link", "400mbit", "--quick", "--repeats", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["overlap.py", *options, "--cases", "all_gather_linear Llama.* forward$"])
    assert overlap.main() == 0
    assert "scale model of 400 Mb/s, 2 hosts" in capsys.readouterr().out
    (path,) = tmp_path.glob("scale-*.json")
    (row,) = json.loads(path.read_text())["parts"][0]["rows"]
    entries = {entry["name"]: entry for entry in row["entries"]}
    assert set(entries) == {"unfused collective", "fused collective", "communication collective", "torch"}
    assert row["wrong"] == []
    assert all(entry["wire_s"] > 0 and entry["over_limit"] > 0 for entry in entries.values())
