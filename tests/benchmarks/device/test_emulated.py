"""One rank with silent peers, on a simulated device: the benchmark's operators, checks and samples without a GPU."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common.measure import EventTimer
from benchmarks.device import emulated, isolated, kernels
from benchmarks.device import report as emulated_report
from benchmarks.device import workload as emulated_workload
from benchmarks.device.cases import EmulatedCase, make_emulated_cases
from benchmarks.device.predictions import PREDICTED
from benchmarks.device.workload import MODES, EmulatedWorkload, Emulation, fake_group
from odysseus_kernels.comm.device.lowering import KINDS, WINDOWS, WORDS
from odysseus_kernels.comm.device.transport import SymmetricDeviceTransport
from odysseus_kernels.comm.groups import use_transport
from odysseus_kernels.comm.schedules.device import RECEIVE
from odysseus_kernels.comm.schedules.steps import SHARD
from odysseus_kernels.comm.transport import Call, Gather, Scatter
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.testing.simulated_device import SimulatedMachine
from odysseus_kernels.testing.virtual_devices import SATISFIED, SilentPeers

_WORLD = 4
_CASES = tuple(
    EmulatedCase("small", operator, phase, 64, inner, outer, "paced:1", _WORLD)
    for operator, inner, outer in (("all_gather_linear", 128, 24), ("linear_reduce_scatter", 24, 128))
    for phase in ("forward", "backward")
)


class _SilentMachine(SimulatedMachine):
    """A simulated machine on which only rank 0 does anything, with the memory of silent peers."""

    def __init__(self, world: int) -> None:
        self.memory = SilentPeers(torch.device("cpu"), world)
        super().__init__(world)
        ignored = torch.zeros_like(self.memory.own_words())
        self.words = [self.memory.own_words(), *[ignored] * (world - 1)]

    def window(self, rank: int, place: tuple[str, int], nbytes: int = 0) -> Tensor:
        if nbytes > self.memory.backed(place):
            self.memory.grow({place: nbytes})
        return self.memory.memory(rank, place)


class _EagerTransport(SymmetricDeviceTransport):
    """What was enqueued has happened when a call returns."""

    def __init__(self, machine: SimulatedMachine) -> None:
        super().__init__(machine.devices[0], 0, machine.world)
        self._machine = machine

    def _run(self, *arguments: Any) -> None:
        super()._run(*arguments)
        self._machine.run(0)


@contextlib.contextmanager
def _emulate(device: Any, group: dist.ProcessGroup, link: str, cases: Any) -> Iterator[Emulation]:
    machine = _SilentMachine(group.size())
    transport = _EagerTransport(machine)
    with use_transport(group, transport):
        yield Emulation(transport, machine.memory, group, link)


@contextlib.contextmanager
def _emulation(world: int = _WORLD) -> Iterator[Emulation]:
    with fake_group(world) as group, _emulate(None, group, "paced:1", ()) as emulation:
        yield emulation


def _wall(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


@pytest.fixture(autouse=True)
def _for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(MODES, "tiles")  # its kernels need a GPU
    monkeypatch.setattr(emulated_workload, "PIECES", (2,))  # a simulated device takes its time


@pytest.mark.parametrize("case", _CASES, ids=lambda case: f"{case.operator} {case.phase}")
def test_rows_are_right_and_timed(case: EmulatedCase) -> None:
    dtype = torch.float32 if case.phase == "backward" else torch.bfloat16
    with _emulation() as emulation:
        row = emulated.measure_case(case, emulation, rounds=3, timed=_wall, synchronize=lambda: None, dtype=dtype)
    assert row["wrong"] == [], row["errors"]
    assert set(row["samples_s"]) == {"gemm", "link", "serial", "fused"}
    assert all(len(samples) == 3 and min(samples) > 0 for samples in row["samples_s"].values())
    assert set(row["errors"]) == {"serial", "fused"}
    assert row["pieces"]["serial"] == "auto"
    assert row["pieces"]["fused"] in ("auto", "2")
    assert {"fused", "fused/2"} <= set(row["host_s"])
    assert all(("sent" in found) == case.scatters for found in row["errors"].values())
    summary = emulated_report.summarize(row)
    assert summary["limit_s"] == max(summary["medians_s"]["gemm"], summary["medians_s"]["link"])
    assert summary["link_is"] == "emulated"


@pytest.mark.parametrize("case", _CASES, ids=lambda case: f"{case.operator} {case.phase}")
def test_a_wrong_result_has_no_time(case: EmulatedCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong in one of the gathered chunks, or in what is sent: whatever the operator moves."""
    right = emulated_workload.ops.__dict__[case.operator]

    def wrong(x: Tensor, *arguments: Any, config: OverlapConfig, **others: Any) -> Any:
        if config.mode == "fused":
            x = torch.where(torch.arange(x.shape[0])[:, None] == x.shape[0] - 1, 2 * x, x)
        return right(x, *arguments, config=config, **others)

    monkeypatch.setattr(emulated_workload.ops, case.operator, wrong)
    with _emulation() as emulation:
        row = emulated.measure_case(case, emulation, rounds=2, timed=_wall, synchronize=lambda: None)
    assert row["wrong"] == ["fused"]
    assert set(row["samples_s"]) == {"gemm", "link", "serial"}
    assert emulated_report.summarize(row)["figures"] == {
        "fused / limit": None,
        "tiles / limit": None,
        "hidden": None,
        "host / fused": None,
    }


