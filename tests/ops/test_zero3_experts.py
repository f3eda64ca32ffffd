"""Experts with sharded weights against all experts on all tokens in fp64."""

from __future__ import annotations

import experts_cases as cases
import pytest
import torch
from covering import every_pair
from experts_cases import Problem

from odysseus_kernels.testing.spawn import RankPools

TRANSPORTS = ("symmetric", "collective")
# Tokens differ between ranks, and one rank has none at all.
TOKENS = {1: (9,), 2: (7, 12), 3: (6, 0, 11), 4: (0, 9, 5, 3)}


@every_pair(dtype=("float64", "float32", "bfloat16"), world=(1, 2, 3, 4), transport=TRANSPORTS)
def test_output_and_gradients(ranks: RankPools, dtype: str, world: int, transport: str) -> None:
    experts = 6 if world != 4 else 8
    ranks(world).run(cases.check, Problem(experts, TOKENS[world]), dtype, transport)


@pytest.mark.parametrize("activation", sorted(cases.FUNCTIONS))
def test_activations(ranks: RankPools, activation: str) -> None:
    problem = Problem(4, (8, 8), activation=activation)
    ranks(2).run(cases.check, problem, "float64", "symmetric")
    ranks(2).run(cases.check, problem, "float32", "symmetric")


def test_one_expert_a_token_and_all_experts(ranks: RankPools) -> None:
    for top_k in (1, 4):
        ranks(2).run(cases.check, Problem(4, (5, 6), top_k=top_k), "float64", "symmetric")


def test_routing_weights_of_another_type(ranks: RankPools) -> None:
    ranks(2).run(cases.check, Problem(4, (20, 20), routing_dtype="float32"), "bfloat16", "symmetric")


def test_float16(ranks: RankPools) -> None:
    ranks(2).run(cases.check, Problem(4, (20, 20)), "float16", "symmetric")


@pytest.mark.parametrize("world", (1, 2, 3))
def test_experts_without_tokens_have_zero_gradients(ranks: RankPools, world: int) -> None:
    ranks(world).run(cases.unused_experts)


@every_pair(mode=("fused", "unfused"), transport=TRANSPORTS, world=(1, 2, 3, 4))
def test_bytes_equal_the_formula(ranks: RankPools, mode: str, transport: str, world: int) -> None:
    """f·P forward, 2·f·P backward, P the elements of all experts: (N-1) times a rank's share of them."""
    for dtype in ("float32", "bfloat16"):
        share = 4 * 3 * 12 * 10 * getattr(torch, dtype).itemsize
        names = ("forward all_gather", "backward all_gather", "backward reduce_scatter")
        expected = dict.fromkeys(names, (world - 1) * share) if world > 1 else {}
        assert ranks(world).run(cases.traffic, transport, mode, dtype) == [expected] * world


@pytest.mark.parametrize("world", (1, 2))
def test_what_is_kept_for_backward(ranks: RankPools, world: int) -> None:
    # Both products of each of 6 · 2 pairs with gate and up, of width 10.
    assert ranks(world).run(cases.saved_elements) == [6 * 2 * 2 * 10] * world


def test_opcheck(ranks: RankPools) -> None:
    ranks(2).run(cases.opcheck)


def test_compile_and_checkpointing(ranks: RankPools) -> None:
    ranks(2).run(cases.compiled)


def test_any_subset_of_gradients(ranks: RankPools) -> None:
    gate_up, down = 2 * 2 * 10 * 12 * 4, 2 * 10 * 12 * 4
    for sent in ranks(2).run(cases.some_gradients):
        for (of_x, of_routing, of_gate_up, of_down), count in sent.items():
            gathered = of_x * gate_up + (of_x or of_routing or of_gate_up) * down
            assert count == gathered + of_gate_up * gate_up + of_down * down


def test_bad_input(ranks: RankPools) -> None:
    for said in ranks(2).run(cases.messages):
        for name, *words in (
            ("width", "gate_up_shard [experts, 2 * intermediate, 7]", "[2, 12, 8]"),
            ("down", "down_shard [2, 8, 6]", "[2, 8, 5]"),
            ("odd", "2 * intermediate", "[2, 11, 8]"),
            ("dimensions", "x with 2 dimensions", "[1, 3, 8]"),
            ("tensor", "top_k_index to be a tensor", "list"),
            ("tokens", "[3, k]", "[2, 2]"),
            ("routing", "[3, k]", "top_k_weights [3, 1]"),
            ("index type", "int64 or int32", "torch.float32"),
            ("type", "torch.float32", "torch.float64"),
            ("integers", "float32, bfloat16, float16 or float64", "torch.int64"),
            ("device", "x's device cpu", "meta"),
            ("range", "from 0 to 3", "4 to 4"),
            ("negative", "from 0 to 3", "-1 to -1"),
            ("activation", "'gelu', 'gelu_pytorch_tanh', 'relu', 'silu'", "'tanh'"),
            ("tiles", '"auto", "fused" or "unfused"', '"tiles"'),
        ):
            assert said[name].startswith("zero3_experts: expected")
            for word in words:
                assert word in said[name], said[name]
