"""What ranks with GPUs run: the operators' cases of the CPU tests on CUDA tensors, faults, captured graphs.

Ranks may share a GPU, which then gives each of them a slice of its time in turn: slow, and right.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.testing.compare import assert_close_to_truth
from odysseus_kernels.testing.faults import kill_self

sys.path.append(str(Path(__file__).resolve().parents[1] / "ops"))

import operator_cases

Arguments = tuple[Any, ...]

# cuBLAS gives repeatable results only with a workspace of its own for each stream; memory that is filled with NaN under
# test needs torch's deterministic mode, which asks for that.
ENVIRONMENT = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def device_of(rank: int) -> torch.device:
    """This rank's GPU, made current."""
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


# ---- operators -------------------------------------------------------------------------------------------------------


def _poison_windows() -> None:
    """Fills this rank's windows with NaN, once nobody uses them any more."""
    transport = group_transports(dist.group.WORLD)._symmetric
    if transport is None or transport.broken:
        return
    ody.synchronize()
    dist.barrier()
    for memory, *_ in transport._device._memory._windows.values():
        memory.fill_(0xFF)
    torch.cuda.synchronize()
    dist.barrier()


@contextlib.contextmanager
def _cases_on(device: torch.device, modes: tuple[str, ...]) -> Iterator[None]:
    """The cases draw the same numbers as on the CPU, and everything that follows from them is on the GPU."""
    draw = operator_cases._random

    def on_device(*arguments: Any) -> Callable[..., Tensor]:
        make = draw(*arguments)
        return lambda *shape: make(*shape).to(device)

    with (
        mock.patch.object(operator_cases, "_random", on_device),
        mock.patch.object(operator_cases, "poison_windows", _poison_windows),
        mock.patch.object(operator_cases, "MODES", modes),
        _whole_sums(),
    ):
        yield


@contextlib.contextmanager
def _whole_sums() -> Iterator[None]:
    """cuBLAS rounds no sum on its way: by default it may, for some shapes, and modes multiply in different shapes."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(matmul, name) for name in names}
    try:
        for name in names:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


def check(rank: int, world: int, checks: list[Arguments], modes: tuple[str, ...] = ("fused", "unfused")) -> None:
    """Several of ``operator_cases.check`` in one go."""
    with _cases_on(device_of(rank), modes):
        for arguments in checks:
            operator_cases.check(rank, world, *arguments)
    ody.synchronize()


# ---- faults ----------------------------------------------------------------------------------------------------------


def _attempt(function: Callable[[], object]) -> tuple[str, str, float]:
    start = time.perf_counter()
    try:
        function()
    except Exception as error:  # noqa: BLE001 - which one it is, is the result
        return type(error).__name__, str(error), time.perf_counter() - start
    return "", "", time.perf_counter() - start


def _calls(rank: int, world: int, timeout_s: float) -> dict[str, Callable[..., Tensor]]:
    device = device_of(rank)
    config = ody.OverlapConfig(mode="fused", transport="symmetric", timeout_s=timeout_s)

    def gather(rows: int = 16) -> Tensor:
        x, weight = torch.ones(rows, 32, device=device), torch.ones(8, 32, device=device)
        return ody.all_gather_linear(x, weight, group=None, config=config)

    def scatter(rows: int = 16) -> Tensor:
        x, weight = torch.ones(rows * world, 8, device=device), torch.ones(32, 8, device=device)
        return ody.linear_reduce_scatter(x, weight, group=None, config=config)

    return {"all_gather_linear": gather, "linear_reduce_scatter": scatter}


def _begin(rank: int, world: int, timeout_s: float) -> dict[str, Callable[..., Tensor]]:
    """All ranks make every call a few times, until nothing has to be made or agreed on any more."""
    calls = _calls(rank, world, 60.0)
    for _ in range(3):
        for call in calls.values():
            call()
        ody.synchronize()
    dist.barrier()
    return _calls(rank, world, timeout_s)


def absent_rank(rank: int, world: int, operator: str, absent: int, timeout_s: float) -> Any:
    """One rank is alive and does not call."""
    call = _begin(rank, world, timeout_s)[operator]
    if rank == absent:
        time.sleep(timeout_s + 4)
        return None

    def run() -> None:
        call()
        ody.synchronize()

    return _attempt(run)


def killed_rank(rank: int, world: int, operator: str, victim: int) -> Any:
    """One rank's process ends without a word while the others wait for it."""
    call = _begin(rank, world, 60.0)[operator]
    if rank == victim:
        time.sleep(0.5)
        kill_self()

    def run() -> None:
        call()
        ody.synchronize()

    return _attempt(run)


