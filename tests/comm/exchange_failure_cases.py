"""What ranks run in the tests of exchanges that fail, are refused, or have to take another transport."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from exchange_cases import F16, F32, I64, KINDS_OF_CASES, PARTED, Case, Spec, config_of, run_case, transport_of
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.functional import all_to_all
from odysseus_kernels.comm.groups import dispatch
from odysseus_kernels.comm.host.transport import SymmetricHostTransport
from odysseus_kernels.comm.host.windows import Windows
from odysseus_kernels.comm.transport import Call, Transport
from odysseus_kernels.testing.faults import kill_self


def odd_rank(rank: int, world: int, name: str, what: str, odd: int) -> Any:
    """One rank gives, makes or calls something else; then everybody agrees again."""
    config = config_of(name)
    transport = transport_of(rank, config)
    agreed = KINDS_OF_CASES[-1]
    run_case(transport.execute, rank, world, agreed, config, 0)
    calls: dict[str, Callable[[], object]] = {
        "shared": lambda: _run(transport, dataclasses.replace(agreed, shared=(((3, 3), F32),)), world),
        "received": lambda: _run(transport, dataclasses.replace(agreed, received=(((2, 3, 4), F16),)), world),
        "program": lambda: _run(transport, KINDS_OF_CASES[0], world),
        "parts": lambda: run_case(transport.execute, rank, world, dataclasses.replace(PARTED[2], parts=5), config, 7),
        "operator": lambda: ody.all_gather_linear(torch.ones(3, 8), torch.ones(5, 8), group=None, config=config),
    }
    try:
        if rank == odd:
            calls[what]()
        elif what == "parts":
            run_case(transport.execute, rank, world, PARTED[2], config, 7)
        else:
            _run(transport, agreed, world)
    except ody.CommunicationError as error:
        found = type(error).__name__, str(error)
    # A transport that was given up is replaced; the process group goes on.
    run_case(transport_of(rank, config).execute, rank, world, agreed, config, 1)
    return found


def _run(transport: Transport, case: Case, world: int) -> None:
    def empty(specs: tuple[Spec, ...], *front: int) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(*front, *shape, dtype=dtype) for shape, dtype in specs)

    exchange = Exchange(
        lambda peer, given, made: None,
        empty(case.shared),
        empty(case.addressed, world),
        empty(case.sums),
        empty(case.received, world),
    )
    transport.execute(Call("probe", "forward", config_of(transport.name), exchange=exchange))


def killed_rank(rank: int, world: int, name: str, victim: int) -> Any:
    """One rank dies in the middle of an exchange, when it visits its first peer."""
    config = config_of(name)
    transport = transport_of(rank, config)
    case = KINDS_OF_CASES[-1]
    run_case(transport.execute, rank, world, case, config, 0)
    dist.barrier()

    def visit(peer: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        if rank == victim:
            time.sleep(0.5)
            kill_self()

    exchange = Exchange(visit, shared=(torch.ones(3, 5),), sums=(torch.empty(7),))
    start = time.perf_counter()
    try:
        transport.execute(Call("probe", "forward", config, exchange=exchange))
    except ody.CommunicationError as error:
        return type(error).__name__, str(error), time.perf_counter() - start
    return "", "", time.perf_counter() - start


def not_served(rank: int, world: int, asked: str) -> Any:
    """A symmetric transport without exchanges: they take the collective one, and nothing else does."""
    config = config_of(asked)
    used: list[str] = []

    def run(transport: Transport, settled: ody.OverlapConfig) -> None:
        run_case(transport.execute, rank, world, KINDS_OF_CASES[-1], settled, len(used))
        used.append(transport.name)

    phase = Phase("probe", "forward", "", "", F32, 1)
    with (
        mock.patch.object(SymmetricHostTransport, "serves_exchange", False),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for given in (None, phase, phase):
            dispatch(dist.group.WORLD, config, torch.device("cpu"), run, given)
        assert torch.equal(all_to_all(torch.full((world, 2), rank), config=config)[:, 0], torch.arange(world))
        with ody.CommRecorder() as record:
            ody.all_gather_linear(torch.ones(3, 8), torch.ones(5, 8), group=None, config=config)
    assert [row["transport"] for row in record.rows()] == ["symmetric"]
    return used, [str(one.message) for one in caught if issubclass(one.category, ody.FallbackWarning)]


def short_memory(rank: int, world: int, short: int) -> Any:
    """One rank cannot back its window: all of them take the collective transport, and small calls go on as before."""
    config = config_of("symmetric")
    used: list[str] = []
    large = Case(shared=((((1 << 18) + 1,), F32),), sums=(((3,), F32),))

    def run_of(case: Case) -> Callable[[Transport, ody.OverlapConfig], None]:
        def run(transport: Transport, settled: ody.OverlapConfig) -> None:
            run_case(transport.execute, rank, world, case, settled, len(used))
            used.append(transport.name)

        return run

    reserve = Windows.reserve

    def refuse(self: Windows, window: int, nbytes: int) -> None:
        if rank == short and nbytes > 1 << 20:
            raise OSError("no memory under test")
        reserve(self, window, nbytes)

    with mock.patch.object(Windows, "reserve", refuse), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for case in (KINDS_OF_CASES[-1], large, large, KINDS_OF_CASES[-1]):
            dispatch(dist.group.WORLD, config, torch.device("cpu"), run_of(case))
    return used, [str(one.message) for one in caught if issubclass(one.category, ody.CapacityWarning)]


def bad_exchanges(rank: int, world: int, name: str) -> list[tuple[str, str]]:
    """What is refused before anything is sent: on one rank only, and the others do not wait for it."""
    config = config_of(name)
    transport = transport_of(rank, config)
    ok = torch.ones(world, 2, 3)
    wrong: dict[str, dict[str, tuple[Tensor, ...]]] = {
        "something": {},
        "contiguous": {"shared": (ok.transpose(0, 1),)},
        "for each of": {"addressed": (torch.ones(world + 1, 2),)},
        "floating dtype": {"sums": (torch.ones(3, dtype=I64),)},
        "contiguous rows": {"received": (torch.ones(world, 1, 3, 2).mT,)},
        r"[world, batch, rows, width]": {"received": (ok,)},
    }
    found = []
    if rank == 0:
        for expected, tensors in wrong.items():
            exchange = Exchange(lambda peer, given, made: None, **tensors)
            try:
                transport.execute(Call("probe", "forward", config, exchange=exchange))
            except ValueError as error:
                found.append((expected, str(error)))
        try:
            all_to_all(torch.ones(world + 1, 2), config=config)
        except ValueError as error:
            found.append(("for each of", str(error)))
    run_case(transport.execute, rank, world, KINDS_OF_CASES[-1], config, 0)
    return found
