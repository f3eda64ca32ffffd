"""What ranks run in the tests of exchanges.

Every rank can compute what any rank gives to any other and makes for it (:func:`_block`), so that each checks all that
it is given, in each visit, and all that comes out.  Values are small integers: sums of them are exact in every type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.comm.transport import Call, Transport
from odysseus_kernels.testing.compare import nan_empty

Spec = tuple[tuple[int, ...], torch.dtype]


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and dtypes of an exchange; of ``addressed`` and ``received`` those of one part."""

    shared: tuple[Spec, ...] = ()
    addressed: tuple[Spec, ...] = ()
    sums: tuple[Spec, ...] = ()
    received: tuple[Spec, ...] = ()


def _config(transport: str, **settings: Any) -> ody.OverlapConfig:
    return ody.OverlapConfig(**{"mode": "fused", "transport": transport, "timeout_s": 20, **settings})


_KINDS = ("shared", "addressed", "sums", "received")


def _block(kind: str, index: int, spec: Spec, source: int, target: int, seed: int) -> Tensor:
    shape, dtype = spec
    if kind == "shared":
        target = -1  # the same for all
    number = (((seed * 4 + _KINDS.index(kind)) * 8 + index) * 32 + source) * 32 + target + 1
    draw = torch.Generator().manual_seed(number)
    values = torch.randint(-9, 10, shape, generator=draw)
    return values > 0 if dtype == torch.bool else values.to(dtype)


def _strided(world: int, spec: Spec) -> Tensor:
    """[world, batch, rows, width] whose rows are contiguous and lie apart."""
    (batch, rows, width), dtype = spec
    return torch.full((batch, rows, world, width + 3), 77, dtype=dtype).permute(2, 0, 1, 3)[..., 1 : width + 1]


def run_case(
    transport: Callable[[Call], None], rank: int, world: int, case: Case, config: ody.OverlapConfig, seed: int
) -> None:
    """One exchange, all of it checked."""
    def block(kind: str, index: int, spec: Spec, source: int, target: int) -> Tensor:
        return _block(kind, index, spec, source, target, seed)

    def part(kind: str, specs: tuple[Spec, ...], source: int, target: int) -> list[Tensor]:
        return [block(kind, index, spec, source, target) for index, spec in enumerate(specs)]

    order = []

    def visit(peer: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        order.append(peer)
        expected = part("shared", case.shared, peer, rank) + part("addressed", case.addressed, peer, rank)
        assert len(given) == len(expected)
        for actual, value in zip(given, expected, strict=True):
            assert actual.shape == value.shape and actual.dtype == value.dtype
            assert torch.equal(actual, value), (rank, peer)
        results = part("sums", case.sums, rank, peer) + part("received", case.received, rank, peer)
        for target, value in zip(made, results, strict=True):
            target.copy_(value)

    with nan_empty():
        exchange = Exchange(
            visit,
            tuple(part("shared", case.shared, rank, -1)),
            tuple(
                torch.stack([block("addressed", index, spec, rank, target) for target in range(world)])
                for index, spec in enumerate(case.addressed)
            ),
            tuple(torch.empty(shape, dtype=dtype) for shape, dtype in case.sums),
            tuple(_strided(world, spec) for spec in case.received),
        )
    transport(Call("probe", "forward", config, shapes=f"case {seed}", exchange=exchange))
    first = 1 if exchange.makes else 0
    assert order == [(rank + first + hop) % world for hop in range(world)]
    for index, (spec, actual) in enumerate(zip(case.sums, exchange.sums, strict=True)):
        total = sum(block("sums", index, spec, source, rank).double() for source in range(world))
        assert torch.equal(actual.double(), total), (rank, index)
    for index, (spec, actual) in enumerate(zip(case.received, exchange.received, strict=True)):
        for source in range(world):
            assert torch.equal(actual[source], block("received", index, spec, source, rank)), (rank, source, index)


F64, F32, BF16, F16, I64 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64
KINDS_OF_CASES = (
    Case(shared=(((3, 5), F32),)),
    Case(addressed=(((7,), BF16),)),
    Case(shared=(((3, 5), F32), ((), F64), ((1, 3), torch.bool)), addressed=(((5, 3), BF16), ((2, 3), I64))),
    Case(sums=(((5, 7), F32),)),
    Case(received=(((2, 3, 5), BF16), ((1, 1, 3), F64))),
    Case(sums=(((3,), F32), ((1025,), BF16), ((2, 3), F64), ((0, 4), F32), ((33,), F16))),
    Case(shared=(((4, 6), F32),), received=(((1, 4, 3), F32),)),
    Case(
        shared=(((1, 3), torch.bool), ((4, 6), BF16), ((0,), F32)),
        addressed=(((5, 3), F64), ((1,), I64)),
        sums=(((5, 7), BF16), ((3,), F64)),
        received=(((2, 3, 5), F16), ((1, 1, 1), I64)),
    ),
)


def _transport(rank: int, config: ody.OverlapConfig) -> Transport:
    return group_transports(dist.group.WORLD).choose(config, torch.device("cpu"))


def _poison(transport: Transport) -> None:
    """Fills the own windows with NaN while nobody reads or writes them."""
    dist.barrier()
    if transport.name == "symmetric":
        for window, nbytes in enumerate(transport._windows.backed):
            transport._windows.raw(transport.rank, window)[:nbytes].fill_(255)
    dist.barrier()


def all_cases(rank: int, world: int, name: str) -> None:
    """Each kind of exchange alone in poisoned memory, and then all of them back to back."""
    config = _config(name)
    transport = _transport(rank, config)
    for seed, case in enumerate(KINDS_OF_CASES):
        for _ in range(2):
            _poison(transport)
            run_case(transport.execute, rank, world, case, config, seed)
    for seed in range(3 * len(KINDS_OF_CASES)):
        run_case(transport.execute, rank, world, KINDS_OF_CASES[seed * 5 % len(KINDS_OF_CASES)], config, seed)
