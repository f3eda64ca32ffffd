"""What ranks run in the tests of the ledger and the supervisor: real processes and segments, no device."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch
import torch.distributed as dist

import odysseus_kernels as ody
from odysseus_kernels import _ext
from odysseus_kernels.comm.collective.handshakes import Handshakes
from odysseus_kernels.comm.device.ledger import Ledger
from odysseus_kernels.comm.device.supervisor import Supervisor
from odysseus_kernels.comm.transport import Call, Gather

WAITS = ["gather (forward): rank 0 waited for rank 1 to publish chunk 1, piece 0 of its shard"]


class FakeControl:
    """The block that a device and its host share."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.found: tuple[int, int, int, int, int] | None = None

    def abort(self, code: int) -> None:
        self.codes.append(code)

    def error(self) -> tuple[int, int, int, int, int] | None:
        return self.found


def _exchange(text: str) -> list[str]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, text)
    return everyone


def _ledger(rank: int, world: int, nonce: int) -> Ledger:
    host = _ext.load().SymmetricHost(rank, world, "/dev/shm", 4096, nonce)
    host.attach(json.loads(json.dumps(_exchange(host.path))))
    dist.barrier()
    return Ledger(host, rank, world)


def _call(rows: int = 4, timeout_s: float = 10.0) -> Call:
    config = ody.OverlapConfig(mode="fused", timeout_s=timeout_s)
    return Call("gather", "forward", config, Gather(torch.empty(1, rows, 2), lambda *_: None))


def _attempt(run: Any) -> tuple[str, str]:
    try:
        run()
    except ody.CommunicationError as error:
        return type(error).__name__, str(error)
    return "", ""


def many_calls(rank: int, world: int) -> int:
    """Ranks that run at different speeds, hundreds of calls beyond what descriptors are kept."""
    ledger = _ledger(rank, world, 11)
    for index in range(300):
        if index % (50 + 17 * rank) == 0:
            time.sleep(0.02)
        ledger.post(_call(rows=1 + index % 7), "")
        if index % 100 == 99:
            ledger.settle(_call())
    dist.barrier()
    ledger.close()
    return ledger._sequence


def different_call(rank: int, world: int, odd: int) -> tuple[str, str]:
    """One rank's fifth call has another shape; nobody waits for anybody between calls."""
    ledger = _ledger(rank, world, 12)
    control = FakeControl()
    supervisor = Supervisor(control, ledger, WAITS)

    def calls() -> None:
        for index in range(200):
            ledger.post(_call(rows=9 if rank == odd and index == 4 else 4), "")
            supervisor.check()
            time.sleep(0.005)

    result = _attempt(calls)
    dist.barrier()
    supervisor.close()
    ledger.close()
    return result


def supervisor_sees_a_difference(rank: int, world: int) -> tuple[list[int], tuple[str, str]]:
    """The host sits in a synchronisation: the supervisor ends the device's waits, and the host then learns why."""
    ledger = _ledger(rank, world, 13)
    control = FakeControl()
    supervisor = Supervisor(control, ledger, WAITS)
    if rank == 2:
        dist.barrier()
        result = [3], _attempt(lambda: ledger.post(_call(rows=5), ""))  # comes last: its own call finds out
    else:
        ledger.post(_call(), "")
        dist.barrier()
        begin = time.monotonic()
        while not control.codes and time.monotonic() < begin + 5:
            time.sleep(0.01)
        result = control.codes, _attempt(supervisor.check)
    dist.barrier()
    supervisor.close()
    ledger.close()
    return result


def first_to_compare(rank: int, world: int) -> tuple[str, str]:
    """A peer has compared and left before this rank's supervisor looks: still a difference, not a loss."""
    ledger = _ledger(rank, world, 17)
    control = FakeControl()
    if rank == 0:
        ledger.post(_call(), "")
    dist.barrier()
    if rank == 1:
        result = _attempt(lambda: ledger.post(_call(rows=5), ""))
        ledger.give_up(ody.RankMismatchError(result[1]))
        dist.barrier()
    else:
        dist.barrier()
        supervisor = Supervisor(control, ledger, WAITS)
        begin = time.monotonic()
        while not control.codes and time.monotonic() < begin + 5:
            time.sleep(0.01)
        result = _attempt(supervisor.check)
        supervisor.close()
    dist.barrier()
    ledger.close()
    return result


def lagging_peer(rank: int, world: int) -> tuple[str, str]:
    """A host that is far ahead of a peer waits for it, within the time limit."""
    ledger = _ledger(rank, world, 14)
    if rank == 1:
        time.sleep(2.0)
        dist.barrier()
        ledger.close()
        return "", ""

    def calls() -> None:
        for _ in range(100):
            ledger.post(_call(timeout_s=0.5), "")

    result = _attempt(calls)
    dist.barrier()
    ledger.close()
    return result


def lost_peer(rank: int, world: int) -> tuple[float, list[int], tuple[str, str], tuple[str, str], tuple[str, str]]:
    """A killed process: how long until waits were ended, and what errors say before and after one gave up."""
    ledger = _ledger(rank, world, 15)
    control = FakeControl()
    supervisor = Supervisor(control, ledger, WAITS)
    ledger.post(_call(), "")
    ledger.settle(_call())
    dist.barrier()
    if rank == world - 1:
        time.sleep(0.3)
        os._exit(7)
    begin = time.monotonic()
    while not control.codes and time.monotonic() < begin + 5:
        time.sleep(0.01)
    seconds = time.monotonic() - begin - 0.3
    quiet = _attempt(lambda: _raise(supervisor.failure()))
    needed = _attempt(supervisor.check)
    control.found = (2, 0, 0, 0x101, 0)
    gave_up = _attempt(lambda: _raise(supervisor.failure()))
    supervisor.close()
    return seconds, control.codes, quiet, needed, gave_up


def timed_out(rank: int, world: int) -> tuple[str, str]:
    """A wait that gave up on one rank is an error on all: the others' waits are ended and say why."""
    ledger = _ledger(rank, world, 16)
    control = FakeControl()
    supervisor = Supervisor(control, ledger, WAITS)
    supervisor.timeout_s = 3.0
    ledger.post(_call(), "")
    dist.barrier()
    if rank == 0:
        control.found = (1, 0, 0, 0x101, 0x100)
    begin = time.monotonic()
    while rank != 0 and not control.codes and time.monotonic() < begin + 5:
        time.sleep(0.01)
    time.sleep(0.2)
    if rank != 0:
        control.found = (2, 0, 0, 0x101, 0x100)
    result = _attempt(lambda: _raise(supervisor.failure()))
    dist.barrier()
    supervisor.close()
    ledger.close()
    return result


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def handshakes(rank: int, world: int, odd: int | None) -> tuple[str, str]:
    """Calls compared beside themselves, one of which differs on one rank."""
    group = dist.group.WORLD
    found = Handshakes(group)

    def calls() -> None:
        for index in range(40):
            text = f"call {index}" + (" of other shapes" if rank == odd and index == 7 else "")
            found.compare(group, text, index + 1, 10.0, lambda: None)
        found.finish(lambda: None)

    return _attempt(calls)
