"""Models whose attention is pipelined are the stock model: loss, logits, all gradients."""

from __future__ import annotations

import pytest
from family_cases import FAMILIES, Case
from test_families import VARIANTS, check

STRATEGIES = ("odysseus", "tp_sp")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_stock(ranks, family, strategy):
    for world_size, ring, pieces in ((2, 1, 4), (3, 1, 2), (4, 1, 3), (4, 2, 3)):
        check(ranks, Case(family=family), strategy, world_size, ring, {"pipeline": pieces})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_stock(ranks, variant, strategy):
    for world_size, ring in ((2, 1), (4, 2)):
        check(ranks, VARIANTS[variant], strategy, world_size, ring, {"pipeline": 4})


@pytest.mark.parametrize("settings", ({"gathered": "save"}, {"mode": "unfused"}, {"transport": "collective"}))
def test_modes_and_transports(ranks, settings):
    for strategy in STRATEGIES:
        for world_size, ring in ((2, 1), (4, 2)):
            check(ranks, Case(kv_heads=4, family="qwen3"), strategy, world_size, ring, {"pipeline": 3, **settings})
