"""The table of Odysseus, without any rank."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
from torch.distributed.tensor import Replicate, Shard

from odysseus_kernels.nn.linear import Zero3Linear
from odysseus_kernels.nn.replicated import Replicated
from odysseus_kernels.strategies import STRATEGIES, get_strategy
from odysseus_kernels.strategies.base import LayerRole, ModelShape, ModuleRole

SHAPE = ModelShape(
    hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocabulary=128256, tied=False
)  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_every_role_has_a_row(strategy, size):
    strategy.check(SHAPE, size)
    assert set(strategy.placements(SHAPE, size)) == set(get_args(LayerRole))
    assert set(strategy.modules(SHAPE, size)) == set(get_args(ModuleRole))


def test_placements():
    odysseus = get_strategy("odysseus")
    table = odysseus.placements(SHAPE, 8)
    assert {table[role].weight for role in ("query", "key", "value", "gate", "up", "down", "head")} == {Shard(0)}
    assert (table["output"].weight, table["output"].bias) == (Shard(1), Replicate())
    assert {table[role].weight for role in ("embedding", "norm")} == {Replicate()}
    # More ranks than key/value heads: these are replicated, queries are not.
    wide = odysseus.placements(SHAPE, 16)
    assert (wide["query"].weight, wide["key"].weight, wide["value"].weight) == (Shard(0), Replicate(), Replicate())


@pytest.mark.parametrize(("changes", "size", "cut"), [({}, 8, True), ({"tied": True}, 8, False), ({}, 5, False)])
def test_head(changes, size, cut):
    odysseus, shape = get_strategy("odysseus"), dataclasses.replace(SHAPE, **changes)
    assert odysseus.placements(shape, size)["head"].weight == (Shard(0) if cut else Replicate())
    assert odysseus.modules(shape, size)["head"] is (Zero3Linear if cut else Replicated)


@pytest.mark.parametrize(
    ("changes", "size", "match"),
    [
        ({}, 3, "heads that 3 ranks divide, got 32: use 1, 2, 4, 8, 16 or 32 ranks"),
        ({"kv_heads": 6, "heads": 12}, 4, "got 6: use 1, 2, 3, 6 or 12 ranks"),
        ({"intermediate": 14338}, 4, "an intermediate size that 4 ranks divide .* got 14338: the next one is 14340"),
        ({"hidden": 4098}, 4, "a hidden size that 4 ranks divide .* got 4098: the next one is 4100"),
    ],
)
def test_check(changes, size, match):
    with pytest.raises(ValueError, match=match):
        get_strategy("odysseus").check(dataclasses.replace(SHAPE, **changes), size)


def test_unknown_strategy():
    with pytest.raises(ValueError, match=r"expected one of \['odysseus'\], got 'megatron'"):
        get_strategy("megatron")
