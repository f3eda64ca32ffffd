"""``doctor``: what it says on a machine that is well, what it names where one is not, and how it ends."""

from __future__ import annotations

import copy
import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import doctor_cases as cases
import pytest

import odysseus_kernels as ody
from odysseus_kernels import cli, ops
from odysseus_kernels.comm.schedules.streams import STREAMS
from odysseus_kernels.doctor.facts import parse_topology, why_not_writable
from odysseus_kernels.doctor.operators import OPERATORS
from odysseus_kernels.doctor.problems import OLDEST_PYTHON, OLDEST_TORCH, find_problems
from odysseus_kernels.doctor.report import Problem, RankReport, Report, TransportState, rank_numbers
from odysseus_kernels.doctor.tables import print_report
from odysseus_kernels.testing.spawn import RankPools

ROOT = Path(__file__).parent.parent.parent
SECTIONS = ("versions", "extension", "host", "devices", "network", "shared memory", "limits", "caches")
COLUMNS = {(mode, transport) for mode in ("fused", "unfused") for transport in ("symmetric", "collective")}

# Python runs this before anything else in every process of the command.
NO_EXTENSION = 'import sys; sys.modules["odysseus_kernels._C"] = None'
RANK_1_DIES = """
import os, sys
if sys.orig_argv[-2:] == ["--rank", "1"]:
    from odysseus_kernels.doctor import self_test
    self_test.check_operator = lambda *_: os.kill(os.getpid(), 9)
"""
RANK_0_DIES = RANK_1_DIES.replace('"1"', '"0"')


def _run(command: list[str], *, site: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, filter(None, (site, ROOT)))), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)


def _doctor(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "odysseus_kernels", "doctor", "--device", "cpu", *arguments]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks of torchrun say, as JSON on standard output."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = _run(
        [*torchrun, "-m", "odysseus_kernels", "doctor", "--device", "cpu", "--json"],
        ODYSSEUS_CACHE_DIR=str(tmp_path_factory.mktemp("cache")),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)  # once, and nothing else


def _report(document: dict[str, Any]) -> Report:
    ranks = copy.deepcopy(document["ranks"])
    for rank in ranks:
        for check in rank["checks"]:
            del check["passed"]
    problems = (Problem(**{**one, "ranks": tuple(one["ranks"])}) for one in document["problems"])
    return Report(tuple(RankReport.from_json(json.dumps(rank)) for rank in ranks), tuple(problems))


@pytest.fixture
def ranks_reports(launched: dict[str, Any]) -> tuple[RankReport, ...]:
    """Of ranks that are well; a test may change them."""
    return _report(launched).ranks


@pytest.mark.slow
def test_json_of_launched_ranks(launched: dict[str, Any]) -> None:
    assert launched.keys() == {"healthy", "bytes_per_s_between_ranks", "ranks", "problems"}
    assert launched["healthy"] is True
    assert [rank["rank"] for rank in launched["ranks"]] == [0, 1]
    for rank in launched["ranks"]:
        assert rank.keys() == {"rank", "facts", "transports", "checks", "rates", "pairs", "said", "stage", "failure"}
        assert tuple(rank["facts"]) == SECTIONS
        assert rank["failure"] == rank["stage"] == ""
        assert rank["facts"]["versions"]["odysseus_kernels"] == ody.__version__
        assert rank["facts"]["extension"]["usable"] and rank["facts"]["host"]["ranks_use"] == "cpu"
        assert rank["facts"]["shared memory"]["free_bytes"] > 0
        assert any(one["ipv4"] for one in rank["facts"]["network"]["interfaces"])
        assert [one["transport"] for one in rank["transports"] if one["available"]] == ["symmetric", "collective"]
        for operator in OPERATORS:
            own = [check for check in rank["checks"] if check["operator"] == operator]
            assert {(check["mode"], check["transport"]) for check in own} == COLUMNS
            assert all(check["passed"] and 0 < check["error"] <= check["allowed"] < 1e-5 for check in own)
            assert all(check["carried"] == [check["transport"]] for check in own)
        for rate in rank["rates"]:
            assert rate["carried"] == rate["transport"] and rate["bytes_per_s"] > 0 and rate["latency_s"] > 0
        assert len(rank["rates"]) == 2
    for name in ("symmetric", "collective"):
        (_, there), (back, _) = launched["bytes_per_s_between_ranks"][name]
        assert there == back > 0


@pytest.mark.slow
def test_text_has_all_sections_once_and_no_colours(launched: dict[str, Any]) -> None:
    file = io.StringIO()
    print_report(_report(launched), file)
    lines = file.getvalue().splitlines()
    for section in (*SECTIONS, "transports"):
        assert lines.count(section) == 1, section
    assert "\x1b" not in file.getvalue() and all(line == line.rstrip() for line in lines)
    for operator in OPERATORS:
        assert sum(line.startswith(f"{operator} ") for line in lines) == 1
    assert "rank 0" not in "\n".join(lines[: lines.index("transports")])  # ranks that agree are one line


