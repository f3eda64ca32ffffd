"""What ranks run in the tests of groups: several of them, made again, in disagreement, and what is sent ahead."""

from __future__ import annotations

import datetime
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import odysseus_kernels as ody
from odysseus_kernels.comm.functional import all_reduce
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.comm.sent_ahead import SentAhead


def _error(function: Any) -> tuple[str, str]:
    try:
        function()
    except Exception as error:  # noqa: BLE001 - which one it is, is the result
        return type(error).__name__, str(error)
    return "", ""


def _gather(group: dist.ProcessGroup | None = None, **settings: Any) -> Tensor:
    config = ody.OverlapConfig(**{"timeout_s": 20, **settings})
    return ody.all_gather_linear(torch.ones(3, 8), torch.ones(5, 8), group=group, config=config)


def subgroups(rank: int, world: int) -> None:
    """Groups side by side, each with transports of its own, used in turn."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = pairs[rank // 2]
    for _ in range(3):
        assert _gather(own).shape == (6, 5)
        assert _gather().shape == (12, 5)
        total = all_reduce(torch.tensor([float(rank)]), own)
        assert total.item() == (1 if rank < 2 else 5)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "seq"))
    y = ody.all_gather_linear(torch.full((1, 2), float(rank)), torch.ones(1, 2), group=mesh["seq"])
    assert y.flatten().tolist() == [2.0 * (rank // 2 * 2), 2.0 * (rank // 2 * 2 + 1)]


def made_again(rank: int, world: int, name: str) -> Any:
    """The default group is destroyed and made again under the same name, with shared memory given back."""
    held = []
    for round_number in range(3):
        _gather()
        transport = group_transports(dist.group.WORLD)._symmetric
        assert transport is not None
        dist.barrier()
        dist.destroy_process_group()
        held.append(transport.broken)
        meeting = Path(tempfile.gettempdir()) / f"odysseus-{name}-{round_number}"
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=30),
        )
    return held


def different_transports(rank: int, world: int) -> Any:
    return _error(lambda: _gather(transport="symmetric" if rank else "collective"))


def endless_timeout(rank: int, world: int) -> None:
    for transport in ("symmetric", "collective"):
        assert _gather(transport=transport, timeout_s=math.inf).shape == (3 * world, 5)


def out_of_step(rank: int, world: int) -> Any:
    """After a collective that one rank left in the middle, every later call says so instead of mixing data."""
    if rank == 1:
        time.sleep(3)
        return None
    first = _error(lambda: _gather(transport="collective", timeout_s=1))
    start = time.perf_counter()
    return first, _error(lambda: _gather(transport="collective")), time.perf_counter() - start


def wide_sum(rank: int, world: int) -> None:
    """reduce_dtype reaches every mode and transport: 1e8 + 1 - 1e8 is 1 in fp64 and 0 in fp32."""
    value = (1e8, 1.0, -1e8)[rank]
    for transport in ("symmetric", "collective"):
        for mode in ("fused", "unfused"):
            config = ody.OverlapConfig(mode=mode, transport=transport, reduce_dtype=torch.float64, timeout_s=20)
            x = torch.full((world, 1), value)
            y = ody.linear_reduce_scatter(x, torch.ones(1, 1), group=None, config=config)
            assert y.item() == 1.0, (transport, mode, y)


def autocast(rank: int, world: int) -> None:
    """Operators take their operands in autocast's type, whatever the shape, and it does not reach further into them."""
    torch.manual_seed(0)
    for rows in (4, 256):
        wide = torch.randn(2, rows, 64), torch.randn(8, 64)
        results = []
        for enabled in (False, True):
            x, w = (t.to(torch.float32 if enabled else torch.bfloat16).requires_grad_() for t in wide)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                a = ody.all_gather_linear(x, w, group=None)
                b = ody.zero3_linear(x[..., :], w, group=None)
            gradients = [torch.autograd.grad(y.float().square().sum(), (x, w)) for y in (a, b)]
            results.append([a, b, *(gradient.bfloat16() for both in gradients for gradient in both)])
        for plain, cast in zip(*results, strict=True):
            assert torch.equal(plain, cast)


