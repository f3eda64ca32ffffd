"""Mixtures of experts over ranks against the stock blocks and the stock loss of transformers."""

from __future__ import annotations

import moe_cases as cases
import pytest
import torch
from moe_cases import Problem
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from odysseus_kernels.nn.moe import check_experts, load_balancing_loss
from odysseus_kernels.testing.compare import rounding_tolerance
from odysseus_kernels.testing.spawn import RankPools

FAMILIES = ("mixtral", "qwen3", "qwen3_normed")
# (experts, tokens of each rank): fewer pairs than experts on some ranks, so that experts go without tokens there.
SIZES = {1: (4, (7,)), 2: (4, (3, 9)), 3: (6, (2, 7, 1)), 4: (8, (5, 0, 1, 9))}


@pytest.mark.parametrize("world", sorted(SIZES))
@pytest.mark.parametrize("dtype", ("float64", "float32"))
def test_block_equals_the_stock_block(ranks: RankPools, dtype: str, world: int) -> None:
    for family in FAMILIES:
        for transport, mode in (("symmetric", "fused"), ("collective", "fused"), ("symmetric", "unfused")):
            ranks(world).run(cases.check_own_tokens, Problem(family, *SIZES[world], dtype, transport, mode))


@pytest.mark.parametrize("world", sorted(SIZES))
@pytest.mark.parametrize("dtype", ("float64", "float32"))
def test_replicated_tokens(ranks: RankPools, dtype: str, world: int) -> None:
    """Tokens that the ranks do not divide, and fewer than make a slice for each rank."""
    experts = SIZES[world][0]
    for family, tokens in (("mixtral", 7), ("qwen3", 5), ("mixtral", 2)):
        for transport in ("symmetric", "collective"):
            ranks(world).run(cases.check_replicated_tokens, Problem(family, experts, (tokens,), dtype, transport))


@pytest.mark.parametrize("dtype", ("float64", "float32"))
def test_ring_outside(ranks: RankPools, dtype: str) -> None:
    ranks(4).run(cases.check_ring, Problem("qwen3", 8, (10,), dtype))


@pytest.mark.parametrize("mode", ("fused", "unfused"))
def test_16_bits_are_no_worse_than_stock(ranks: RankPools, mode: str) -> None:
    problem = Problem("qwen3", 4, (40, 40), "bfloat16", mode=mode)
    for errors in ranks(2).run(cases.errors_in_16_bits, problem):
        assert set(errors) == {"output", "input", "gate_up_proj", "down_proj"}
        for name, (error, of_stock) in errors.items():
            assert error <= 1.5 * of_stock, (name, error, of_stock)


def test_number_of_ranks() -> None:
    for size in (1, 2, 3, 6):
        check_experts(6, size)
    with pytest.raises(ValueError, match=r"experts that 4 ranks divide .*, got 6: use 1, 2, 3 or 6 ranks"):
        check_experts(6, 4)
    with pytest.raises(ValueError, match=r"got 8: use 1, 2, 4 or 8 ranks"):
        check_experts(8, 16)


@pytest.mark.parametrize("world", (1, 2, 3, 4))
@pytest.mark.parametrize("masked", (False, True), ids=("all", "masked"))
def test_balancing_loss_is_that_of_all_tokens(ranks: RankPools, masked: bool, world: int) -> None:
    tokens = (5, 8, 0, 4)[:world]
    mask = cases.padding_mask(tokens) if masked else None
    for dtype in ("float32", "bfloat16", "float64"):
        kind = getattr(torch, dtype)
        logits = [one.requires_grad_() for one in cases.router_logits(world, tokens, kind)]
        # The stock loss adds in fp32 whatever the type; ours in fp64 for fp64, so the looser one decides.
        expected = load_balancing_loss_func(tuple(logits), 6, cases.TOP_K, mask)
        (3 * expected).backward()
        tolerance = rounding_tolerance(torch.float32, terms=3 * sum(tokens))
        # A gradient of 16 bits passes through its type behind the sums and behind the softmax; ours does alike.
        of_gradients = max(tolerance, rounding_tolerance(kind, terms=64))
        results = ranks(world).run(cases.part_of_balancing_loss, tokens, dtype, masked, False)
        for result in results:
            assert result["loss"].dtype == (torch.float64 if dtype == "float64" else torch.float32)
            assert result["loss"].item() == pytest.approx(expected.item(), rel=tolerance)
            assert result["loss"] == results[0]["loss"]
        for layer, one in enumerate(logits):
            grad = torch.cat([result["grads"][layer] for result in results])
            assert grad.dtype == kind
            assert (grad - one.grad).double().norm() <= of_gradients * one.grad.double().norm()


def test_balancing_loss_where_every_rank_has_all_tokens(ranks: RankPools) -> None:
    alone = ranks(1).run(cases.part_of_balancing_loss, (9,), "float64", True, True)[0]
    logits = [one.requires_grad_() for one in cases.router_logits(1, (9,), torch.float64)]
    (3 * load_balancing_loss(logits, 2, group=None, attention_mask=cases.padding_mask((9,)))).backward()
    for one, grad in zip(logits, alone["grads"], strict=True):
        assert torch.equal(one.grad, grad)


def test_balancing_loss_without_tokens_that_count(ranks: RankPools) -> None:
    assert all(loss.isnan() for loss in ranks(2).run(cases.loss_of_nothing))


def test_balancing_loss_passes_gradcheck() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: load_balancing_loss([x, 2 * x], 2, group=None), (logits,))


def test_balancing_loss_refuses() -> None:
    logits = torch.randn(5, 4)
    with pytest.raises(ValueError, match="at least one layer"):
        load_balancing_loss([], 2, group=None)
    with pytest.raises(ValueError, match=r"\[tokens, experts\] alike in every layer, got \[5, 4\] and \[3, 4\]"):
        load_balancing_loss([logits, logits[:3]], 2, group=None)
    with pytest.raises(ValueError, match="top_k: expected 1 to 4.* got 5"):
        load_balancing_loss([logits], 5, group=None)
    with pytest.raises(ValueError, match=r"attention_mask: expected 5 elements.* got \[2, 3\]"):
        load_balancing_loss([logits], 2, group=None, attention_mask=torch.ones(2, 3))
