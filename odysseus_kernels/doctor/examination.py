"""One rank's examination, and how the first rank brings all of them together.

Ranks tell one another what they find through the store by which they meet, and not through collectives: what a rank
says stays there when it dies, and nobody waits for a rank longer than it takes to see that it is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import signal
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from odysseus_kernels.comm.meeting.membership import Member, lost_members, this_member
from odysseus_kernels.config import TransportName
from odysseus_kernels.doctor import bandwidth, facts, pairs, self_test
from odysseus_kernels.doctor.problems import find_problems
from odysseus_kernels.doctor.report import Problem, RankReport, Report
from odysseus_kernels.errors import FallbackWarning

__all__ = ["Examination", "Terminated", "so_far", "termination_raises"]

_LOOK_S = 0.05
# After the first rank is done, or has seen another one's process end: what a live rank needs to say its last words.
_GRACE_S = 2.0
# A process that dies closes its connections before it is gone.
_DYING_S = 1.0
_MOST_CHARACTERS = 800


class Terminated(BaseException):
    """The launcher asked this process to end, as torchrun does when another rank has failed."""


class Examination:
    """What one rank finds out.

    Args:
        store: shared by the ranks.
        rank, world: the ranks, and which one this is.
        local: this rank's number on its host, which is that of its GPU.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: GPUs if every rank has one.
        timeout_s: limit of each wait for a rank.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, local: int, device: str, timeout_s: float) -> None:
        self._store, self._rank, self._world, self._local = store, rank, world, local
        self._wanted, self._timeout_s = device, timeout_s
        self._ended = False
        self.own = RankReport(rank)

    def run(self) -> None:
        """Everything of this rank; told to the first one whatever happens."""
        self._store.set(f"member/{self._rank}", _member_text(this_member()))
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    self._examine()
                except Terminated:
                    self._ended = True
                except Exception as error:  # noqa: BLE001  # whatever goes wrong is a finding
                    self.own.failure = f"{type(error).__name__}: {error}"[:_MOST_CHARACTERS]
            # Only what this package says of itself is about this machine.
            texts = (str(one.message) for one in said if issubclass(one.category, FallbackWarning))
            self.own.said = [text[:_MOST_CHARACTERS] for text in dict.fromkeys(texts)]
        finally:
            pairs.decline(self._store, self._rank)
            self._store.set(f"report/{self._rank}", self.own.to_json())

    def _examine(self) -> None:
        self._begin("looking at its process and host")
        self.own.facts = facts.gather_facts()
        self._tell()
        self._begin("meeting the other ranks")
        limit = datetime.timedelta(seconds=self._timeout_s)
        device = self._common_device(limit)
        self.own.facts["host"]["ranks_use"] = str(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.PrefixStore("group", self._store)
        dist.init_process_group(backend, store=store, rank=self._rank, world_size=self._world, timeout=limit)
        # A group for each, since an error may leave one unusable; made while all are there, as nothing bounds that.
        groups = {transport: dist.new_group(timeout=limit) for transport in self_test.TRANSPORTS}
        measured: list[TransportName] = []
        for transport, group in groups.items():
            self._begin(f"connecting transport {transport}")
            assert isinstance(group, dist.ProcessGroup)
            state = self_test.connect(group, transport, device, self._timeout_s)
            self.own.transports.append(state)
            if not state.available:
                continue
            for check in self_test.run_checks(group, transport, device, self._timeout_s, self._begin):
                self.own.checks.append(check)
            self._tell()
            if self.own.checks[-1].failure:
                if self._somebody_is_gone():  # without whom no other transport connects
                    return
                continue
            if self._world == 1:
                continue
            self._begin(f"measuring transport {transport}")
            self.own.rates.append(bandwidth.measure(group, transport, device, self._timeout_s))
            measured.append(transport)
            self._tell()
        if self._world > 1:
            self._begin("measuring every two ranks")
            with contextlib.suppress(dist.DistStoreError):  # a rank is silent: the first one's report tells which
                self.own.pairs = pairs.measure_pairs(
                    self._store, self._rank, self._world, measured, device, self._timeout_s
                )
        self._begin("")

    def _common_device(self, limit: datetime.timedelta) -> torch.device:
        """The kind of device that all ranks use, and this rank's."""
        has_one = torch.cuda.is_available() and self._local < torch.cuda.device_count()
        self._store.set(f"gpu/{self._rank}", "1" if has_one else "")
        keys = [f"gpu/{rank}" for rank in range(self._world)]
        self._store.wait(keys, limit)
        all_have = all(self._store.get(key) for key in keys)
        if self._wanted == "cuda" and not all_have:
            raise ValueError("--device cuda: expected a GPU for every rank of each host")
        if self._wanted == "cpu" or not all_have:
            return torch.device("cpu")
        torch.cuda.set_device(self._local)
        return torch.device("cuda", self._local)

    def _begin(self, stage: str) -> None:
        self.own.stage = stage
        self._store.set(f"stage/{self._rank}", stage)

    def _tell(self) -> None:
        self._store.set(f"so far/{self._rank}", self.own.to_json())

    # ---- the first rank ----------------------------------------------------------------------------------------------

    def collect(self) -> Report:
        """All ranks' reports, as far as they come, and the problems; for the first rank only."""
        reports: dict[int, RankReport] = {self._rank: self.own}
        lost: list[Problem] = []
        deadline = time.monotonic() + (2 * _GRACE_S if self._ended else self._timeout_s)
        gone: dict[int, float] = {}
        try:
            while len(reports) < self._world and time.monotonic() < deadline:
                for rank in set(range(self._world)) - reports.keys():
                    if self._store.check([f"report/{rank}"]):
                        reports[rank] = RankReport.from_json(self._store.get(f"report/{rank}").decode())
                    elif self._is_gone(rank) and time.monotonic() > gone.setdefault(rank, time.monotonic() + _GRACE_S):
                        reports[rank] = so_far(self._store, rank)
                        lost.append(_lost(reports[rank], "its process is gone"))
                time.sleep(_LOOK_S)
        except Terminated:
            self._ended = True
        if self._ended:
            what = "The launcher ended the ranks before all were done: the process of one has failed"
            lost.append(Problem("error", what, "see what the launcher says of that rank"))
        for rank in set(range(self._world)) - reports.keys():
            reports[rank] = so_far(self._store, rank)
            lost.append(_lost(reports[rank], f"it did not report within {self._timeout_s:g} s"))
        in_order = tuple(reports[rank] for rank in range(self._world))
        return Report(in_order, (*lost, *find_problems(in_order)))

    def _somebody_is_gone(self) -> bool:
        deadline = time.monotonic() + _DYING_S
        while time.monotonic() < deadline:
            if any(self._is_gone(rank) for rank in range(self._world)):
                return True
            time.sleep(_LOOK_S)
        return False

    def _is_gone(self, rank: int) -> bool:
        key = f"member/{rank}"
        return self._store.check([key]) and bool(lost_members([_member(self._store.get(key).decode())]))

    # ---- the verdict -------------------------------------------------------------------------------------------------

    def announce(self, status: int) -> None:
        """The first rank's exit status becomes everyone's."""
        self._store.set("status", str(status))

    def status(self, otherwise: int) -> int:
        """What :meth:`announce` said, waited for no longer than the first rank waits for others."""
        deadline = time.monotonic() + 2 * self._timeout_s + _GRACE_S
        with contextlib.suppress(RuntimeError):  # the store has ended with the process that served it
            while time.monotonic() < deadline:
                if self._store.check(["status"]):
                    return int(self._store.get("status"))
                time.sleep(_LOOK_S)
        return otherwise


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
    """The first SIGTERM is :class:`Terminated` meanwhile; what is found is still to be said."""

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def so_far(store: dist.Store, rank: int) -> RankReport:
    """What a rank has told until now, and what it was doing last."""
    found = RankReport(rank)
    with contextlib.suppress(RuntimeError):  # the store has ended with the process that served it
        if store.check([f"so far/{rank}"]):
            found = RankReport.from_json(store.get(f"so far/{rank}").decode())
        if store.check([f"stage/{rank}"]):
            found.stage = store.get(f"stage/{rank}").decode()
    return found


def _lost(report: RankReport, how: str) -> Problem:
    doing = f"; it was last at: {report.stage}" if report.stage else ""
    return Problem(
        "error",
        f"{how[0].upper()}{how[1:]}{doing}",
        "look for a signal, the out-of-memory killer (dmesg) or a stopped process on its host; with --ranks, run that "
        "many processes only as memory allows",
        (report.rank,),
    )


def _member_text(member: Member) -> str:
    return json.dumps(dataclasses.asdict(member))


def _member(text: str) -> Member:
    return Member(**json.loads(text))
