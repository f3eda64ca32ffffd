"""The tables of the strategies, without any rank."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, get_args

import pytest

from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.errors import FallbackWarning
from odysseus_kernels.nn import sequence
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.linear import VocabParallelLinear, Zero3Linear
from odysseus_kernels.nn.parameters import Cut
from odysseus_kernels.nn.replicated import Replicated
from odysseus_kernels.strategies import STRATEGIES, get_strategy
from odysseus_kernels.strategies.base import LayerRole, ModelShape, ModuleRole, apply_strategy

SHAPE = ModelShape(
    hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocabulary=128256, tied=False
)  # fmt: skip
WHOLE, ROWS, COLUMNS, ALL_ROWS, ALL_COLUMNS = Cut(), Cut(0), Cut(1), Cut(0, "everyone"), Cut(1, "everyone")


def group(size: int, ring: int = 1) -> SequenceGroup:
    """The sizes alone: nothing is sent."""
    nothing: Any = None
    return SequenceGroup(nothing, nothing, 0, size, OverlapConfig(), nothing, 0, ring, nothing, 0, nothing, nothing)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_every_role_has_a_row(strategy, size):
    for ring in (1, 2):
        strategy.check(SHAPE, group(size, ring))
        assert set(strategy.placements(SHAPE, group(size, ring))) == set(get_args(LayerRole))
        assert set(strategy.modules(SHAPE, group(size, ring))) == set(get_args(ModuleRole))


@pytest.mark.parametrize(
    ("strategy", "attention", "output", "inner", "down", "head"),
    [
        ("tp", ROWS, COLUMNS, ROWS, COLUMNS, ROWS),
        ("tp_sp", ROWS, COLUMNS, ROWS, COLUMNS, ROWS),
        ("odysseus", ROWS, COLUMNS, ALL_ROWS, ALL_ROWS, ALL_ROWS),
        ("ulysses", ALL_ROWS, ALL_COLUMNS, ALL_ROWS, ALL_ROWS, ALL_ROWS),
        ("tsp", ALL_ROWS, ALL_ROWS, ALL_ROWS, ALL_ROWS, ALL_ROWS),
    ],
)
def test_placements(strategy, attention, output, inner, down, head):
    table = get_strategy(strategy).placements(SHAPE, group(8))
    assert {table[role].weight for role in ("query", "key", "value")} == {attention}
    assert {table[role].weight for role in ("gate", "up")} == {inner}
    assert (table["output"].weight, table["down"].weight, table["head"].weight) == (output, down, head)
    assert {table[role].weight for role in ("embedding", "norm", "head_norm", "router")} == {WHOLE}
    assert table["experts"].weight == ALL_ROWS


@pytest.mark.parametrize("strategy", ["tp", "tp_sp", "odysseus"])
def test_more_ranks_than_key_value_heads(strategy):
    """These are replicated, queries are not."""
    wide = get_strategy(strategy).placements(SHAPE, group(16))
    assert (wide["query"].weight, wide["key"].weight, wide["value"].weight) == (ROWS, WHOLE, WHOLE)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("changes", "size", "cut"), [({}, 8, True), ({"tied": True}, 8, False), ({}, 5, False)])
def test_head(strategy, changes, size, cut):
    chosen, shape = get_strategy(strategy), dataclasses.replace(SHAPE, **changes)
    distributed = VocabParallelLinear if strategy in ("tp", "tp_sp") else Zero3Linear
    assert (chosen.placements(shape, group(size))["head"].weight != WHOLE) == cut
    assert chosen.modules(shape, group(size))["head"] is (distributed if cut else Replicated)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_head_that_is_not_cut_is_said(strategy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # cut, or whole because the model ties it
        apply_strategy(strategy, SHAPE, [], group(8))
        apply_strategy(strategy, dataclasses.replace(SHAPE, tied=True), [], group(5))
    with pytest.warns(FallbackWarning, match="do not divide a vocabulary of 128257: every rank holds"):
        apply_strategy(strategy, dataclasses.replace(SHAPE, vocabulary=128257), [], group(8))


@pytest.mark.parametrize(
    ("strategy", "changes", "size", "ring", "match"),
    [
        ("odysseus", {}, 3, 1, "heads that 3 ranks divide, got 32: use 1, 2, 4, 8, 16 or 32 ranks"),
        ("tp", {"kv_heads": 6, "heads": 12}, 4, 1, "got 6: use 1, 2, 3, 6 or 12 ranks"),
        ("tp_sp", {"intermediate": 14338}, 4, 1, "an intermediate size that 4 ranks divide .* is 14340"),
        ("odysseus", {"intermediate": 14338}, 4, 1, "an intermediate size .* got 14338: the next one is 14340"),
        ("odysseus", {"intermediate": 14340}, 4, 2, "an intermediate size that 8 ranks divide .* is 14344"),
        ("ulysses", {"hidden": 4098}, 4, 1, "a hidden size that 4 ranks divide .* got 4098: the next one is 4100"),
        ("ulysses", {"kv_heads": 1, "head_dim": 10}, 4, 1, "a key/value projection that 4 ranks divide .* got 10"),
        ("tsp", {"intermediate": 14340}, 4, 2, "an intermediate size that 8 ranks divide .* is 14344"),
        ("tsp", {"heads": 5, "head_dim": 25}, 4, 1, "a query projection that 4 ranks divide .* got 125: .* is 128"),
        ("odysseus", {"experts": 6}, 4, 1, "experts that 4 ranks divide .* got 6: use 1, 2, 3 or 6 ranks"),
    ],
)
def test_check(strategy, changes, size, ring, match):
    with pytest.raises(ValueError, match=match):
        get_strategy(strategy).check(dataclasses.replace(SHAPE, **changes), group(size, ring))


def test_heads_of_tsp_need_not_divide():
    get_strategy("tsp").check(dataclasses.replace(SHAPE, heads=30, kv_heads=3), group(8, 2))


def test_unknown_strategy():
    with pytest.raises(
        ValueError, match=r"expected one of \['odysseus', 'tp', 'tp_sp', 'tsp', 'ulysses'\], got 'megatron'"
    ):
        get_strategy("megatron")


def test_batches_are_cut_as_strategies_hold_tokens():
    assert {name: strategy.tokens for name, strategy in STRATEGIES.items()} == sequence._TOKENS
    assert {name for name, strategy in STRATEGIES.items() if strategy.folded} == sequence._FOLDED
