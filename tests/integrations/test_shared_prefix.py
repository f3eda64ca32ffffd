"""Completions that share their prompt in one row equal, with gradients, a row for each with the prompt repeated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from shared_prefix_cases import CASE, refused, repeated, shared, stock_entropies, with_statistics

# Rounding of fp64, and of fp32, in which Llama's norms and eager attention's softmax are computed whatever the type.
ERROR, NARROW_ERROR = 1e-11, 1e-6
# Norms in the model's own type; the window is that of a later test.
WIDE = dataclasses.replace(CASE, family="starcoder2", changes=(("sliding_window", None),))


def _check(found: Any, truth: Any, error: float = NARROW_ERROR) -> None:
    for group, expected in zip(found[0], truth[0], strict=True):
        for one, other in zip(group, expected, strict=True):
            assert (one - other).abs().max() <= error * other.abs().max()
    assert found[1].keys() == truth[1].keys()
    for name, gradient in truth[1].items():
        assert (found[1][name] - gradient).norm() <= error * gradient.norm(), name


@pytest.mark.parametrize("strategy", ["odysseus", "ulysses", "tp_sp", "tp"])
def test_equal_to_a_row_for_each_in_fp64(ranks: Any, strategy: str) -> None:
    for found in ranks(2).run(shared, WIDE, strategy, {}):
        _check(found, repeated(WIDE), ERROR)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("strategy", ["odysseus", "ulysses", "tp_sp", "tp"])
def test_equal_to_a_row_for_each(ranks: Any, strategy: str, attention: str) -> None:
    case = dataclasses.replace(CASE, attention=attention)
    for found in ranks(2).run(shared, case, strategy, {}):
        _check(found, repeated(case))


def test_one_ring_of_all_with_eager_attention(ranks: Any) -> None:
    case = dataclasses.replace(CASE, attention="eager")
    for found in ranks(2).run(shared, case, "tsp", {}):
        _check(found, repeated(case))


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_other_families_on_four_ranks(ranks: Any, family: str) -> None:
    case = dataclasses.replace(CASE, family=family)
    for found in ranks(4).run(shared, case, "odysseus", {"pipeline": "auto"}):
        _check(found, repeated(case))


def test_experts(ranks: Any) -> None:
    """In fp32, which stock experts need."""
    changes = (("output_router_logits", False),)
    case = dataclasses.replace(CASE, family="mixtral", dtype=torch.float32, changes=changes)
    for found in ranks(2).run(shared, case, "odysseus", {}):
        _check(found, repeated(case), 1e-4)


def test_entropies_and_the_loss(ranks: Any) -> None:
    truth = stock_entropies(CASE)
    tokens = torch.cat([one for group in repeated(CASE)[0] for one in group])
    for entropies, _, loss in ranks(2).run(with_statistics, CASE):
        assert (entropies - truth).abs().max() <= NARROW_ERROR * truth.abs().max()
        assert loss == pytest.approx(-tokens.mean().item(), rel=NARROW_ERROR)


def test_refused_by_name_elsewhere(ranks: Any) -> None:
    for said in ranks(2).run(refused):
        assert "got Ring attention, which knows documents of their own only: use attn_implementation=" in said["tsp"]
        assert "got Ring attention, which knows documents of their own only: repeat the prompt" in said["ring"]
        assert "got a sliding window, which counts tokens of other completions" in said["window"]
        assert "shared_prefix: expected attention that is not pipelined, got 2 pieces" in said["pieces"]
        assert "shared_prefix: expected attention that is not pipelined, got 2 groups of heads" in said["groups"]
        assert "shared_prefix: expected no attention_mask beside it" in said["mask"]
