"""Operators that send ahead what the next one gathers, whatever the two communicate."""

from __future__ import annotations

import pytest
import sent_ahead_cases as cases
from covering import every_pair

from odysseus_kernels.testing.spawn import RankPools

TRANSPORTS = ("symmetric", "collective")


@every_pair(world=(2, 3), transport=TRANSPORTS, dtype=("float32", "bfloat16"), how=cases.WAYS)
def test_every_operator_for_every_other(ranks: RankPools, world: int, transport: str, dtype: str, how: str) -> None:
    for checked in ranks(world).run(cases.every_pair, transport, dtype, how):
        assert checked == len(cases.SENDERS) * len(cases.RECEIVERS)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_rank_alone_sends_ahead(ranks: RankPools, transport: str) -> None:
    for message in ranks(3).run(cases.one_rank_sends_ahead, transport):
        assert "rank 1 differs" in message and "sends ahead [1, 2, 8] float32" in message


def test_what_cannot_be_sent_ahead(ranks: RankPools) -> None:
    for messages in ranks(2).run(cases.refused):
        assert len(messages) == 6
        assert "linear_reduce_scatter: expected prefetch to be a weight shard [n/N, K]" in messages[0]
        assert "zero3_linear: expected prefetch_backward to be a weight shard" in messages[3]
        assert messages[4] == "linear_reduce_scatter: expected prefetch to be a tensor, got str"
