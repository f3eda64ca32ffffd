"""The script for machines with a GPU, on machines without: it says why nothing can run, and stops at nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.without_ranks

_ROOT = Path(__file__).resolve().parents[1]
_SCRIPT = "tests/run_gpu.sh"


def _run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ODYSSEUS_PYTHON": sys.executable, **variables}
    command = ["bash", _SCRIPT, *arguments]
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_syntax() -> None:
    subprocess.run(["bash", "-n", _SCRIPT], cwd=_ROOT, check=True, timeout=20)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = _run(str(tmp_path / "results"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "no GPU: torch.cuda.is_available() is false\n"


@pytest.mark.parametrize(
    ("arguments", "said"), ((("--only", "everything"), "usage:"), (("a", "b"), "usage:"), (("--fast",), "usage:"))
)
def test_usage(arguments: tuple[str, ...], said: str) -> None:
    done = _run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(said)


def test_without_python_it_says_so_in_one_line() -> None:
    done = _run(ODYSSEUS_PYTHON="/nonexistent/python")
    assert done.returncode == 2
    assert done.stderr == "no Python: /nonexistent/python is not a program; set ODYSSEUS_PYTHON\n"


_PRETENDED_GPU = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda index=0: "Pretended GPU"
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_part_that_fails_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    """With a GPU that is only pretended, the benchmark fails; its status and the summary say so."""
    (tmp_path / "sitecustomize.py").write_text(_PRETENDED_GPU)
    results = tmp_path / "results"
    done = _run(str(results), "--only", "bench", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "bench: failed" in done.stdout
    status = (results / "bench.status").read_text().split("\t")
    assert status[0] == "failed"
    assert len(status) == 4
    summary = (results / "summary.md").read_text()
    assert "| bench | failed |" in summary
    assert "| tests | never run |" in summary
    assert (results / "bench.log").read_text()

    done = _run(str(results), "--only", "bench", PYTHONPATH=str(tmp_path), ODYSSEUS_GPU_SECONDS="5")
    assert done.returncode == 1
    assert "bench: not run: no time left" in done.stdout


# Stands for Python where pytest is run: notes what it was told and reports as many tests as PRETENDED_PASSED; a command
# line with HANGS in it never ends.
_PRETENDED_PYTEST = """#!/bin/sh
if [ "$1 $2" != "-m pytest" ]; then exec "$REAL_PYTHON" "$@"; fi
case "$*" in *"$HANGS"*) exec sleep 60 ;; esac
exec "$REAL_PYTHON" -I - "$@" <<'PY'
import json, os, sys
with open(os.environ["TOLD"], "a") as told:
    told.write(json.dumps(sys.argv[1:]) + chr(10))
report = next(argument for argument in sys.argv if argument.startswith("--junitxml=")).partition("=")[2]
tests = int(os.environ["PRETENDED_PASSED"])
counts = f'tests="{tests + 1}" errors="0" failures="0" skipped="1"'
with open(report, "w") as file:
    file.write(f"<testsuites><testsuite {counts}></testsuite></testsuites>")
PY
"""


def _run_pretended_tests(folder: Path, passed: int, hangs: str = "no file") -> tuple[int, list[list[str]]]:
    """Exit status of the part with the tests, and the command lines that pytest was given."""
    (folder / "sitecustomize.py").write_text(_PRETENDED_GPU)
    python, told = folder / "python", folder / "told"
    python.write_text(_PRETENDED_PYTEST)
    python.chmod(0o755)
    told.write_text("")
    done = _run(
        *(str(folder / "results"), "--only", "tests"),
        PYTHONPATH=str(folder),
        ODYSSEUS_PYTHON=str(python),
        # Some thirty processes import torch; on a busy machine that takes longer than what the part has by default.
        ODYSSEUS_GPU_SECONDS="600",
        REAL_PYTHON=sys.executable,
        TOLD=str(told),
        PRETENDED_PASSED=str(passed),
        HANGS=hangs,
    )
    return done.returncode, [json.loads(line) for line in told.read_text().splitlines()]


_COLLECT = """
import json, sys
import pytest

class Collected:
    def pytest_collection_finish(self, session):
        self.names = [item.name for item in session.items]

found = []
for expression in json.loads(sys.argv[1]):
    plugin = Collected()
    pytest.main(["--collect-only", "-qq", "-k", expression, "tests/kernels/test_gpu_kernels.py"], plugins=[plugin])
    found.append(plugin.names)
print("\\n" + json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_every_gpu_test_is_run_within_the_time(tmp_path: Path) -> None:
    """All files with GPU tests; of the kernels', every test in exactly one shard; a file that hangs is stopped."""
    status, told = _run_pretended_tests(tmp_path, passed=2, hangs="test_choice_timer.py")
    assert status == 1
    outcomes = dict(line.split("\t")[:2] for line in (tmp_path / "results/tests.outcomes").read_text().splitlines())
    assert outcomes.pop("choice_timer") == "timed out after 15 s"
    summary = (tmp_path / "results/summary.md").read_text()
    assert "- choice_timer: timed out after 15 s" in summary
    assert f"Tests: {3 * len(told)} tests, 0 failures, 0 errors, {len(told)} skipped" in summary
    assert set(outcomes.values()) == {"passed"}

    files = {argument for line in told for argument in line if argument.endswith(".py")}
    wanted = {path for path in (_ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.gpu", path.read_text())}
    named = {str(path.relative_to(_ROOT)) for path in wanted}
    assert named - files == {"tests/gpu/test_choice_timer.py"}
    assert files <= named

    shards = [line[line.index("-k") + 1] for line in told if "-k" in line]
    done = subprocess.run(
        [sys.executable, "-c", _COLLECT, json.dumps([*shards, ""])],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    *parts, everything = json.loads(done.stdout.splitlines()[-1])
    assert all(parts), shards
    assert sorted(name for part in parts for name in part) == sorted(everything)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tests_that_were_all_skipped_have_shown_nothing(tmp_path: Path) -> None:
    status, told = _run_pretended_tests(tmp_path, passed=0)
    assert told
    assert status == 1
    assert (tmp_path / "results/tests.log").read_text().endswith("\n0 passed\n")
