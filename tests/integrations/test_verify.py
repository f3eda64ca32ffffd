"""What ``verify`` says of models that are right, and of models with a mistake that was put in on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from family_cases import Case
from verify_cases import FAULTS, seeded, sound

from odysseus_kernels import cli
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.integrations.verify import Report
from odysseus_kernels.integrations.verify.models import copy_of
from odysseus_kernels.strategies import STRATEGIES

DROPOUT = (("attention_dropout", 0.2),)
SOUND = [
    (Case(kv_heads=4, packed=True, length=23), 1, {}),
    (Case(family="qwen2_sliding", kv_heads=4, padding_mask=True), 2, {"layers": 1}),
    (Case(family="mixtral", length=23), 1, {}),
    (Case(family="starcoder2", changes=DROPOUT), 2, {"checkpointing": True, "layer_by_layer": True}),
    (Case(family="qwen3", dtype=torch.bfloat16), 1, {"dtype": None}),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_right_passes(ranks, strategy):
    for case, ring, settings in SOUND:
        texts = ranks(2).run(sound, case, strategy, ring, settings)
        assert len(set(texts)) == 1, "all ranks have the leader's report"
        report = Report.from_json(texts[0])
        assert report.passed, report.table()
        outcomes = {finding.check: finding.outcome for finding in report.findings}
        assert outcomes["layers"] == outcomes["gradients"] == outcomes["checkpoint in one process"] == "passed"
        assert report.gradients and (outcomes["bytes"] == "passed") == (case.family != "mixtral")
        assert (outcomes["recomputation"] == "passed") == ("checkpointing" in settings)
        assert ("dropout (8 seeds)" in outcomes) == (case.changes == DROPOUT)


@pytest.mark.parametrize(
    "case",
    (
        Case(family="qwen2_sliding", kv_heads=4, length=23, packed=True, changes=(("sliding_window", 3),)),
        Case(family="mistral", kv_heads=4, padding_mask=True, changes=(("sliding_window", 3),)),
    ),
    ids=("documents, and a window in one of two layers", "padding and a window"),
)
def test_bytes_of_a_ring_whose_ranks_do_not_all_see_each_other(ranks, case):
    report = Report.from_json(ranks(4).run(sound, case, "tsp", 1, {})[0])
    assert report.passed, report.table()
    assert {finding.check: finding.outcome for finding in report.findings}["bytes"] == "passed"


@pytest.mark.parametrize(("ring", "strategy"), ((1, "odysseus"), (2, "tp_sp"), (1, "ulysses")))
def test_pipelined_attention_passes(ranks, ring, strategy):
    case, config = Case(kv_heads=4, packed=True, length=23), OverlapConfig(pipeline=4, timeout_s=60)
    report = Report.from_json(ranks(2 * ring).run(sound, case, strategy, ring, {"config": config})[0])
    assert report.passed, report.table()
    assert {finding.check: finding.outcome for finding in report.findings}["bytes"] == "passed"


@pytest.fixture(scope="module")
def reports(ranks):
    """One report for each fault."""
    names = list(FAULTS)
    return dict(zip(names, map(Report.from_json, ranks(2).run(seeded, names)[0]), strict=True))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_and_named(reports, name):
    fault, report = FAULTS[name], reports[name]
    assert not report.passed
    first = report.failures[0]
    assert first.check == fault.check, report.table()
    for text in fault.says:
        assert text in f"{first.where} {first.hint}", report.table()
    with pytest.raises(AssertionError, match="checks FAILED"):
        report.raise_on_failure()


def test_fewer_layers_are_a_copy():
    model = Case(family="qwen2_sliding").model()
    short = copy_of(model, 1, torch.float64)
    assert len(short.model.layers) == 1 and len(model.model.layers) == 2
    assert short.config.num_hidden_layers == 1 and model.config.num_hidden_layers == 2
    assert short.dtype == torch.float64 and model.dtype == torch.float32
    with pytest.raises(ValueError, match="layers: expected at least 1"):
        copy_of(model, 0, None)


SCRIPT = """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def build():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                             num_attention_heads=4, num_key_value_heads=2))
        ids = torch.randint(64, (1, 17))
        return model, {"input_ids": ids, "labels": ids}

    def loses_labels():
        from odysseus_kernels import shard_sequence
        model, batch = build()
        def cut(batch, mesh, strategy):
            return shard_sequence({**batch, "labels": batch["labels"].roll(1, 1)}, mesh, strategy)
        return {"model": model, "batch": batch, "cut": cut}

    def nothing():
        return None
"""


def _command(folder, *arguments):
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "odysseus_kernels", "verify", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.without_ranks
def test_command_line(tmp_path):
    done = _command(tmp_path, "script.py:build", "--json", "report.json", "--strategy", "ulysses")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("every check passed") == 1
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is True


@pytest.mark.without_ranks
def test_command_line_fails_with_the_check(tmp_path):
    done = _command(tmp_path, "script.py:loses_labels")
    assert done.returncode == cli.FAILED, done.stdout + done.stderr
    assert "batch: shift_labels" in done.stdout


@pytest.mark.parametrize(
    ("build", "says"),
    [
        ("script.py:missing", "expected a function missing in script.py"),
        ("absent.py:build", "a file that exists"),
        ("build", "expected script.py:function"),
    ],
)
def test_command_line_says_what_is_wrong_before_it_starts_ranks(tmp_path, monkeypatch, capsys, build, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["verify", build]) == cli.NOT_COMPARED
    assert says in capsys.readouterr().err


def test_what_a_script_returns(tmp_path):
    (tmp_path / "built.py").write_text(textwrap.dedent(SCRIPT))
    assert {"model", "batch"} == cli._built(f"{tmp_path}/built.py:build").keys()
    with pytest.raises(ValueError, match=r"to return \(model, batch\) or a dictionary, got NoneType"):
        cli._built(f"{tmp_path}/built.py:nothing")
