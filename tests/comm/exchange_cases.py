"""What ranks run in the tests of exchanges.

Every rank can compute what any rank gives to any other and makes for it (:func:`_block`), so that each checks all that
it is given, in each visit, and all that comes out.  Values are small integers: sums of them are exact in every type.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm.bundles import as_bytes
from odysseus_kernels.comm.collective.exchange import ExchangeRun
from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.functional import all_to_all
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.comm.host.exchange import HostExchange
from odysseus_kernels.comm.schedules.steps import Step, Task
from odysseus_kernels.comm.transport import Call, Transport
from odysseus_kernels.planner.ring import Pairs
from odysseus_kernels.testing.compare import nan_empty
from odysseus_kernels.testing.faults import Jitter

Spec = tuple[tuple[int, ...], torch.dtype]


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and dtypes of an exchange; of ``addressed`` and ``received`` those of one part.

    With ``parts`` each tensor goes to ranks of its own, drawn by this number, and is a slice of a larger one.
    """

    shared: tuple[Spec, ...] = ()
    addressed: tuple[Spec, ...] = ()
    sums: tuple[Spec, ...] = ()
    received: tuple[Spec, ...] = ()
    parts: int = 0

    def tables(self, world: int) -> tuple[Pairs, ...]:
        if not self.parts:
            return ()
        draw = torch.Generator().manual_seed(self.parts)
        drawn = torch.rand(max(len(self.shared), len(self.sums)), world, world, generator=draw) < 0.5
        return tuple(tuple(map(tuple, (table | torch.eye(world, dtype=torch.bool)).tolist())) for table in drawn)


def config_of(transport: str, **settings: Any) -> ody.OverlapConfig:
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


def _sliced(values: Tensor) -> Tensor:
    """``values`` [.., rows, width] as rows of a tensor that has more."""
    *front, rows, width = values.shape
    larger = torch.full((*front, rows + 3, width), 77, dtype=values.dtype)
    larger[..., 2 : rows + 2, :] = values
    return larger[..., 2 : rows + 2, :]