def _pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that ``run`` asks of a device, for the rows of this file and no kernels."""
    monkeypatch.setattr(emulated, "WORLD", _WORLD)
    monkeypatch.setattr(emulated, "why_unusable", lambda: "")
    monkeypatch.setattr(emulated, "_how_copies_ran", lambda: "Copies run on copy engines.")
    monkeypatch.setattr(emulated, "make_emulated_cases", lambda *arguments, **others: list(_CASES))
    monkeypatch.setattr(kernels, "measure", lambda *arguments, **others: kernels.Measured())
    for name, value in {"current_device": 0, "device_count": 1, "get_device_name": "GPU", "synchronize": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, value=value: value)


def _arguments(output: Path) -> argparse.Namespace:
    return argparse.Namespace(
        link=["paced:1"],
        cases="",
        quick=False,
        repeats=2,
        budget=50.0,
        output=output,
        device="cuda",
        row_limit=None,
        measure=["kernels", "links"],
    )


def test_a_whole_run_goes_on_behind_rows_that_fail_and_stops_at_its_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but the device: order of rows, new emulations, the document, the exit status."""
    right, clock = emulated.measure_case, iter((0.0, *[1.0] * 8, *[100.0] * 8))
    opened: list[str] = []

    def measure(case: EmulatedCase, emulation: Emulation, **others: Any) -> dict[str, Any]:
        if case.phase == "backward" and case.operator == "all_gather_linear":
            raise RuntimeError("out of memory")
        return right(case, emulation, **others)

    def emulate(device: Any, group: dist.ProcessGroup, link: str, cases: Any) -> Any:
        opened.append(link)
        return _emulate(device, group, link, cases)

    class Wall(EventTimer):
        def __init__(self, device: torch.device) -> None:
            self.ahead_of = 0.0

        def __call__(self, call: Callable[[], Any]) -> tuple[float, Any]:
            assert self.ahead_of > 0, "the device must be kept busy for as long as the host needs"
            return _wall(call)

        def stay_ahead(self, host_s: float) -> None:
            self.ahead_of = host_s

    class Clock:
        monotonic = staticmethod(lambda: next(clock))
        perf_counter = staticmethod(time.perf_counter)

    _pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(emulated, "time", Clock)
    monkeypatch.setattr(emulated, "measure_case", measure)
    monkeypatch.setattr(emulated, "emulate", emulate)
    monkeypatch.setattr(emulated, "EventTimer", Wall)
    assert emulated.run(_arguments(tmp_path)) == 1
    document = json.loads(next(tmp_path.glob("emulated-*.json")).read_text())
    assert opened == ["paced:1", "paced:1"], "a row that failed may have left its emulation broken"
    names = [case.name for case in _CASES]
    assert [row["name"] for row in document["rows"]] == [names[0], names[2]]
    assert document["failed"] == [{"name": names[1], "failed": "RuntimeError: out of memory"}]
    assert document["not_run"] == [names[3]]
    assert document["arguments"]["repeats"] == 2
    printed = capsys.readouterr().out
    assert "EMULATED" in printed
    assert "Copies run on copy engines." in printed
    assert math.isfinite(document["rows"][0]["figures"]["fused / limit"])


