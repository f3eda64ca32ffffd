"""``mode="auto"``: measured where asked for, visible, and refused where a mode cannot be had."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import selection_cases
import torch

import odysseus_kernels as ody
from odysseus_kernels import _ext
from odysseus_kernels.comm import groups
from odysseus_kernels.comm.choice import selection
from odysseus_kernels.comm.choice.decision import explain
from odysseus_kernels.comm.choice.selection import Phase, Selection
from odysseus_kernels.comm.collective.transport import CollectiveTransport
from odysseus_kernels.comm.device.transport import SymmetricDeviceTransport
from odysseus_kernels.comm.group_transports import GroupTransports
from odysseus_kernels.testing.spawn import RankPool

PHASES = [
    f"{operator} {phase}"
    for operator in ("all_gather_linear", "linear_reduce_scatter", "zero3_linear")
    for phase in ("forward", "backward")
]


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_modes_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    """The second run of the program finds what the first has measured; timing is neither counted nor seen."""
    monkeypatch.setenv("ODYSSEUS_CACHE_DIR", str(tmp_path))  # read when it is used, so forked ranks do
    for how in ("measured", "cached"):
        with RankPool(2, timeout=60) as pool:
            for made, counted, table in pool.run(selection_cases.measured, transport):
                assert made == [f"{phase} {how}" for phase in PHASES]
                assert counted == [0, 0]
                assert "unfused" in table and "fused" in table and how in table
    assert [path.suffix for path in sorted(tmp_path.iterdir())].count(".json") == 1


def test_modes_are_predicted_alike(ranks: Any) -> None:
    one, other = ranks(2).run(selection_cases.modelled)
    assert one == other and len(one) >= len(PHASES)


def test_tiles_need_a_gpu(ranks: Any) -> None:
    for messages in ranks(2).run(selection_cases.refused):
        assert len(messages) == 6
        assert all("expected mode" in message and "CUDA tensors" in message for message in messages)


def test_tensors_of_a_gpu_without_one(ranks: Any) -> None:
    """Where the CUDA part is built there is no GPU; where it is not, the error says how to build it."""
    for messages in ranks(2).run(selection_cases.no_cuda):
        assert len(messages) == 4
        if not _ext.has_cuda():
            assert all(m.startswith("ExtensionNotBuiltError") and "pip install -e ." in m for m in messages[:2])
        assert "expected cpu tensors as in earlier calls" in messages[2]
        assert "expected CPU or CUDA tensors, got meta" in messages[3]


def test_a_build_without_cuda_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "has_cuda", lambda: False)
    reason = _ext.why_no_cuda()
    assert "pip install -e ." in reason and "nvcc" in reason and "ODYSSEUS_BUILD_CUDA" in reason


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="tune: expected one of"):
        ody.OverlapConfig(tune="guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tile_bytes: expected a whole number"):
        ody.OverlapConfig(tile_bytes=-1)
    config = ody.OverlapConfig(mode="tiles", tune="model", tile_bytes=5, chunks_per_rank=3)
    assert ody.OverlapConfig.from_key(config.key()) == config
    assert groups.explain.__doc__


@pytest.mark.parametrize(("columns", "most"), ((1280, 2), (4096, 8)))
def test_a_predicted_mode_says_in_how_many_pieces(monkeypatch: pytest.MonkeyPatch, columns: int, most: int) -> None:
    """Those for which it was predicted: what the transport would take by itself fills no waves of a narrow product."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(selection, "_cache", lambda cuda: None)
    world, rows, depth = 8, 4096, 8192
    flops, nbytes = 2 * world * rows * depth * columns, rows * depth * 2
    phase = Phase("all_gather_linear", "forward", "x", "", torch.bfloat16, flops, nbytes, rows=rows, columns=columns)
    transport: Any = SimpleNamespace(name="symmetric", world=world, rank=0, trial=contextlib.nullcontext)
    chosen = Selection(torch.device("cuda", 0), lambda text: [text] * world)
    settled = chosen.settle(transport, ody.OverlapConfig(tune="model"), phase, lambda *_: None)
    (decision,) = chosen.decisions
    assert decision.how == "model" and set(decision.seconds) == {"unfused", *(f"fused/{n}" for n in (1, 2, 4, 8))}
    assert settled.mode == "fused" and settled.chunks_per_rank in range(1, most + 1)
    assert decision.mode == f"fused/{settled.chunks_per_rank}"
    # Half of the multiprocessors have no tile of a quarter of 4096 x 1280.
    assert (decision.seconds["fused/4"] > 1.2 * decision.seconds["fused/2"]) == (columns == 1280)


