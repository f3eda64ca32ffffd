"""What a layer with a feed-forward network in tiles sends is what the formulas say, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
from family_cases import Case, peers_of
from tile_bytes_cases import bytes_of_a_layer

from odysseus_kernels.planner.formulas import LayerShape, traffic
from odysseus_kernels.strategies import STRATEGIES

# 2 sequences of 12 tokens on each rank: tiles of 7 tokens leave 3, tiles of 100 are one.
SETTINGS: list[dict[str, Any]] = [
    {"tile_rows": 7},
    {"tile_rows": 100, "gathered": "save", "transport": "collective"},
    {"tile_rows": 7, "mode": "unfused"},
]


def _shape(case: Case) -> LayerShape:
    biased = case.family == "starcoder2"
    sizes = {"hidden": 96, "intermediate": 144, "heads": 12, "kv_heads": 12, "head_dim": 8}
    names = ("qkv_bias", "out_bias", "mlp_bias", "norm_bias")
    return LayerShape(**sizes, gated=not biased, **dict.fromkeys(names, biased))


@pytest.mark.parametrize("ring", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recorder_equals_formula(ranks: Any, strategy: str, ring: int) -> None:
    runs = [("llama", SETTINGS[0], True), ("starcoder2", SETTINGS[0], False)]
    if ring == 1:
        runs += [("starcoder2", SETTINGS[1], True), ("llama", SETTINGS[2], False)]
    for family, settings, checkpointed in runs:
        case = Case(family=family)
        for rank, found in enumerate(ranks(2).run(bytes_of_a_layer, case, strategy, ring, settings, checkpointed)):
            expected = traffic(
                _shape(case),
                strategy,
                2 // ring,
                tokens=case.batch * case.length,
                ring=ring,
                gathered=settings.get("gathered", "regather"),
                checkpointing=checkpointed,
                tile_rows=settings["tile_rows"],
                ring_peers=peers_of(case, strategy, 2, ring, rank),
            )
            assert found == expected, f"rank {rank}, {family}, {settings}, {checkpointed=}"
