"""What ranks run in the fault tests.  Results are (error, message, seconds); a rank that is killed returns nothing."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm.functional import all_gather, all_reduce, reduce_scatter
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.testing.faults import Jitter, kill_self


def _attempt(function: Callable[[], object]) -> tuple[str, str, float]:
    start = time.perf_counter()
    try:
        function()
    except Exception as error:  # noqa: BLE001 - which one it is, is the result
        return type(error).__name__, str(error), time.perf_counter() - start
    return "", "", time.perf_counter() - start


def _config(transport: str, mode: str = "fused", timeout_s: float = 20) -> ody.OverlapConfig:
    return ody.OverlapConfig(mode=mode, transport=transport, timeout_s=timeout_s)


def _gather(config: ody.OverlapConfig, rows: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    x, w = torch.ones(rows, 8, dtype=dtype), torch.ones(6, 8, dtype=dtype)
    return ody.all_gather_linear(x, w, group=None, config=config)


def _scatter(config: ody.OverlapConfig) -> Tensor:
    world = dist.get_world_size()
    return ody.linear_reduce_scatter(torch.ones(4 * world, 8), torch.ones(6, 8), group=None, config=config)


def odd_rank(rank: int, world: int, transport: str, mode: str, what: str, odd: int) -> Any:
    """Everybody agrees once, then one rank calls something else, then everybody agrees again."""
    config = _config(transport, mode)
    _gather(config)
    calls: dict[str, Callable[[], object]] = {
        "shape": lambda: _gather(config, rows=5),
        "dtype": lambda: _gather(config, dtype=torch.float64),
        "operator": lambda: _scatter(config),
        "mode": lambda: _gather(dataclasses.replace(config, mode="unfused" if mode == "fused" else "fused")),
        "pieces": lambda: _gather(dataclasses.replace(config, chunks_per_rank=2)),
    }
    result = _attempt(calls[what] if rank == odd else lambda: _gather(config))
    # The error leaves nothing behind: the group works again at once.
    again = _gather(config)
    assert torch.equal(again, torch.full((4 * world, 6), 8.0))
    return result


def killed_rank(rank: int, world: int, transport: str, operator: str, victim: int) -> Any:
    config = _config(transport)
    call = {"gather": _gather, "scatter": _scatter}[operator]
    call(config)
    if rank == victim:
        time.sleep(0.5)
        kill_self()
    result = _attempt(lambda: call(config))
    names = sorted(path.name for path in Path("/dev/shm").glob("*odysseus*"))
    return *result, names


def absent_rank(rank: int, world: int, transport: str, absent: int, timeout_s: float) -> Any:
    """One rank is alive and does not come."""
    config = _config(transport, timeout_s=timeout_s)
    _gather(config)
    if rank == absent:
        time.sleep(timeout_s + 4)
        return None
    return _attempt(lambda: _gather(config))


def failing_rank(rank: int, world: int, transport: str, program: str, failing: int) -> Any:
    """One rank's own code fails within an operator: its peers are told why, and do not wait."""
    from odysseus_kernels.comm.transport import Call, Gather, Scatter

    config = _config(transport)
    _gather(config)
    chosen = group_transports(dist.group.WORLD).choose(config, torch.device("cpu"))

    def compute(source: int, start: int, stop: int, block: Tensor) -> None:
        if rank == failing:
            raise MemoryError("no memory for the product")

    block = torch.ones(1, 4, 8)
    if program == "gather":
        call = Call("probe", "forward", config, Gather(block, compute))
    else:
        call = Call("probe", "forward", config, scatter=Scatter(block, compute))
    result = _attempt(lambda: chosen.execute(call))
    if not result[0]:  # this rank had all it needed; it learns at its next call
        result = _attempt(lambda: chosen.execute(call))
    return result


def small_memory(rank: int, world: int) -> Any:
    """Shared memory for small calls only: large ones fall back with one warning, and small ones go on as before."""
    config = ody.OverlapConfig(timeout_s=30)
    messages, transports = [], []
    for rows in (64, 4096, 64, 8192, 64):
        x, w = torch.randn(rows, 512), torch.randn(4, 512)
        with warnings.catch_warnings(record=True) as caught, ody.CommRecorder() as record:
            warnings.simplefilter("always")
            y = ody.all_gather_linear(x, w, group=None, config=config)
        transports.append([row["transport"] for row in record.rows()])
        messages += [str(one.message) for one in caught if issubclass(one.category, ody.CapacityWarning)]
        expected = torch.nn.functional.linear(all_gather(x), w)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)  # fp32, sums of 512 terms
    return messages, transports


