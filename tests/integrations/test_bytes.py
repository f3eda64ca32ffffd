"""What a decoder layer sends is what the formulas say, to the byte, under every strategy, mode and transport."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch
from covering import every_pair
from family_cases import Case, peers_of, traffic_of_a_layer

from odysseus_kernels.planner.formulas import LayerShape, traffic
from odysseus_kernels.planner.ring import RingPeers
from odysseus_kernels.strategies import STRATEGIES

MODES = [(mode, transport) for mode in ("fused", "unfused") for transport in ("symmetric", "collective")]
EVERYWHERE = [{"mode": mode, "transport": transport} for mode, transport in MODES]
# Gated and plain networks, biases, head norms, as many key/value heads as query heads, fewer, and fewer than ranks.
CASES: list[tuple[Case, list[dict]]] = [
    (Case(), [{}]),
    (Case(kv_heads=4), EVERYWHERE),
    (Case(family="qwen2", kv_heads=2), [{}]),
    (Case(family="qwen3", kv_heads=4, batch=1, dtype=torch.bfloat16), [{}]),
    (Case(family="starcoder2", kv_heads=1), EVERYWHERE),
]


def shape(case: Case) -> LayerShape:
    starcoder2 = case.family == "starcoder2"
    return LayerShape(
        hidden=96,
        intermediate=144,
        heads=12,
        kv_heads=case.kv_heads,
        head_dim=8,
        gated=not starcoder2,
        qkv_bias=starcoder2 or case.family == "qwen2",
        out_bias=starcoder2,
        mlp_bias=starcoder2,
        norm_bias=starcoder2,
        qk_norm=case.family == "qwen3",
    )


MESHES = ((2, 1), (3, 1), (4, 1), (4, 2), (2, 2))  # ranks in all, ring ranks


@every_pair(
    strategy=STRATEGIES,
    mesh=MESHES,
    number=range(len(CASES)),
    allowed=lambda strategy, mesh, number: mesh[0] != 3 or CASES[number][0].kv_heads == 12,
)
def test_recorder_equals_formula(ranks, strategy, mesh, number):
    world_size, ring = mesh
    case, several = CASES[number]
    check(ranks, strategy, world_size, ring, [(case, settings) for settings in (several if mesh == (2, 1) else [{}])])


@pytest.mark.parametrize(
    "mesh",
    # test_recorder_equals_formula has all of them; what is added here two ranks show, four, and four with a ring.
    [mesh if mesh in ((2, 1), (4, 1), (4, 2)) else pytest.param(mesh, marks=pytest.mark.complete) for mesh in MESHES],
)
@pytest.mark.parametrize("strategy", ("tp_sp", "odysseus", "ulysses", "tsp"))
def test_what_only_some_strategies_can(ranks, strategy, mesh):
    """Gathers that are kept, attention that is pipelined, and attention that takes all keys at once."""
    world_size, ring = mesh
    runs = []
    if strategy in ("tp_sp", "odysseus"):
        runs.append((Case(), {"gathered": "save"}))
        piped: list[tuple[Case, dict]] = [
            (Case(), {"gathered": "save"}),
            (Case(family="qwen3"), {}),
            (Case(), {"mode": "unfused"}),
        ]
        runs += [(case, {**settings, "pipeline": 2}) for case, settings in piped]
    if strategy == "ulysses" and ring == 1:
        grouped: list[tuple[Case, dict]] = [
            (Case(), {}),
            (Case(family="starcoder2"), {}),
            (Case(family="qwen3"), {"mode": "unfused"}),
        ]
        runs += [(case, {**settings, "pipeline": 3}) for case, settings in grouped]
    if strategy == "tsp":
        eager = Case(kv_heads=4, attention="eager") if world_size != 3 else Case(attention="eager")
        runs += [(eager, {}), (dataclasses.replace(eager, dtype=torch.bfloat16), {})]
    check(ranks, strategy, world_size, ring, runs)


def check(ranks, strategy, world_size, ring, runs):
    for rank, found in enumerate(ranks(world_size).run(traffic_of_a_layer, runs, strategy, ring)):
        for (case, settings), counts in zip(runs, found, strict=True):
            expected = traffic(
                shape(case),
                strategy,
                world_size // ring,
                tokens=case.batch * case.length,
                ring=ring,
                gathered=settings.get("gathered", "regather"),
                element_size=case.dtype.itemsize,
                pipelined="pipeline" in settings,
                keys_at_once=case.attention == "eager",
                ring_peers=peers_of(case, strategy, world_size, ring, rank),
            )
            assert counts == expected, f"{case}, {settings}"


@pytest.mark.parametrize(("strategy", "ring"), [("tsp", 1), ("tsp", 2), ("odysseus", 4), ("tp", 4)])
def test_a_window_within_the_next_block_is_sent_to_neighbours_only(ranks, strategy, ring):
    # Blocks of 3 tokens: a query sees its own and the one before, which in zigzag order lie on neighbouring ranks: each
    # gets one of a rank's two blocks.
    case = Case(family="mistral", changes=(("sliding_window", 3),))
    runs: list[tuple[Case, dict]] = [(case, {}), (case, {"mode": "unfused"})]
    if strategy == "odysseus":
        runs.append((case, {"pipeline": 2}))
    for rank, found in enumerate(ranks(4).run(traffic_of_a_layer, runs, strategy, ring)):
        neighbours = sum(0 <= other < 4 for other in (rank - 1, rank + 1))
        for (_, settings), counts in zip(runs, found, strict=True):
            expected = traffic(
                shape(case),
                strategy,
                4 // ring,
                tokens=case.batch * case.length,
                ring=ring,
                pipelined="pipeline" in settings,
                ring_peers=RingPeers(Fraction(neighbours, 2), Fraction(neighbours, 2)),
            )
            assert counts == expected, f"rank {rank}, {settings}"
