"""ODYSSEUS_HOST: ranks that are told to be on different hosts share no memory, even where they could."""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist

import odysseus_kernels as ody
from odysseus_kernels.comm.groups import between_hosts, group_transports
from odysseus_kernels.comm.meeting.membership import this_member
from odysseus_kernels.testing.spawn import RankPools


def _on_hosts(rank: int, world: int, names: list[str]) -> tuple[str, str, int, float]:
    """What symmetric says, what auto takes, warnings, and the largest error of the result, on a group of its own."""
    os.environ["ODYSSEUS_HOST"] = names[rank]
    try:
        group = dist.new_group()
        x, weight = torch.arange(8.0).view(4, 2), torch.tensor([[1.0, 2.0]])
        refusal = ""
        try:
            config = ody.OverlapConfig(transport="symmetric")
            ody.all_gather_linear(x.chunk(world)[rank], weight, group=group, config=config)
        except ValueError as error:
            refusal = str(error)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = ody.OverlapConfig(transport="auto", mode="fused")
            y = ody.all_gather_linear(x.chunk(world)[rank], weight, group=group, config=config)
        name = group_transports(group).choose(config, x.device).name
        assert between_hosts(group, config, x.device) == (len(set(names)) > 1)
        return refusal, name, len(caught), (y - x @ weight.t()).abs().max().item()
    finally:
        del os.environ["ODYSSEUS_HOST"]


def test_ranks_with_different_names_are_on_different_hosts(ranks: RankPools) -> None:
    for refusal, name, _, error in ranks(2).run(_on_hosts, ["one", "two"]):
        assert "it needs all ranks on one host and in one container, they are on one, two" in refusal
        assert name == "collective"
        assert error == 0


def test_ranks_with_one_name_share_memory(ranks: RankPools) -> None:
    assert ranks(2).run(_on_hosts, ["one", "one"]) == [("", "symmetric", 0, 0.0)] * 2


def test_a_name_divides_a_machine_and_never_joins_two(monkeypatch) -> None:
    found = this_member()
    monkeypatch.setenv("ODYSSEUS_HOST", "one")
    named = this_member()
    assert named.host == "one"
    assert named.machine == f"{found.machine} one"
    assert not named.sees(found)
    monkeypatch.setenv("ODYSSEUS_HOST", " ")
    assert this_member() == found