def odd_rank(rank: int, world: int, odd: int) -> Any:
    """One rank calls with another shape; everybody learns which one by the next call."""
    gather = _begin(rank, world, 20.0)["all_gather_linear"]

    def run() -> None:
        gather(rows=15 if rank == odd else 16)
        time.sleep(0.3)  # ranks compare beside the device's work
        ody.synchronize()
        gather()
        ody.synchronize()

    return _attempt(run)


# ---- graphs ----------------------------------------------------------------------------------------------------------


def captured_operator(rank: int, world: int, operator: str, mode: str, dtype: str) -> int:
    """Forward and backward captured; replays with new inputs, between eager calls, equal eager calls."""
    device, kind = device_of(rank), getattr(torch, dtype)
    config = ody.OverlapConfig(mode=mode, transport="symmetric", timeout_s=30.0)
    rows, features, outputs = 64, 128, 64
    length = rows * world
    gathers = operator == "all_gather_linear"
    generator = torch.Generator().manual_seed(100 + rank)

    def fill(tensor: Tensor) -> None:
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))

    x = torch.empty(rows if gathers else length, features, device=device, dtype=kind, requires_grad=True)
    weight = torch.empty(outputs, features, device=device, dtype=kind, requires_grad=True)
    grad = torch.empty(length if gathers else rows, outputs, device=device, dtype=kind)

    def step() -> tuple[Tensor, ...]:
        y = getattr(ody, operator)(x, weight, group=None, config=config)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for tensor in (x, weight, grad):
        fill(tensor)
    with torch.cuda.stream(side):
        for _ in range(4):  # windows, plans, tables and the library's workspaces are there afterwards
            step()
    torch.cuda.current_stream().wait_stream(side)
    ody.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = step()
    for replay in range(5):
        for tensor in (x, weight, grad):
            fill(tensor)
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        ody.synchronize()
        found = [result.clone() for result in results]
        for name, one, other in zip(("output", "input gradient", "weight gradient"), found, step(), strict=True):
            # The same products in the same order; the library may choose another split of long sums.
            assert_close_to_truth(
                one, other.double(), dtype=kind, terms=length + features, name=f"{name} of replay {replay}"
            )
    ody.synchronize()
    return 5


# ---- NCCL ------------------------------------------------------------------------------------------------------------


def try_nccl(rank: int, world: int, own_host: bool) -> float:
    """One collective; with ``own_host`` NCCL takes each rank for a machine of its own, reached over the loopback."""
    if own_host:
        os.environ["NCCL_HOSTID"] = f"odysseus-test-{rank}"  # read when the first communicator is made
    one = torch.ones(1, device=device_of(rank))
    dist.all_reduce(one)
    torch.cuda.synchronize()
    return one.item()


def recorded_transport(rank: int, world: int) -> list[str]:
    """Names of the transports that carried a call that asked for the collective one."""
    device = device_of(rank)
    x, weight = torch.ones(16, 32, device=device), torch.ones(8, 32, device=device)
    with ody.CommRecorder() as record:
        y = ody.all_gather_linear(x, weight, group=None, config=ody.OverlapConfig(transport="collective", mode="fused"))
    ody.synchronize()
    assert torch.equal(y, torch.full_like(y, 32.0))
    return [row["transport"] for row in record.rows()]
