"""Log-probabilities under every strategy against the stock model; steps of policies and preferences."""

from __future__ import annotations

import functools

import logprob_cases as cases
import pytest
import torch
from family_cases import Case

from odysseus_kernels.strategies import STRATEGIES

LLAMA = Case(kv_heads=4, changes=cases.CHANGES)
TIED = Case(tied=True, changes=cases.CHANGES)
EXPERTS = Case(family="qwen3_moe", changes=(("num_hidden_layers", 2),))
RUNS = [(LLAMA, strategy, world, ring, ring == 2) for strategy in STRATEGIES for world, ring in ((2, 1), (4, 2))]
RUNS += [(TIED, "odysseus", 2, 1, True), (TIED, "tp", 2, 2, False), (EXPERTS, "ulysses", 2, 1, False)]


@functools.cache
def stock(case: Case, packed: bool):
    return cases.stock_steps(case, packed=packed)


@pytest.mark.parametrize(("case", "strategy", "world", "ring", "packed"), RUNS)
def test_steps_are_those_of_one_process(ranks, case, strategy, world, ring, packed):
    """fp32: products of 96 numbers, and gradients over 42 tokens."""
    truth = stock(case, packed)
    for found in ranks(world).run(cases.parallel_steps, case, strategy, ring, packed):
        torch.testing.assert_close(found["reference"], truth["reference"], rtol=2e-5, atol=2e-5)
        for name in ("policy", "preference"):
            mine, right = found[name], truth[name]
            torch.testing.assert_close(mine["logprobs"], right["logprobs"], rtol=2e-5, atol=2e-5)
            assert mine["loss"] == pytest.approx(right["loss"], rel=2e-5, abs=2e-6)
            assert mine["gradients"].keys() == right["gradients"].keys()
            for parameter, gradient in mine["gradients"].items():
                expected = right["gradients"][parameter]
                assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-7, (name, parameter)


def test_beside_fsdp(ranks):
    truth = cases.stock_logprobs(Case(changes=cases.CHANGES).model(), cases.rollouts()).detach()
    for rank, found in enumerate(ranks(4).run(cases.beside_fsdp)):
        torch.testing.assert_close(found, truth[rank // 2 : rank // 2 + 1], rtol=2e-5, atol=2e-5)


def test_sums_of_parts_are_added(ranks):
    model = Case(changes=cases.CHANGES).model()
    cases.stock_logprobs(model, cases.rollouts()).sum().backward()
    expected = model.model.embed_tokens.weight.grad
    for strategy in STRATEGIES:
        for found in ranks(2).run(cases.parts, strategy):
            assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_refusals(ranks):
    ranks(2).run(cases.refusals)
