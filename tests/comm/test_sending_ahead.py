"""How much of the next call's gather a call sends, and behind what of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm.collective.agreement import Agreement
from odysseus_kernels.comm.collective.ahead import Sender
from odysseus_kernels.comm.collective.spans import cut_into_spans
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.schedules.collective import collective_schedule
from odysseus_kernels.comm.schedules.steps import Kind, Task
from odysseus_kernels.comm.transport import Call

pytestmark = pytest.mark.without_ranks

RANK, WORLD, ROWS = 1, 3, 4096
AGREED = Agreement(lambda: None)


class Recording:
    """A lane that moves at once what rank ``RANK`` gives, and zeros for the others."""

    between_hosts = True

    def __init__(self) -> None:
        self.gathered: list[Tensor] = []

    def all_gather(self, out: Tensor, own: Tensor) -> int:
        out.zero_()
        out.view(WORLD, -1)[RANK] = own
        self.gathered.append(own.clone())
        return len(self.gathered)


@pytest.mark.parametrize(("phase", "sends"), (("forward", 2), ("backward", 1)))
@pytest.mark.parametrize("program", ("gather", "scatter", "gather+scatter", "pipeline", "exchange"))
def test_pieces_are_sent_in_their_order_behind_the_calls_own(program: Any, phase: Any, sends: int) -> None:
    shard = torch.randn(1, ROWS, 64)
    lane: Any = Recording()
    call = Call("test", phase, ody.OverlapConfig(mode="fused"))
    schedule = collective_schedule(program, WORLD, RANK, gather_pieces=4, scatter_pieces=4)
    sender = Sender(call, Prefetch("gather", (shard,)), schedule, lane, RANK, WORLD, AGREED)
    sent_after = []
    for index, _ in enumerate(schedule.steps):
        sender.after(index)
        sent_after += [index] * (len(lane.gathered) - len(sent_after))

    assert sender.ahead is not None
    assert len(sent_after) == len(sender.ahead.transfers) == sends
    spans = cut_into_spans(call, lane, shard)
    for piece, transfer in enumerate(sender.ahead.transfers):
        start, stop = spans[piece]
        assert torch.equal(lane.gathered[piece], shard[:, start:stop].flatten())
        assert torch.equal(transfer.arrived[: WORLD * (stop - start) * 64].view(WORLD, -1)[RANK], lane.gathered[piece])
    later = [step for step in schedule.steps[sent_after[0] + 1 :] if step.kind is Kind.ISSUE]
    assert not [step for step in later if step.task in (Task.ALL_GATHER, Task.GIVEN)], "it would wait behind this"
    if sends == 2:
        rest = {step.kind for step in schedule.steps[sent_after[1] + 1 :]}
        assert Kind.ISSUE not in rest, "it would wait behind this"
        # What is sent last has no buffers in common with it; else all of the call's own has arrived.
        assert rest <= ({Kind.COMPUTE, Kind.FINISH} if program in ("pipeline", "exchange") else {Kind.COMPUTE})


def test_one_piece_is_all_there_is() -> None:
    shard = torch.randn(1, 8, 4)
    lane: Any = Recording()
    call = Call("test", "forward", ody.OverlapConfig(mode="fused"))
    schedule = collective_schedule("gather", WORLD, RANK)
    sender = Sender(call, Prefetch("gather", (shard,)), schedule, lane, RANK, WORLD, AGREED)
    for index, _ in enumerate(schedule.steps):
        sender.after(index)
    assert sender.ahead is not None
    assert len(sender.ahead.transfers) == 1


def test_nothing_is_sent_for_nobody() -> None:
    lane: Any = Recording()
    schedule = collective_schedule("gather", WORLD, RANK, gather_pieces=2)
    sender = Sender(Call("test", "forward", ody.OverlapConfig(mode="fused")), None, schedule, lane, RANK, WORLD, AGREED)
    for index, _ in enumerate(schedule.steps):
        sender.after(index)
    assert sender.ahead is None
    assert not lane.gathered


def test_nothing_is_sent_before_ranks_agree() -> None:
    lane: Any = Recording()
    agreement = Agreement(lambda: lane.gathered.append("agreed"))
    schedule = collective_schedule("gather", WORLD, RANK, gather_pieces=2)
    call, prefetch = (
        Call("test", "forward", ody.OverlapConfig(mode="fused")),
        Prefetch("gather", (torch.ones(1, 8, 4),)),
    )
    sender = Sender(call, prefetch, schedule, lane, RANK, WORLD, agreement)
    for index, _ in enumerate(schedule.steps):
        sender.after(index)
    assert len(lane.gathered) > 1
    assert lane.gathered[0] == "agreed"