def no_memory_directory(rank: int, world: int) -> Any:
    """No symmetric transport at all: ``auto`` says so once and works, ``symmetric`` refuses."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = _gather(ody.OverlapConfig(timeout_s=30))
        _gather(ody.OverlapConfig(timeout_s=30))
    assert torch.equal(y, torch.full((4 * world, 6), 8.0))
    messages = [str(one.message) for one in caught if issubclass(one.category, ody.FallbackWarning)]
    return messages, _attempt(lambda: _gather(_config("symmetric")))


def random_order(rank: int, world: int, seed: int, count: int, late: bool) -> int:
    """``count`` operators of random kinds, sizes and settings back to back, each result compared with the truth.

    The ranks draw the same calls and different delays, and nothing but the operators orders them.
    """
    draw = torch.Generator().manual_seed(seed)
    jitter = Jitter(seed, rank, longest_s=0.003, share=0.2 if late else 0.0)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    def make(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=draw).double()  # sums of these are exact

    checked = 0
    for _ in range(count):
        config = ody.OverlapConfig(
            mode=pick("fused", "fused", "unfused"),
            transport=pick("symmetric", "symmetric", "symmetric", "collective"),
            chunks_per_rank=pick("auto", 1, 2, 5),
            gathered=pick("regather", "save"),
            timeout_s=30,
        )
        rows, features, outputs = pick(1, 3, 8, 40), pick(2, 16, 33), pick(1, 5, 24)
        kind = pick("gather", "scatter", "zero3", "all_reduce", "reduce_scatter")
        whole, weight = make(rows * world, features), make(world * outputs, features)
        mine = slice(rank * rows, (rank + 1) * rows)
        own = slice(rank * outputs, (rank + 1) * outputs)
        jitter()
        if kind == "all_reduce":
            results = [(all_reduce(whole * (rank + 1), config=config), whole * (world * (world + 1) // 2))]
        elif kind == "reduce_scatter":
            results = [(reduce_scatter(whole * (rank + 1), config=config), whole[mine] * (world * (world + 1) // 2))]
        else:
            results = _operator(kind, rank, world, whole, weight, mine, own, config, jitter)
        for actual, expected in results:
            assert torch.equal(actual, expected), (checked, kind, config)
            checked += 1
    return checked


def _operator(
    kind: str,
    rank: int,
    world: int,
    whole: Tensor,
    weight: Tensor,
    mine: slice,
    own: slice,
    config: ody.OverlapConfig,
    jitter: Callable[[], float],
) -> list[tuple[Tensor, Tensor]]:
    if kind == "gather":
        x, w = whole[mine].clone().requires_grad_(), weight[own].clone().requires_grad_()
        y = ody.all_gather_linear(x, w, group=None, config=config)
        jitter()
        y.backward(torch.ones_like(y))
        everyone = torch.ones(whole.shape[0], weight.shape[0], dtype=torch.float64) @ weight
        return [(y, whole @ weight[own].t()), (x.grad, everyone[mine]), (w.grad, whole.sum(0).expand_as(w))]
    if kind == "scatter":
        x, w = whole.clone().requires_grad_(), weight[own].clone().requires_grad_()
        y = ody.linear_reduce_scatter(x, w, group=None, config=config)
        jitter()
        y.backward(torch.ones_like(y))
        parts = sum(whole @ part.t() for part in weight.chunk(world))
        return [(y, parts[mine]), (x.grad, w.detach().sum(0).expand_as(x)), (w.grad, whole.sum(0).expand_as(w))]
    x, w = whole[mine].clone().requires_grad_(), weight[own].clone().requires_grad_()
    y = ody.zero3_linear(x, w, group=None, config=config, prefetch=w, prefetch_backward=w)
    jitter()
    y.backward(torch.ones_like(y))
    return [
        (y, whole[mine] @ weight.t()),
        (x.grad, weight.sum(0).expand_as(x)),
        (w.grad, whole.sum(0).expand_as(w)),
    ]


def stale_prefetch(rank: int, world: int, transport: str) -> None:
    """A weight that changes after it was sent ahead is sent again; one that is not used next is dropped."""
    config = _config(transport)
    x = torch.ones(3, 8)
    first, second = torch.full((2, 8), 1.0), torch.full((2, 8), 2.0)
    for change in (False, True):
        ody.zero3_linear(x, first, group=None, config=config, prefetch=second)
        if change:
            second.mul_(2)
        y = ody.zero3_linear(x, second, group=None, config=config, prefetch=second)
        assert torch.equal(y, torch.full((3, 2 * world), 32.0 if change else 16.0))
        y = ody.zero3_linear(x, first, group=None, config=config)
        assert torch.equal(y, torch.full((3, 2 * world), 8.0))
        second.fill_(2.0)


def clean_exit(rank: int, world: int) -> Any:
    """What is left in the directory and in this process's descriptors after the group ends."""
    _gather(_config("symmetric"))
    transports = group_transports(dist.group.WORLD)
    transports.close()
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink() and entry.exists()]
    return [link for link in links if "/dev/shm" in link]
