"""Distributions of tokens, and outputs that are whole or say that they are parts, under every strategy in fp64."""

from __future__ import annotations

import functools

import pytest
import statistics_cases as cases
import torch
from family_cases import Case

from odysseus_kernels.nn.token_statistics import TokenStatistics
from odysseus_kernels.strategies import STRATEGIES

LLAMA, TIED = cases.case_of(kv_heads=4), cases.case_of(tied=True)
# Stock experts do not take fp64.
EXPERTS = cases.case_of(family="qwen3_moe", changes=(("num_hidden_layers", 2),), dtype=torch.float32)
RUNS = [(LLAMA, strategy, 2, 1, False) for strategy in STRATEGIES]
RUNS += [(LLAMA, "tp", 4, 2, True), (LLAMA, "tp_sp", 4, 2, True), (LLAMA, "odysseus", 4, 2, False)]
RUNS += [(TIED, "odysseus", 2, 1, True), (TIED, "tp", 2, 2, False), (EXPERTS, "ulysses", 2, 1, False)]


@functools.cache
def stock(case: Case, packed: bool):
    return cases.stock_step(case, packed=packed)


@pytest.mark.parametrize(("case", "strategy", "world", "ring", "packed"), RUNS)
def test_statistics_are_those_of_one_process(ranks, case, strategy, world, ring, packed):
    """Sums of at most a few thousand products of numbers of size 1, in fp64 or fp32."""
    exact = case.dtype == torch.float64
    close, gradient_close, floor = (1e-9, 1e-9, 1e-12) if exact else (2e-5, 1e-4, 1e-7)
    expected, gradients = stock(case, packed)
    for found, mine in ranks(world).run(cases.parallel_step, case, strategy, ring, packed):
        for name, value, truth in zip(TokenStatistics._fields, found, expected, strict=True):
            torch.testing.assert_close(
                value, truth, rtol=close, atol=close, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert mine.keys() == gradients.keys()
        for name, gradient in mine.items():
            truth = gradients[name]
            assert (gradient - truth).norm() <= gradient_close * truth.norm() + floor, name


@pytest.mark.parametrize("strategy", ("odysseus", "tp"))
def test_distillation_over_the_likeliest_tokens(ranks, strategy):
    ranks(2).run(cases.distillation, strategy)


def test_beside_fsdp(ranks):
    expected, _ = stock(cases.case_of(), False)
    for rank, (entropy, top_ids) in enumerate(ranks(4).run(cases.beside_fsdp)):
        row = slice(rank // 2, rank // 2 + 1)
        torch.testing.assert_close(entropy, expected.entropy[row], rtol=1e-9, atol=1e-9)
        assert torch.equal(top_ids, expected.top_ids[row])


def test_refusals(ranks):
    ranks(2).run(cases.refusals)


@pytest.mark.parametrize("strategy", ("odysseus", "tp"))
def test_ranks_compare_ids(ranks, strategy):
    for said in ranks(2).run(cases.different_ids, strategy):
        assert "ids" in said


@pytest.mark.parametrize(
    ("strategy", "world", "ring"), [*((one, 2, 1) for one in STRATEGIES), ("tp", 4, 2), ("odysseus", 4, 2)]
)
def test_outputs_are_whole_or_parts(ranks, strategy, world, ring):
    expected = stock_outputs()
    for found in ranks(world).run(cases.outputs, strategy, ring):
        for mine, truth in zip(found["hidden_states"], expected["hidden_states"], strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)
        assert torch.equal(found["by the mesh"], found["hidden_states"][-1])
        for keep, logits in found["kept"].items():
            torch.testing.assert_close(logits, expected["kept"][keep], rtol=1e-9, atol=1e-9)
        for name, gradient in found["gradients"].items():
            truth = expected["gradients"][name]
            assert (gradient - truth).norm() <= 1e-9 * truth.norm() + 1e-12, name


@functools.cache
def stock_outputs():
    return cases.stock_outputs()


def test_tuples_with_a_loss(ranks):
    batch = cases.rollouts()
    loss, *rest = cases.case_of().model()(**batch, use_cache=False, return_dict=False)
    assert len(rest) == 1  # logits, which the parallelized model has not with labels
    for mine, others in ranks(2).run(cases.tuples_with_a_loss):
        assert mine == pytest.approx(loss.item(), rel=1e-6)  # stock losses are computed in fp32
        assert others == 0
