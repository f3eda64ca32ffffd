"""The script for machines with a GPU, on machines without: it says why nothing can run, and stops at nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
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


# Stands for Python, torch, PRETENDED_GPUS and a sanitizer, and takes no time: notes what it was told, and a benchmark
# with how many hardware queues; reports PRETENDED_PASSED tests, measures the first of two rows; a command line with one
# of HANGS (a line each) in it gets half way and hangs.
_PRETENDED_PYTHON = r"""#!/bin/sh
echo "$*" >>"$TOLD"
case "$*" in *overlap.py*) echo "queues: $CUDA_DEVICE_MAX_CONNECTIONS" >>"$TOLD" ;; esac
hangs=$(printf '%s\n' "$HANGS" | while read -r line; do case "$* " in *"$line"*) echo yes ;; esac; done)
case "$*" in
  *summary.py) exec "$REAL_PYTHON" "$@" ;;
  *benchmarks.common*) printf '\npretended\n0123\n%d\n' "$PRETENDED_GPUS" ;;
  "-m pytest "*)
    for argument; do
      case "$argument" in
        --junitxml=*) printf '<testsuites><testsuite tests="%d" errors="0" failures="0" skipped="1"/></testsuites>' \
          $((PRETENDED_PASSED + 1)) >"${argument#*=}" ;;
      esac
    done ;;
  *overlap.py*)
    for what; do :; done
    rows="$OUT/rows-$what.jsonl"
    line='{"name": "%s of %s", "seconds": 1.0, "result": {}, "failed": ""}\n'
    printf '{"planned": ["first of %s", "second of %s"]}\n' "$what" "$what" >"$rows"
    printf "$line" first "$what" >>"$rows"
    [ -n "$hangs" ] || printf "$line" second "$what" >>"$rows" ;;
esac
if [ -n "$hangs" ]; then
  echo "half done"
  exec sleep 60