def run_case(
    transport: Callable[[Call], None], rank: int, world: int, case: Case, config: ody.OverlapConfig, seed: int
) -> None:
    """One exchange, all of it checked."""

    def block(kind: str, index: int, spec: Spec, source: int, target: int) -> Tensor:
        return _block(kind, index, spec, source, target, seed)

    def part(kind: str, specs: tuple[Spec, ...], source: int, target: int) -> list[Tensor]:
        return [block(kind, index, spec, source, target) for index, spec in enumerate(specs)]

    order = []
    tables = case.tables(world)

    def takes(visitor: int, owner: int, index: int) -> bool:
        return not tables or tables[index][visitor][owner]

    def visit(peer: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        order.append(peer)
        expected = part("shared", case.shared, peer, rank) + part("addressed", case.addressed, peer, rank)
        assert len(given) == len(expected)
        for index, (actual, value) in enumerate(zip(given, expected, strict=True)):
            if not takes(rank, peer, index):
                assert actual.numel() == 0, "what is not taken cannot be read"
                continue
            assert actual.shape == value.shape and actual.dtype == value.dtype
            assert torch.equal(actual, value), (rank, peer)
        results = part("sums", case.sums, rank, peer) + part("received", case.received, rank, peer)
        for index, (target, value) in enumerate(zip(made, results, strict=True)):
            if takes(rank, peer, index):
                target.copy_(value)
            else:
                assert target.numel() == 0, "nothing is made for it"

    slices = _sliced if tables else lambda tensor: tensor
    with nan_empty():
        exchange = Exchange(
            visit,
            tuple(map(slices, part("shared", case.shared, rank, -1))),
            tuple(
                torch.stack([block("addressed", index, spec, rank, target) for target in range(world)])
                for index, spec in enumerate(case.addressed)
            ),
            tuple(slices(torch.empty(shape, dtype=dtype)) for shape, dtype in case.sums),
            tuple(_strided(world, spec) for spec in case.received),
            parts=tables,
        )
    transport(Call("probe", "forward", config, shapes=f"case {seed}", exchange=exchange))
    first = 1 if exchange.makes else 0
    everyone = [(rank + first + hop) % world for hop in range(world)]
    visited = [any(takes(rank, peer, index) for index in range(len(tables) or 1)) for peer in everyone]
    assert order == list(itertools.compress(everyone, visited))
    for index, (spec, actual) in enumerate(zip(case.sums, exchange.sums, strict=True)):
        makers = [source for source in range(world) if takes(source, rank, index)]
        total = sum(block("sums", index, spec, source, rank).double() for source in makers)
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
PARTED = (
    Case(shared=(((2, 3, 5), F32), ((2, 4, 3), BF16), ((1, 1), torch.bool)), parts=1),
    Case(sums=(((2, 3, 5), F32), ((4, 3), BF16), ((2, 2, 3, 4), F64), ((0, 4), F32)), parts=2),
    Case(shared=(((2, 2, 3, 5), BF16),) * 4, sums=(((2, 2, 3, 5), F32),) * 4, parts=3),
    Case(shared=(((3, 5), F32), ((2, 5), F32)), sums=(((1, 3, 5), F64), ((2, 1, 5), BF16)), parts=4),
)


def transport_of(rank: int, config: ody.OverlapConfig) -> Transport:
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
    config = config_of(name)
    transport = transport_of(rank, config)
    cases = (*KINDS_OF_CASES, *PARTED)
    for seed, case in enumerate(cases):
        _poison(transport)
        run_case(transport.execute, rank, world, case, config, seed)
    for seed in range(2 * len(cases)):
        run_case(transport.execute, rank, world, cases[seed * 5 % len(cases)], config, seed)


def only_what_is_taken_moves(rank: int, world: int, name: str) -> list[tuple[int, int]]:
    """Bytes that were copied into the own window, or handed to the links, and what the parts that are taken have."""
    config = config_of(name)
    transport = transport_of(rank, config)
    published: list[int] = []
    moved: list[int] = []
    publish, all_to_all_of = HostExchange.publish, ExchangeRun._issue

    def watched_publish(self: HostExchange) -> None:
        publish(self)
        assert self.given is not None
        for index, tensor in enumerate(self._windows.cell(rank, self.given, 0)):
            untouched = bool((as_bytes(tensor) == 255).all())  # as it was poisoned
            assert untouched == (self._exchange.served(rank, world, index) == 0), index
            published.append(0 if untouched else tensor.nbytes)

    def watched_issue(self: ExchangeRun, step: Step, task: Task, hop: int) -> None:
        all_to_all_of(self, step, task, hop)
        moved.append(self._sent[task, hop].numel())

    found = []
    for seed, case in enumerate(PARTED):
        if name == "symmetric" and not case.shared:
            continue
        _poison(transport)
        del published[:], moved[:]
        with (
            mock.patch.object(HostExchange, "publish", watched_publish),
            mock.patch.object(ExchangeRun, "_issue", watched_issue),
            ody.CommRecorder() as record,
        ):
            run_case(transport.execute, rank, world, case, config, seed)
        nbytes = [[torch.Size(shape).numel() * dtype.itemsize for shape, dtype in x] for x in (case.shared, case.sums)]
        tables = case.tables(world)
        served = [sum(row[rank] for row in table) - 1 for table in tables]
        visited = [sum(table[rank]) - 1 for table in tables]
        sent = [sum(map(operator.mul, sizes, counts)) for sizes, counts in zip(nbytes, (served, visited), strict=True)]
        assert record.bytes() == sum(sent)
        if name == "symmetric":
            found.append((sum(published), sum(size for size, count in zip(nbytes[0], served, strict=True) if count)))
        else:
            found.append((sum(moved), sum(sent)))
    return found


def between_operators(rank: int, world: int, name: str, seed: int, count: int) -> int:
    """Exchanges and operators back to back, with delays that differ from rank to rank and nothing else between them."""
    config = config_of(name)
    transport = transport_of(rank, config)
    draw = torch.Generator().manual_seed(seed)
    jitter = Jitter(seed, rank, longest_s=0.003, share=0.2)
    x, w = torch.full((3, 8), float(rank)), torch.ones(5, 8)
    expected = 8.0 * torch.arange(world, dtype=F32).repeat_interleave(3)[:, None].expand(-1, 5)
    for number in range(count):
        jitter()
        pick = int(torch.randint(len(KINDS_OF_CASES) + 4, (), generator=draw))
        if pick < len(KINDS_OF_CASES):
            run_case(transport.execute, rank, world, KINDS_OF_CASES[pick], config, number)
        elif pick % 2:
            assert torch.equal(ody.all_gather_linear(x, w, group=None, config=config), expected)
        else:
            # What is sent ahead of a call that is not made is dropped by whatever comes instead, an exchange too.
            y = ody.zero3_linear(x, w, group=None, config=config, prefetch=w)
            assert torch.equal(y, torch.full((3, 5 * world), 8.0 * rank))
    return count


def rounded_sums(rank: int, world: int) -> None:
    """Sums of numbers that round are those of the fixed order, in the accumulator's type, on both transports alike."""
    for dtype, reduce_dtype in ((BF16, F32), (F32, F32), (F32, F64), (F64, F32)):
        parts = torch.randn(world, 1000, generator=torch.Generator().manual_seed(5), dtype=F64).to(dtype)
        own = parts[rank]
        # Received in ring order from the rank below, the own part last but one.
        order = [parts[(rank - hop) % world] for hop in range(1, world)]
        order.insert(world - 2, own)
        wide = torch.float64 if dtype == F64 else reduce_dtype
        total = order[0].to(wide)
        for part in order[1:]:
            total = total + part.to(wide)
        for name in ("symmetric", "collective"):
            config = config_of(name, reduce_dtype=reduce_dtype)
            out = torch.empty(1000, dtype=dtype)

            def visit(peer: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...], own: Tensor = own) -> None:
                made[0].copy_(own)

            exchange = Exchange(visit, sums=(out,))
            transport_of(rank, config).execute(Call("probe", "forward", config, exchange=exchange))
            assert torch.equal(out, total.to(dtype)), (name, dtype, reduce_dtype)