def stepped_weights(rank: int, world: int, transport: str) -> None:
    """Weights sent ahead in one backward are not taken for those after the optimizer's step, DTensors least of all."""
    torch.manual_seed(0)
    config = ody.OverlapConfig(transport=transport, timeout_s=20)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("seq",))
    full = [torch.randn(8, 6), torch.randn(6, 8)]
    rows = [one.chunk(world)[rank].clone() for one in full]
    weights = [torch.nn.Parameter(DTensor.from_local(one, mesh, [Shard(0)])) for one in rows]
    dense = [torch.nn.Parameter(one.clone()) for one in full]
    optimizers = [torch.optim.SGD(weights, lr=0.1, foreach=True), torch.optim.SGD(dense, lr=0.1, foreach=True)]
    x = torch.randn(4, 6)  # no gradient: the first layer's backward gathers nothing
    for _ in range(4):
        up, down = (one.to_local() for one in weights)
        hidden = ody.zero3_linear(x, up, group=None, config=config, prefetch=down)
        y = ody.zero3_linear(hidden, down, group=None, config=config, prefetch_backward=up)
        expected = x @ dense[0].t() @ dense[1].t()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)  # fp32, two products of at most 8 terms
        y.square().sum().backward()
        (world * expected.square().sum()).backward()  # every rank has the same rows: gradients add up
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def step_between(rank: int, world: int, transport: str) -> dict[str, int]:
    """An optimizer's step comes right after the call that sent the weight ahead, and before the one that uses it."""
    torch.manual_seed(0)
    config = ody.OverlapConfig(transport=transport, timeout_s=20)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("seq",))
    full = torch.randn(8, 6)
    weight = torch.nn.Parameter(DTensor.from_local(full.chunk(world)[rank].clone(), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD([weight], lr=0.5, foreach=True)
    x, first = torch.randn(4, 6), torch.randn(3, 6)
    weight.grad = torch.ones_like(weight)
    with torch.no_grad(), ody.CommRecorder() as record:
        ody.zero3_linear(x, first, group=None, config=config, prefetch=weight.to_local())
        optimizer.step()
        y = ody.zero3_linear(x, weight.to_local(), group=None, config=config)
    torch.testing.assert_close(y, x @ (full - 0.5).t(), rtol=1e-5, atol=1e-5)  # fp32, sums of 6 terms
    return record.ahead()


def adopted(rank: int, world: int, transport: str, bias: bool) -> list[bool]:
    """Whether each gather of a two-layer network found its weight sent ahead, forward and backward."""
    found = []
    serves = SentAhead.serves

    def spy(self: SentAhead, call: Any, pieces: int) -> bool:
        found.append(serves(self, call, pieces))
        return found[-1]

    config = ody.OverlapConfig(transport=transport, timeout_s=20)
    first, second = (torch.nn.Parameter(torch.randn(4, 4 * world)) for _ in range(2))
    own_bias = torch.nn.Parameter(torch.randn(4)) if bias else None
    x = torch.randn(3, 4 * world, requires_grad=True)
    SentAhead.serves = spy  # type: ignore[method-assign]
    try:
        hidden = ody.zero3_linear(x, first, own_bias, group=None, config=config, prefetch=second)
        y = ody.zero3_linear(hidden, second, own_bias, group=None, config=config, prefetch_backward=first)
        y.sum().backward()
    finally:
        SentAhead.serves = serves  # type: ignore[method-assign]
    return found


def different_prefetches(rank: int, world: int) -> Any:
    """One rank sends ahead what the others do not."""
    config = ody.OverlapConfig(timeout_s=20)
    ahead = torch.ones(2, 8) if rank == 0 else None
    x, w = torch.ones(3, 8), torch.ones(2, 8)
    return _error(lambda: ody.zero3_linear(x, w, group=None, config=config, prefetch=ahead))