fi
"""


@dataclasses.dataclass(frozen=True)
class _Pretended:
    """A run on a pretended device: exit status, output, command lines of Python, (part, step) -> outcome."""

    status: int
    printed: str
    told: list[str]
    outcomes: dict[tuple[str, str], str]
    results: Path

    def parts(self) -> dict[str, str]:
        """Outcome of each part, by its row in the summary."""
        rows = re.findall(
            r"^\| (\w+) \| ([^|]+) \|.*\| \d+ \|$", (self.results / "summary.md").read_text(), re.MULTILINE
        )
        return dict(rows)


def _pretend(
    folder: Path,
    *arguments: str,
    passed: int = 2,
    hangs: str = "nothing",
    seconds: int = 480,
    stop_at: str | None = None,
    gpus: int = 1,
) -> _Pretended:
    """Runs the script; ``stop_at`` is a step whose log ends the run, by a signal, once it is half done."""
    for name in ("python", "compute-sanitizer"):
        program = folder / name
        program.write_text(_PRETENDED_PYTHON)
        program.chmod(0o755)
    told, results = folder / "told", folder / "results"
    told.write_text("")
    variables = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "ODYSSEUS_PYTHON": str(folder / "python"),
        "ODYSSEUS_GPU_SECONDS": str(seconds),
        "REAL_PYTHON": sys.executable,
        "TOLD": str(told),
        "PRETENDED_PASSED": str(passed),
        "PRETENDED_GPUS": str(gpus),
        "HANGS": hangs,
    }
    command = ["bash", _SCRIPT, str(results), *arguments]
    with subprocess.Popen(
        command, cwd=_ROOT, env={**os.environ, **variables}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        if stop_at is not None:
            log, deadline = results / f"{stop_at}.log", time.monotonic() + 60
            while not (log.exists() and "half done" in log.read_text()):
                assert time.monotonic() < deadline, f"{stop_at} did not begin within 60 s"
                time.sleep(0.02)
            process.terminate()
        printed, _ = process.communicate(timeout=600)
    lines = [line.split("\t") for line in (results / "outcomes").read_text().splitlines()]
    outcomes = {(part, step): outcome for part, step, outcome, _ in lines}
    assert len(outcomes) == len(lines), "a step has one outcome"
    return _Pretended(process.returncode, printed, told.read_text().splitlines(), outcomes, results)


def _declared() -> dict[str, tuple[int, int, bool]]:
    """Of each part, as the script declares it: limit, exit status, whether it runs beside the one before."""
    rows = re.findall(r"^  (\w+):(\d+):(\d+):([01])\b", (_ROOT / _SCRIPT).read_text(), re.MULTILINE)
    return {name: (int(limit), int(code), beside == "1") for name, limit, code, beside in rows}


def test_limits_add_up_to_eight_minutes() -> None:
    """With nothing compiled before, and whatever hangs: 480 s, of which some are left to begin and to sum up."""
    parts = _declared()
    rounds: list[int] = []
    for limit, _, beside in parts.values():
        if beside:
            rounds[-1] = max(rounds[-1], limit)
        else:
            rounds.append(limit)
    assert sum(rounds) <= 470
    order = "build warm native full cublas virtual processes graphs faults links sanitize"
    assert list(parts) == order.split()
    assert len({code for _, code, _ in parts.values()} - {0, 1, 2}) == len(parts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> _Pretended:
    """Everything passes."""
    return _pretend(tmp_path_factory.mktemp("whole"))


def test_everything_passes_in_the_order_of_the_parts(whole: _Pretended) -> None:
    assert whole.status == 0, whole.printed
    assert set(whole.outcomes.values()) == {"passed"}
    assert whole.parts() == dict.fromkeys(_declared(), "passed")
    assert list(dict.fromkeys(part for part, _ in whole.outcomes if part not in ("graphs", "faults"))) == [
        part for part in _declared() if part not in ("graphs", "faults")
    ]
    summary = (whole.results / "summary.md").read_text()
    reports = len(list(whole.results.glob("*.xml")))
    assert f"Tests: {3 * reports} tests, 0 failures, 0 errors, {reports} skipped" in summary
    assert "Links: 2 rows measured, in rows-links.jsonl" in summary


def test_every_file_with_gpu_tests_is_run(whole: _Pretended) -> None:
    files = {argument for line in whole.told for argument in line.split() if re.fullmatch(r"tests/.*\.py", argument)}
    wanted = {path for path in (_ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.gpu", path.read_text())}
    run = {file for file in files if Path(file).name.startswith("test_")}
    assert run == {str(path.relative_to(_ROOT)) for path in wanted}


# In each part one step, and not the first where there are several.
_HANGS = {
    ("build", "install"): "-m pip install",
    ("warm", "kernels-3"): "kernels-3.xml",
    ("native", "copies"): "benchmarks.device.copies",
    ("full", "full_device"): "test_full_device.py",
    ("cublas", "cublas"): "--measure kernels",
    ("virtual", "virtual_ranks"): "test_virtual_ranks.py",
    ("processes", "nccl"): "test_nccl.py",
    ("graphs", "cuda_graphs"): "test_cuda_graphs.py",
    ("faults", "cuda_faults"): "test_cuda_faults.py",
    ("links", "links"): "--measure links",
    ("sanitize", "memcheck"): "--tool memcheck",
}


def _benchmarks(done: _Pretended) -> list[tuple[str, str]]:
    """Command lines of the benchmark, each with how many hardware queues its processes have."""
    return [
        (line, done.told[index + 1].removeprefix("queues: "))
        for index, line in enumerate(done.told)
        if "overlap.py" in line
    ]


def test_benchmarks_have_queues_and_a_limit_for_each_row_on_one_gpu_and_on_several(
    whole: _Pretended, tmp_path: Path
) -> None:
    several = _pretend(tmp_path, "--only", "links", gpus=4)
    assert several.status == 0, several.printed
    assert several.outcomes["links", "links"] == several.outcomes["links", "emulated_links"] == "passed"
    assert "Links: 2 rows measured, in rows-links.jsonl" in (several.results / "summary.md").read_text()
    alone, together = _benchmarks(whole), _benchmarks(several)
    assert [line.split()[-1] for line, _ in alone] == ["kernels", "links"]
    ((line, _),) = together
    assert "--ranks 4 " in line and "--dtype bfloat16" in line
    for line, queues in (*alone, *together):
        assert queues == "32"
        limit, budget = (int(re.search(rf"--{name} (\d+)", line)[1]) for name in ("row-limit", "budget"))  # type: ignore[index]
        assert 0 < budget <= 75 - limit, "the last row that begins has time to end"


@pytest.mark.slow
def test_every_part_is_stopped_in_its_middle_and_loses_nothing(tmp_path: Path) -> None:
    """What was measured is kept, the rest is named, and the whole run ends in the time of its limits."""
    begin = time.monotonic()
    done = _pretend(tmp_path, hangs="\n".join(_HANGS.values()), seconds=24)
    assert time.monotonic() - begin < 24 + 10
    parts = _declared()
    assert set(_HANGS) <= set(done.outcomes) and {part for part, _ in _HANGS} == set(parts)
    for (part, step), outcome in done.outcomes.items():
        if (part, step) in _HANGS:
            # By its own limit; on a busy machine that of its part may come first.
            assert outcome.startswith(("timed out after", "stopped with its part")), (step, outcome)
            assert "half done" in (done.results / f"{step}.log").read_text()
    assert done.status == parts["build"][1]
    assert done.parts() == dict.fromkeys(parts, "timed out")
    summary = (done.results / "summary.md").read_text()
    for what in ("kernels", "links"):
        assert f"1 rows measured, in rows-{what}.jsonl\n- not measured: second of {what}" in summary
    assert f"- native, copies: {done.outcomes['native', 'copies']}" in summary
    # Steps beside or behind one that hangs.
    others = {step: outcome for step, outcome in done.outcomes.items() if step not in _HANGS}
    assert ("build", "versions") in others and ("native", "native_cuda_data") in others
    assert ("warm", "kernels-17") in others and ("processes", "cuda_operators") in others


def test_a_run_that_is_told_to_stop_sums_up(tmp_path: Path) -> None:
    done = _pretend(tmp_path, hangs=_HANGS["native", "copies"], stop_at="copies")
    parts = done.parts()
    assert (parts["build"], parts["warm"], parts["native"]) == ("passed", "passed", "timed out")
    assert set(list(parts.values())[3:]) == {"never run"}
    assert done.outcomes["native", "native_check"] == "passed"
    assert done.outcomes["native", "copies"] == "stopped with its part"
    assert done.outcomes["native", "native_cuda_data"] == "not run: its part was stopped before it"
    assert done.status == _declared()["native"][1]


def test_a_row_of_several_gpus_that_hangs_loses_no_other(tmp_path: Path) -> None:
    done = _pretend(tmp_path, "--only", "links", gpus=2, seconds=24, hangs="--ranks 2 ")
    assert done.status == _declared()["links"][1]
    assert done.outcomes["links", "links"].startswith("timed out after")
    summary = (done.results / "summary.md").read_text()
    assert "1 rows measured, in rows-links.jsonl\n- not measured: second of links" in summary


def test_one_part_again_and_its_exit_status(tmp_path: Path) -> None:
    """Other parts keep what they have; steps of a part for which no time is left are named."""
    first = _pretend(tmp_path, "--only", "full")
    assert first.status == 0 and first.parts()["links"] == "never run"
    done = _pretend(tmp_path, "--only", "links", seconds=1, hangs="--measure links")
    assert done.status == _declared()["links"][1]
    assert done.parts()["full"] == "passed" and done.parts()["links"] == "timed out"
    assert {step for part, step in done.outcomes if part == "links"} == {"links", "emulated_links"}


def test_tests_that_were_all_skipped_have_shown_nothing(tmp_path: Path) -> None:
    done = _pretend(tmp_path, "--only", "virtual", passed=0)
    assert done.status == _declared()["virtual"][1]
    assert done.parts()["virtual"] == "failed: no test passed"


_COLLECT = """
import json, sys
import pytest
from _pytest.mark import deselect_by_keyword

class Collected:
    found = []

    # After conftest.py, which leaves nothing of these out.
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        for config.option.keyword in json.loads(sys.argv[1]):  # as -k does it, all on what was collected once
            chosen = list(items)
            deselect_by_keyword(chosen, config)
            self.found.append([item.name for item in chosen])

pytest.main(["--collect-only", "-qq", "tests/kernels/test_gpu_kernels.py"], plugins=[Collected()])
print("\\n" + json.dumps(Collected.found))
"""


@pytest.mark.slow
def test_every_test_of_the_kernels_is_in_one_shard(whole: _Pretended) -> None:
    shards = re.findall(r" -k (.*)$", "\n".join(whole.told), re.MULTILINE)
    assert len(shards) == 17
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