def test_an_interrupted_run_keeps_its_rows_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = emulated.measure_case

    def measure(case: EmulatedCase, emulation: Emulation, **others: Any) -> dict[str, Any]:
        if case == _CASES[2]:
            raise KeyboardInterrupt
        if case == _CASES[1]:
            raise Exception("as errors of Triton are")
        return right(case, emulation, **{**others, "timed": _wall})

    _pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(emulated, "measure_case", measure)
    monkeypatch.setattr(emulated, "emulate", _emulate)
    monkeypatch.setattr(emulated, "EventTimer", type("Timer", (EventTimer,), {"__init__": lambda self, device: None}))
    assert emulated.run(_arguments(tmp_path)) == 1
    document = json.loads(next(tmp_path.glob("emulated-*.json")).read_text())
    assert [row["name"] for row in document["rows"]] == [_CASES[0].name]
    assert document["failed"] == [{"name": _CASES[1].name, "failed": "Exception: as errors of Triton are"}]
    assert document["not_run"] == [_CASES[2].name, _CASES[3].name]
    assert any("INTERRUPTED" in note for note in document["notes"])
    assert "interrupted: what was measured so far is kept" in capsys.readouterr().err


def test_rows_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a limit for a row the document has the rows that ended, and names those that failed or did not begin."""
    names = [case.name for case in _CASES]
    with _emulation() as emulation:
        row = emulated.measure_case(_CASES[0], emulation, rounds=2, timed=_wall, synchronize=lambda: None)
    outcomes = [
        isolated.Outcome("reduce of 2", 1.0, failed="it was ended after 9 s, the limit of a row"),
        isolated.Outcome(
            names[0], 2.0, {"row": emulated_report.summarize(row), "copies": "Copies run on copy engines."}
        ),
    ]

    def measure_each(jobs: Any, path: Path, *, limit_s: float, deadline: float, preload: Any) -> Iterator[Any]:
        assert [job.name for job in jobs] == ["reduce of 2", *names] and limit_s == 9.0 and deadline < math.inf
        lines = [{"planned": [job.name for job in jobs]}, *(dataclasses.asdict(outcome) for outcome in outcomes)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        yield from outcomes

    _pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(isolated, "measure_each", measure_each)
    monkeypatch.setattr(kernels, "problem_names", lambda quick: ["reduce of 2"])
    monkeypatch.setattr(kernels, "note_multicast", lambda device: "multimem_reduce: not measured.")
    arguments = _arguments(tmp_path)
    arguments.row_limit = 9.0
    assert emulated.run(arguments) == 1
    document = json.loads(next(tmp_path.glob("emulated-*.json")).read_text())
    assert [found["name"] for found in document["rows"]] == names[:1]
    assert document["failed"] == [{"name": "reduce of 2", "failed": "it was ended after 9 s, the limit of a row"}]
    assert document["not_run"] == names[1:]
    assert document["notes"] == ["multimem_reduce: not measured.", "Copies run on copy engines."]


def test_a_row_alone_is_the_row_of_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With what was predicted for it, which a report prints beside what was measured."""

    class Wall(EventTimer):
        def __init__(self, device: torch.device) -> None:
            pass

        def __call__(self, call: Callable[[], Any]) -> tuple[float, Any]:
            return _wall(call)

        def stay_ahead(self, host_s: float) -> None:
            pass

    _pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(emulated, "make_emulated_cases", lambda *arguments, **others: [_CASES[2]])
    monkeypatch.setattr(emulated, "emulate", _emulate)
    monkeypatch.setattr(emulated, "EventTimer", Wall)
    alone = json.loads(json.dumps(emulated.measure_alone(_CASES[2], 2)))  # as it leaves its process
    assert emulated.run(_arguments(tmp_path)) == 0
    whole = json.loads(next(tmp_path.glob("emulated-*.json")).read_text())["rows"][0]
    assert alone["copies"] == "Copies run on copy engines."
    assert whole.keys() == alone["row"].keys() and whole["name"] == alone["row"]["name"]
    for row in (whole, alone["row"]):
        assert set(row["predicted_s"]) == set(PREDICTED) and min(row["predicted_s"].values()) > 0
        assert row["host_s"]["fused"] > 0


def test_what_is_compiled_before_is_what_rows_launch() -> None:
    """An operator and phase each, whose sizes a launch specialises on as on the benchmark's: all multiples of 16."""
    pytest.importorskip("triton")
    from benchmarks.device.warm import warm_cases, warm_jobs

    wanted = {(case.operator, case.phase) for case in make_emulated_cases()}
    assert {(case.operator, case.phase) for case in warm_cases()} == wanted
    assert all(size % 16 == 0 for case in warm_cases() for size in (case.rows, case.inner, case.outer))
    # Each with as many configurations as a kernel of its own has: six of the gather product, four of the others.
    counts = collections.Counter((case.operator, case.phase) for case, _ in warm_jobs())
    gathering = {("all_gather_linear", "forward"), ("linear_reduce_scatter", "backward")}
    assert counts == {name: 6 if name in gathering else 4 for name in wanted}