class Timed:
    """A phase whose modes take ``seconds``, by the transport's name and the mode; what ran is in ``ran``."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.ran = seconds, list[str]()
        self.connected = 0

    def run(self, transport: Any, config: ody.OverlapConfig) -> None:
        self.ran.append(f"{transport.name}_{config.mode}")

    def measure(self, run: Any) -> float:
        run()
        return self.seconds[self.ran[-1]]

    def library(self) -> Any:
        self.connected += 1
        return SimpleNamespace(name="collective")


@pytest.mark.parametrize(
    ("library", "mode", "transport"), ((1.0, "unfused", "collective"), (1.99, "fused", "auto"), (5.0, "fused", "auto"))
)
def test_unfused_is_compared_with_nccl_as_torch_uses_it(
    monkeypatch: pytest.MonkeyPatch, library: float, mode: str, transport: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(selection, "_cache", lambda cuda: None)
    phase = Phase("all_gather_linear", "forward", "x", "", torch.bfloat16, 1000)
    timed = Timed(symmetric_unfused=3.0, symmetric_fused=1.5, collective_unfused=library)
    chosen = Selection(torch.device("cuda", 0), lambda text: [text] * 2)
    chosen._choices._timer = timed
    used: Any = SimpleNamespace(name="symmetric", world=2, rank=0, trial=contextlib.nullcontext)
    for _ in range(2):
        settled = chosen.settle(used, ody.OverlapConfig(), phase, timed.run, timed.library)
        assert (settled.mode, settled.transport) == (mode, transport)
    assert timed.connected == 1 and "collective_unfused" in timed.ran
    assert "unfused/library" in chosen.decisions[0].seconds
    assert ("unfused/library" in explain(chosen.decisions).splitlines()[2]) == (mode == "unfused")
    # Whoever asks for the symmetric transport gets it, whatever was found for others.
    asked = chosen.settle(used, ody.OverlapConfig(transport="symmetric"), phase, timed.run)
    assert (asked.mode, asked.transport) == ("fused", "symmetric") and timed.connected == 1


def test_where_nccl_is_a_choice_and_who_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    transports: Any = object.__new__(GroupTransports)
    transports._fixed, transports._compares_nccl, transports._lock = None, True, threading.Lock()
    transports._selection, offered = mock.Mock(), []
    transports._selection.settle = lambda transport, config, phase, run, library: offered.append(library) or config
    device, phase = torch.device("cuda", 0), Phase("all_gather_linear", "forward", "x", "", torch.bfloat16, 1000)
    symmetric: Any = object.__new__(SymmetricDeviceTransport)
    collective: Any = object.__new__(CollectiveTransport)
    auto = ody.OverlapConfig()
    for transport, config, one, there in (
        (symmetric, auto, phase, True),
        (symmetric, dataclasses.replace(auto, transport="symmetric"), phase, False),
        (symmetric, dataclasses.replace(auto, mode="fused"), phase, False),
        (symmetric, auto, dataclasses.replace(phase, switched=True), False),
        (collective, auto, phase, False),
    ):
        transports.settle(transport, config, one, device, lambda *_: None)
        assert (offered.pop() is not None) == there
    for name, value in (("_compares_nccl", False), ("_fixed", symmetric)):
        with mock.patch.object(transports, name, value):
            transports.settle(symmetric, auto, phase, device, lambda *_: None)
            assert offered.pop() is None

    ran: list[Any] = []
    stand_in = mock.Mock(choose=lambda *_: symmetric, collective=lambda config, device: (config, "NCCL"))
    stand_in.settle = lambda *_: settled
    monkeypatch.setattr(groups, "group_transports", lambda group: stand_in)
    group: Any = SimpleNamespace(group_name="group")
    for settled, wanted in (
        (dataclasses.replace(auto, mode="fused"), symmetric),
        (dataclasses.replace(auto, mode="unfused", transport="collective"), (auto, "NCCL")),
    ):
        groups.dispatch(group, auto, torch.device("cpu"), lambda *called: ran.append(called), phase)
        assert ran.pop() == (wanted, settled)


def test_what_a_switch_makes_is_timed_apart() -> None:
    """A mode that was fastest from rank to rank need not be through the switch; what was kept before stays valid."""
    made = Selection(torch.device("cpu"), lambda text: [text])
    phase = Phase("linear_reduce_scatter", "forward", "x [8]", "8", torch.bfloat16, 1000)
    transport: Any = SimpleNamespace(name="symmetric", world=2)
    keys = [
        made._key(transport, ody.OverlapConfig(), dataclasses.replace(phase, switched=switched))
        for switched in (False, True)
    ]
    assert keys[0] != keys[1] and "switch" not in keys[0].settings
