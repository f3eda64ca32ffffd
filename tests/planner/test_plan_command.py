"""``python -m odysseus_kernels plan``: exit statuses, the table, JSON, and the picture."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from odysseus_kernels import cli
from odysseus_kernels.planner.formulas import STRATEGIES
from odysseus_kernels.planner.planning.map import best_by_size
from odysseus_kernels.planner.planning.plan import plan
from odysseus_kernels.planner.planning.table import print_plan

GIVEN = ["plan", "--model", "llama-3.1-8b", "--gpus", "8", "--seq", "65536"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GIVEN, "--checkpointing", "--hardware", "h200-nvlink"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "llama-3.1-8b (8.03 B weights)",
        "8 x h200-nvlink (141 GB each)",
        "more splits: --all",
        "times as fast",
        "sends on each rank: all_gather",
        "H200 SXM's data sheet",
        "within the model's error",
    ):
        assert text in " ".join(printed.split()), text


def test_all_splits_and_what_was_refused() -> None:
    found = plan("qwen2.5-7b", 12, 1 << 15, checkpointing=True)
    shown, everything = (io.StringIO() for _ in range(2))
    print_plan(found, Console(file=shown, width=250))
    print_plan(found, Console(file=everything, width=250), everything=True)
    assert "left out (ulysses): ulysses seq 1 x ring 12: sizes: 12 ranks do not divide" in shown.getvalue()
    for reasons in found.refused.values():
        for reason in reasons:
            assert reason in everything.getvalue()
    words = [line.split() for line in everything.getvalue().splitlines()]
    rows = [row for row in words if row[:1] in ([name] for name in STRATEGIES) and row[1].isdigit()]
    expected = [[one.split.strategy, *map(str, (one.split.seq, one.split.ring, one.split.dp))] for one in found.splits]
    assert [row[:4] for row in rows] == expected * 2  # seconds, then memory


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GIVEN, "--json", "--checkpointing", "--offload", "--strategies", "ulysses", "tsp"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {one["strategy"] for one in document["splits"]} == {"ulysses", "tsp"}
    first = document["splits"][0]
    assert first["fits"] and first["memory"]["offloaded"] > 0
    assert first["memory"]["total"] == sum(
        first["memory"][part] for part in ("weights", "gradients", "optimizer", "saved", "transients")
    )
    assert document["memory_bytes"] == 141e9 and document["source"]
    assert cli.main([*GIVEN, "--json", "--hardware", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["memory_bytes"] is None


def test_how_attention_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    given = [*GIVEN, "--hardware", "h100-nvlink", "--strategies", "odysseus", "ulysses", "--gpus", "4"]
    for pipeline, said in (
        ("auto", "pipeline='auto': odysseus in 8 pieces, all others whole"),
        ("none", "pipeline=None: whole"),
        ("2", "pipeline=2: odysseus in 2 pieces, ulysses in 2 groups of heads, all others whole"),
    ):
        assert cli.main([*given, "--pipeline", pipeline]) in (0, 1)
        assert f"attention with {said}\n" in capsys.readouterr().out
    assert cli.main([*given, "--pipeline", "0"]) == 2
    assert "pipeline: expected" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main([*given, "--pipeline", "some"])
    assert "expected a number, auto or none, got 'some'" in capsys.readouterr().err


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "llama-3.1-70b", "--gpus", "1", "--seq", "4096"]) == 1
    assert "Nothing fits" in capsys.readouterr().out
    assert cli.main(["plan", "--model", "nothing", "--gpus", "1", "--seq", "4096"]) == 2
    assert capsys.readouterr().err.startswith("model: expected one of llama-2-7b, ")
    assert cli.main([*GIVEN, "--hardware", "h100-nvlink", "--gpus", "0"]) == 2
    assert "world_size: expected a whole number above 0, got 0" in capsys.readouterr().err
    assert cli.main([*GIVEN, "--plot", "/nowhere/at/all.png"]) == 2
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", "--model", "llama-3.1-8b"])


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "map.png"
    assert cli.main([*GIVEN, "--gpus", "4", "--checkpointing", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert "llama-3.1-8b" in capsys.readouterr().out


def test_what_the_picture_shows() -> None:
    cells = best_by_size((1, 8), (1 << 13, 1 << 23), model_config="llama-3.1-8b", hardware="h200-nvlink")
    fitting = {(cell.world_size, cell.seq_len): cell.first is not None and cell.first.fits for cell in cells}
    assert fitting == {(1, 1 << 13): False, (1, 1 << 23): False, (8, 1 << 13): True, (8, 1 << 23): False}
    # Sizes without a split are cells, too, unless there is no other.
    mixed = best_by_size((8, 16), (4096,), model_config="mixtral-8x7b")
    assert mixed[0].first is not None and mixed[1].first is None
    with pytest.raises(ValueError, match="experts: 16 ranks do not divide 8 experts"):
        best_by_size((16,), (4096,), model_config="mixtral-8x7b")


def test_as_a_process() -> None:
    """Nothing of it needs a process group, a GPU or transformers."""
    probe = (
        "import sys; from odysseus_kernels.cli import main; status = main(sys.argv[1:]);"
        "print(sorted(m for m in ('transformers', 'odysseus_kernels._C') if m in sys.modules)); sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", probe, *GIVEN], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