def test_tiles_that_do_not_compile_are_impossible_and_other_modes_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _CASES[0]

    def fail(work: EmulatedWorkload, mode: str, pieces: int | str) -> Callable[[], tuple[Tensor, ...]]:
        if mode == failing:
            raise Exception("out of resource: shared memory")
        return lambda: ()

    monkeypatch.setitem(MODES, "tiles", "tiles")
    monkeypatch.setattr(EmulatedWorkload, "_operator", fail)
    with _emulation() as emulation:
        work, failing = EmulatedWorkload(case, emulation), "tiles"
        assert set(work.calls()) == {"gemm", "link", "serial", "fused", "fused/2"}
        assert work.impossible == {"tiles": "out of resource: shared memory"}
        failing = "fused"
        with pytest.raises(Exception, match="out of resource"):
            work.calls()


def test_what_was_not_sent_is_noticed() -> None:
    case = _CASES[2]
    assert case.scatters
    with _emulation() as emulation:
        work = EmulatedWorkload(case, emulation)
        fused = work.calls()["fused"]
        work.fill()
        work.spoil()
        assert not work.sent_error() <= work.tolerance
        fused()
        assert work.sent_error() <= work.tolerance


def test_silent_peers_satisfy_every_wait_and_keep_what_they_were_filled_with() -> None:
    """Several windows, uses and sizes: no wait stops the rank, and what it reads is what lies there."""
    config = OverlapConfig(mode="fused", chunks_per_rank=2, timeout_s=5.0)
    machine = _SilentMachine(3)
    transport = _EagerTransport(machine)
    for rows in (4, 4, 4, 6, 6, 4):
        seen: dict[int, Tensor] = {}

        def consume(source: int, start: int, stop: int, block: Tensor, seen: dict[int, Tensor] = seen) -> None:
            seen[source] = torch.cat((seen[source], block)) if source in seen else block.clone()

        shard, out = torch.randn(1, rows, 2), torch.full((1, rows, 2), torch.nan)
        call = Call("operator", "forward", config, Gather(shard, consume))
        transport.execute(call)  # memory as large as it needs to be
        for peer in (1, 2):
            for place in ((SHARD, window) for window in range(WINDOWS)):
                if machine.memory.backed(place):
                    machine.memory.memory(peer, place).view(torch.float32).fill_(peer)
        seen.clear()
        transport.execute(call)
        assert torch.equal(seen[0], shard)
        assert all((seen[peer] == peer).all() for peer in (1, 2))
        transport.execute(
            Call("operator", "backward", config, None, Scatter(out, lambda t, start, stop, block: block.fill_(1 + t)))
        )
        assert torch.equal(out, torch.ones_like(out))  # peers send zero
    words = machine.memory.own_words().view(len(KINDS), WINDOWS, WORDS, 3)
    assert (words[:, :, :2] == SATISFIED).all()
    assert not (words[:, :, 2] == SATISFIED).any()
    assert machine.memory.backed((RECEIVE, 0)) > 0


def test_memory_of_silent_peers_stays_where_it_was_when_another_window_grows() -> None:
    memory = SilentPeers(torch.device("cpu"), 3)
    memory.grow({(SHARD, 0): 64, (SHARD, 1): 64})
    before = [memory.window(rank, (SHARD, 0)) for rank in range(3)]
    assert len(set(before)) == 3
    assert before == [memory.window(rank, (SHARD, 1)) for rank in range(3)]
    memory.grow({(SHARD, 1): 256})
    assert before == [memory.window(rank, (SHARD, 0)) for rank in range(3)]
    assert (memory.backed((SHARD, 0)), memory.backed((SHARD, 1)), memory.backed((RECEIVE, 0))) == (64, 256, 0)
    memory.grow({(RECEIVE, 2): 32})
    assert memory.window(1, (RECEIVE, 2)) == memory.window(2, (RECEIVE, 2)) != memory.window(0, (RECEIVE, 2))


def test_case_sizes_count_what_travels() -> None:
    rows = {(case.operator, case.phase): case for case in _CASES}
    forward = rows["all_gather_linear", "forward"]
    assert forward.link_bytes == 3 * 16 * 128 * 2
    assert rows["all_gather_linear", "backward"].link_bytes == 2 * forward.link_bytes
    assert rows["linear_reduce_scatter", "backward"].link_bytes == 3 * 16 * 128 * 2
    assert rows["linear_reduce_scatter", "forward"].flops * 2 == rows["linear_reduce_scatter", "backward"].flops
    assert not forward.judged
    assert dataclasses.replace(forward, tokens=4 * 4096).judged