def traffic(rank: int, world: int, name: str) -> list[dict[str, int]]:
    """Bytes by collective of each kind of exchange, and what they must be."""
    config = config_of(name)
    found = []
    for seed, case in enumerate(KINDS_OF_CASES):
        with ody.CommRecorder() as record:
            run_case(transport_of(rank, config).execute, rank, world, case, config, seed)

        def nbytes(*specs: Spec) -> int:
            return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs)

        # f times the global tensor: what is gathered or scattered is as large as all shards, what is exchanged is
        # as large as all parts of all ranks, of which a rank has 1/N.
        expected = {
            "all_gather": (world - 1) * nbytes(*case.shared),
            "reduce_scatter": (world - 1) * nbytes(*case.sums),
            "all_to_all": (world - 1) * nbytes(*case.addressed, *case.received),
        }
        counted = {kind: record.bytes(operator="probe", phase="forward", collective=kind) for kind in expected}
        assert all(row["transport"] == name for row in record.rows())
        assert record.bytes() == sum(counted.values())
        assert counted == expected, (case, counted, expected)
        found.append(counted)
    return found


def plain(rank: int, world: int, name: str) -> None:
    """The unfused twin, any dtype, counted; and out of a transport's own method into a strided tensor."""
    config = config_of(name)
    for dtype in (F64, BF16, torch.bool, I64):
        for shape in ((), (3,), (2, 0), (2, 3)):
            everyone = [
                torch.stack([_block("addressed", 0, (shape, dtype), a, b, 3) for b in range(world)])
                for a in range(world)
            ]
            with ody.CommRecorder() as record:
                result = all_to_all(everyone[rank], operator="probe", config=config)
            assert torch.equal(result, torch.stack([one[rank] for one in everyone]))
            expected = everyone[rank].nbytes * (world - 1) // world
            assert record.bytes(operator="probe", collective="all_to_all") == record.bytes() == expected
    full = torch.arange(6.0 * world).view(world, 3, 2) + 100 * rank
    out = torch.empty(world, 2, 3).mT
    transport = transport_of(rank, config)
    transport.all_to_all(Call("probe", "forward", config), full, out)
    for source in range(world):
        assert torch.equal(out[source], torch.arange(6.0).view(3, 2) + 6 * rank + 100 * source)