@pytest.mark.slow
def test_facts_that_differ_name_their_ranks(ranks_reports: tuple[RankReport, ...]) -> None:
    ranks_reports[1].facts["versions"]["torch"] = "2.99.0"
    ranks_reports[1].facts["versions"]["peft"] = "0.1"
    file = io.StringIO()
    problems = find_problems(ranks_reports)
    print_report(Report(ranks_reports, problems), file)
    rows = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    assert "torch 2.99.0 rank 1" in rows and "peft 0.1 rank 1" in rows
    (one,) = (problem for problem in problems if "versions" in problem.what)
    assert one.severity == "error" and "of torch: rank 0: " in one.what and "rank 1: 2.99.0" in one.what


@pytest.mark.slow
@pytest.mark.without_ranks
def test_missing_extension_and_cache(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_EXTENSION)
    written = tmp_path / "report.json"
    done = _run(_doctor("--json", str(written)), site=tmp_path, ODYSSEUS_CACHE_DIR="/proc/nowhere/cache")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1. error: no compiled extension, so no symmetric transport: " in done.stdout
    assert done.stdout.count("problems on 2 ranks") == 1
    document = json.loads(written.read_text())
    severities = {problem["what"][:21]: problem["severity"] for problem in document["problems"]}
    assert severities["no compiled extension"] == "error"
    assert severities['the cache of mode="au'] == "warning"
    assert len(document["problems"]) == len(severities)
    for rank in document["ranks"]:  # the other transport works all the same
        assert {check["transport"] for check in rank["checks"]} == {"collective"}
        assert all(check["passed"] for check in rank["checks"]) and len(rank["checks"]) == 2 * len(OPERATORS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("site", "says"),
    [
        (RANK_1_DIES, "error (rank 1): Its process is gone; it was last at: all_gather_linear, fused"),
        (RANK_0_DIES, "error (rank 0): The first rank was ended by SIGKILL; it was last at: all_gather_linear, fused"),
    ],
    ids=("rank 1", "rank 0"),
)
@pytest.mark.without_ranks
def test_a_rank_that_dies_is_reported(tmp_path: Path, site: str, says: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(site)
    done = _run(_doctor("--ranks", "2" if site == RANK_1_DIES else "1"), site=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert says in done.stdout
    assert done.stdout.count("problems on ") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--ranks", "0"), "--ranks: expected 1 to 64, got 0"), (("--timeout", "-1"), "--timeout: expected seconds")],
)
def test_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["doctor", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_usage_of_unknown_arguments() -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--device", "tpu"])
    assert ended.value.code == 2


def test_every_public_operator_is_in_the_table() -> None:
    operators = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert set(OPERATORS) == {*operators, "ring_attention"}
    assert operators & set(ody.__all__) < set(OPERATORS)


@pytest.mark.parametrize(
    ("wrong", "where"), [("output", "output 1"), ("gradient", "gradient of weight"), ("nan", "output 1")]
)
def test_a_wrong_number_is_found(ranks: RankPools, wrong: str, where: str) -> None:
    right, other = ranks(2).run(cases.check_wrong, wrong)
    assert not other["passed"]
    if wrong == "nan":
        assert other["error"] is None and other["failure"] == f"{where} is not finite"
    else:
        assert other["where"] in (where, "gradient of bias") and other["error"] > 10 * other["allowed"]
    if wrong == "output":
        assert right["passed"]


# ---- problems, from reports of ranks that are well, changed in one place ---------------------------------------------


def _edited(reports: tuple[RankReport, ...], section: str, **values: Any) -> tuple[Problem, ...]:
    for report in reports:
        report.facts[section] |= values
    return find_problems(reports)


GPU = {"name": "NVIDIA H100", "memory_bytes": 80 << 30, "compute_capability": "9.0", "rates_known": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "values", "severity", "says", "remedy"),
    [
        ("shared memory", {"free_bytes": 64 << 20}, "warning", "less than 512 MiB free for 2 ranks", "--shm-size"),
        ("shared memory", {"file_system": "ext4"}, "warning", "written to a disk", "ODYSSEUS_SHM_DIR"),
        (
            "shared memory",
            {"why_not_writable": "Permission denied: /dev/shm"},
            "error",
            "no segment of shared memory can be made: Permission denied",
            "ODYSSEUS_SHM_DIR",
        ),
        ("caches", {"why_not_writable": "Read-only: /x"}, "warning", "measures anew", "ODYSSEUS_CACHE_DIR"),
        ("network", {"why_not": "interface eth9 has no IPv4"}, "error", "cannot listen", "GLOO_SOCKET_IFNAME"),
        ("versions", {"torch": "2.9.1+cpu"}, "error", "expected torch 2.10 or later, got 2.9.1+cpu", "install torch"),
        ("versions", {"python": "3.10.4"}, "error", "expected python 3.11 or later", "install python"),
        ("devices", {"driver": "NVRM 580"}, "warning", "torch sees no GPU", "CUDA_VISIBLE_DEVICES"),
        ("host", {"cores_of_process": 1}, "warning", "2 ranks share 1 cores", "fewer ranks"),
    ],
)  # fmt: skip
def test_problems(
    ranks_reports: tuple[RankReport, ...], section: str, values: dict[str, Any], severity: str, says: str, remedy: str
) -> None:
    before = find_problems(ranks_reports)
    (problem,) = (one for one in _edited(ranks_reports, section, **values) if one not in before)
    assert problem.severity == severity and problem.ranks == ()
    assert says in problem.what and remedy in problem.remedy


@pytest.mark.slow
def test_problems_of_gpus(ranks_reports: tuple[RankReport, ...]) -> None:
    before = find_problems(ranks_reports)
    without = _edited(ranks_reports, "extension", cuda_part=False, why_no_cuda_part="built without its CUDA part")
    assert without == before  # which nobody misses without a GPU
    _edited(ranks_reports, "devices", driver="NVRM 580", gpus=[GPU, GPU], pairs_without_peer_access=[[0, 1]])
    found = _edited(ranks_reports, "limits", cuda_device_max_connections="1")
    severities = {one.what: one.severity for one in found if one not in before}
    assert severities.pop("built without its CUDA part") == "error"
    assert set(severities.values()) == {"warning"}
    assert any("no peer-to-peer access between GPUs 0 to 1" in what for what in severities)
    assert any(what.startswith(f"CUDA_DEVICE_MAX_CONNECTIONS=1 gives fewer hardware queues than the {len(STREAMS)}")
               for what in severities)  # fmt: skip


@pytest.mark.slow
def test_a_transport_between_hosts_is_not_missed(ranks_reports: tuple[RankReport, ...]) -> None:
    before = find_problems(ranks_reports)
    for report in ranks_reports:
        report.transports[0] = TransportState("symmetric", False, "rank 1: what nobody expected")
    (missed,) = (one for one in find_problems(ranks_reports) if one not in before)
    assert missed.severity == "error" and "what nobody expected" in missed.what
    ranks_reports[1].facts["host"]["machine"] = "another"
    assert find_problems(ranks_reports) == before


@pytest.mark.slow
def test_what_one_rank_has_is_said_of_it(ranks_reports: tuple[RankReport, ...]) -> None:
    ranks_reports[1].said.append("no TCP connections between its ranks")
    ranks_reports[1].failure, ranks_reports[1].stage = "RuntimeError: refused", "meeting the other ranks"
    of_one = [one for one in find_problems(ranks_reports) if one.ranks == (1,)]
    assert [one.severity for one in of_one] == ["error", "warning"]
    assert of_one[0].what == "meeting the other ranks failed: RuntimeError: refused"
    assert "GLOO_SOCKET_IFNAME" in of_one[0].remedy


def test_oldest_versions_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={".".join(map(str, OLDEST_PYTHON))}"' in text
    assert f'"torch>={".".join(map(str, OLDEST_TORCH))}"' in text


def test_a_library_that_is_too_old_is_an_error(ranks_reports: tuple[RankReport, ...]) -> None:
    ranks_reports[0].facts["versions"] |= {"peft": "0.18.1", "transformers": "5.17.0", "trl": None}
    (problem,) = [one for one in find_problems(ranks_reports) if "models cannot be parallelized" in one.what]
    assert problem.severity == "error" and problem.ranks == (0,)
    assert problem.what.startswith("expected peft 0.19 or later, got 0.18.1")


def test_writing_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path / "a" / "b", make=True) == ""
    assert list(tmp_path.iterdir()) == []
    assert "No such file" in why_not_writable(tmp_path / "a", make=False)
    (tmp_path / "file").write_text("")
    assert why_not_writable(tmp_path / "file", make=True) != ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_topology() -> None:
    printed = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0\n"
        "GPU1\tNV18\t X \tSYS\tNODE\t0-31\t0\n"
        "GPU2\tSYS\tSYS\t X \tSYS\t32-63\t1\n"
        "NIC0\tPIX\tNODE\tSYS\t X \n\nLegend:\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
    )
    assert parse_topology(printed) == {"0-1": "NV18", "0-2": "SYS", "1-2": "SYS"}
    assert parse_topology("no devices were found") == {}


def test_rank_numbers() -> None:
    assert rank_numbers((3,)) == "rank 3"
    assert rank_numbers((0, 1, 2, 5)) == "ranks 0-2, 5"
