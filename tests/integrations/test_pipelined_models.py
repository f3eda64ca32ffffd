"""Models whose attention is pipelined are the stock model: loss, logits, all gradients."""

from __future__ import annotations

import pytest
from family_cases import FAMILIES, Case
from test_families import VARIANTS, check

STRATEGIES = ("odysseus", "tp_sp")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_stock(ranks, family, strategy):
    for world_size, pieces in ((2, 4), (3, 2), (4, 3)):
        check(ranks, Case(family=family), strategy, world_size, 1, {"pipeline": pieces})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_stock(ranks, variant, strategy):
    check(ranks, VARIANTS[variant], strategy, 2, 1, {"pipeline": 4})


@pytest.mark.parametrize("settings", ({"gathered": "save"}, {"mode": "unfused"}, {"transport": "collective"}))
def test_modes_and_transports(ranks, settings):
    for strategy in STRATEGIES:
        check(ranks, Case(kv_heads=4, family="qwen3"), strategy, 2, 1, {"pipeline": 3, **settings})
