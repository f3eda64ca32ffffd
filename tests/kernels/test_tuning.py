"""The choice of a tile configuration by timing, with a stand-in for the clock: kernels do not run here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from triton.runtime.errors import OutOfResources

from odysseus_kernels.errors import KernelUnavailableError
from odysseus_kernels.kernels import launch, tuning
from odysseus_kernels.kernels.configs import Problem, Target, TileConfig, candidates, shipped
from odysseus_kernels.kernels.tuning import SATISFIED, Signals, fastest

TARGET = Target(90, 132, 227 * 1024)
PROBLEM = Problem(8, 4096, (1536,), 4096)


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    free = mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False)
    with mock.patch.object(tuning, "_found", {}), mock.patch.object(tuning, "target_of", return_value=TARGET), free:
        yield


def like(device: str = "cuda") -> Any:
    return mock.Mock(device=mock.Mock(type=device), dtype=torch.bfloat16)


def test_the_fastest_is_kept_and_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODYSSEUS_SPECIALIZED_TILES", "1")
    ran, operand = [], like()
    configs = candidates("gather_matmul", TARGET, torch.bfloat16, PROBLEM)
    times = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])

    def trial() -> Any:
        ran.append("trial")
        return ran.append

    def seconds(run: Any) -> float:
        run()
        return next(times)

    assert len(configs) == 6
    for _ in range(2):
        assert fastest("gather_matmul", PROBLEM, operand, trial, seconds=seconds) == configs[1]
    assert ran == ["trial", *(config for config in configs for _ in range(2))]  # one run compiles, one is timed
    again = fastest("gather_matmul", PROBLEM, operand, trial, layout="other", seconds=lambda run: 1.0)
    assert again == configs[0] and ran.count("trial") == 2


@pytest.mark.parametrize("wanted", [False, True])
def test_specialized_ones_are_timed_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    monkeypatch.setenv("ODYSSEUS_SPECIALIZED_TILES", "1" if wanted else "")
    timed: list[TileConfig] = []
    fastest("gather_matmul", PROBLEM, like(), lambda: timed.append, seconds=lambda run: 1.0)
    assert any(config.specialized for config in timed) == wanted


def test_configurations_that_do_not_fit_are_left_out() -> None:
    configs = candidates("gather_matmul", TARGET, torch.bfloat16, PROBLEM)

    def refuse(*fitting: Any) -> Any:
        def run(config: Any) -> None:
            if config not in fitting:
                raise OutOfResources(300000, 232448, "shared memory")

        return lambda: run

    assert fastest("gather_matmul", PROBLEM, like(), refuse(configs[2]), seconds=lambda run: 1.0) == configs[2]
    with pytest.raises(KernelUnavailableError, match="gather_matmul cannot be had .* OutOfResources: .*shared memory"):
        fastest("gather_matmul", PROBLEM, like(), refuse(), layout="none", seconds=lambda run: 1.0)


@pytest.mark.parametrize("kind", (AssertionError, AttributeError, TypeError, KeyError))
def test_a_configuration_that_fails_in_any_way_leaves_the_others(kind: type[Exception]) -> None:
    """Such as a specialized one with a Triton whose Gluon has other names."""
    configs = candidates("gather_matmul", TARGET, torch.bfloat16, PROBLEM)

    def run(config: Any) -> None:
        if config != configs[1]:
            raise kind("of the compiler")

    assert fastest("gather_matmul", PROBLEM, like(), lambda: run, seconds=lambda run: 1.0) == configs[1]


def test_what_specialized_kernels_do_not_serve_others_do() -> None:
    special = next(each for each in shipped("gather_matmul", 90, torch.bfloat16) if each.specialized)

    def chosen(dtype: torch.dtype = torch.bfloat16, describable: bool = True, target: Target = TARGET) -> TileConfig:
        operand = like()
        operand.dtype = dtype
        with mock.patch.object(launch, "target_of", return_value=target):
            return launch.choose("gather_matmul", special, PROBLEM, operand, describable)

    with mock.patch.object(launch, "interpreted", return_value=False):
        assert chosen() == chosen(torch.float16) == special
        assert not chosen(describable=False).specialized and not chosen(describable=False).descriptors
        assert not chosen(torch.float32).specialized
        assert not chosen(target=Target(100, 148, 227 * 1024)).specialized
    with mock.patch.object(launch, "interpreted", return_value=True):
        assert not chosen().specialized


def test_nothing_is_timed_without_a_device_or_in_a_capture() -> None:
    def trial() -> Any:
        raise AssertionError("nothing to time with")

    assert fastest("gather_matmul", PROBLEM, like("cpu"), trial) is None
    assert fastest("gather_matmul", Problem(8, 64, (64,), 64), like(), trial) is None  # too small to matter
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
        assert fastest("gather_matmul", PROBLEM, like(), trial) is None


def test_signals_that_satisfy_every_wait() -> None:
    signals = Signals(4, torch.device("cpu"))
    for value in (-255, -1, 64, 255):
        assert ((signals.words - value) >= 0).all()
    assert SATISFIED + 255 < 2**31
    assert signals.waited_addresses().tolist() == [signals.words.data_ptr() + 4 * rank for rank in range(4)]
    assert signals.set_addresses()[0] == signals.set.data_ptr() and not signals.counters.any()
