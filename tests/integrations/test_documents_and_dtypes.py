"""Packed documents do not see one another, half precision is as exact as on one process, dropout under Ring."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from covering import every_pair
from family_cases import (
    MIXTURES,
    Case,
    assemble,
    logits_pair,
    mixed_model,
    mixed_step,
    mixed_types,
    packed_positions,
    parallel_step,
    stock_step,
)

from odysseus_kernels.strategies import STRATEGIES
from odysseus_kernels.testing.compare import unit_roundoff

MESHES = ((2, 1), (4, 2))  # ranks in all, ring ranks outside
PACKED = {"llama": Case(packed=True, kv_heads=4), "mistral": Case(family="mistral", packed=True, kv_heads=4)}


@every_pair(family=PACKED, strategy=STRATEGIES, mesh=MESHES)
def test_a_token_changes_its_own_document_only(ranks, family, strategy, mesh):
    case, (world_size, ring) = PACKED[family], mesh
    second = int((packed_positions(case.length)[1:] == 0).nonzero()) + 1
    documents = (slice(0, second), slice(second, case.length))
    for token, own, other in ((0, *documents), (second, *reversed(documents))):
        changed = dataclasses.replace(case, changed_token=token)
        results = ranks(world_size).run(logits_pair, case, changed, strategy, ring)
        first, after = (assemble(results, name, case.length) for name in ("first", "second"))
        assert torch.equal(first[:, other], after[:, other]), f"ring {ring}: exactly nothing may change"
        assert (first[:, own] != after[:, own]).any(dim=-1).all(), f"ring {ring}: all that see the token change"


def _errors(steps, truths):
    """Relative errors of logits and gradients over all batches: those of the few numbers of one bias are noise."""
    squares = {}
    for step, truth in zip(steps, truths, strict=True):
        pairs = {name: (step["gradients"][name], gradient) for name, gradient in truth["gradients"].items()}
        for name, (found, true) in {"logits": (step["logits"], truth["logits"]), **pairs}.items():
            error, size = squares.get(name, (0.0, 0.0))
            error += float((found.double() - true).square().sum())
            squares[name] = (error, size + float(true.square().sum()))
    return {name: (error / size) ** 0.5 for name, (error, size) in squares.items()}


@every_pair(family=("llama", "starcoder2"), strategy=STRATEGIES, mesh=MESHES)
def test_bf16(ranks, family, strategy, mesh):
    """The contract: at most 1.5 times the error of the single process in bf16, and 2e-3."""
    cases = [Case(family=family, dtype=torch.bfloat16, kv_heads=4, changed_token=token) for token in (None, 3)]
    truths = []
    for case in cases:
        # The truth has the weights that bf16 can hold.
        exact = case.model().double()
        out = exact(**case.whole_batch(), use_cache=False)
        out.loss.backward()
        gradients = {name: p.grad for name, p in exact.named_parameters()}
        truths.append({"logits": out.logits.detach(), "gradients": gradients})
    single = _errors([stock_step(case) for case in cases], truths)
    world_size, ring = mesh
    steps = []
    for case in cases:
        results = ranks(world_size).run(parallel_step, case, strategy, ring)
        logits = assemble(results, "logits", case.length)
        steps.append({"logits": logits, "gradients": results[0]["gradients"]})
    for name, error in _errors(steps, truths).items():
        assert error <= 1.5 * single[name] + 2e-3, f"ring {ring}, {name}: {error:.1e}, single {single[name]:.1e}"


@every_pair(
    family_and_dtype=(("llama", torch.bfloat16), ("starcoder2", torch.bfloat16), ("llama", torch.float16)),
    strategy=STRATEGIES,
    mesh=MESHES,
)
def test_autocast(ranks, family_and_dtype, strategy, mesh):
    """fp32 weights under autocast: at most 1.5 times the error of a stock model under autocast, gradients in fp32."""
    (family, dtype), (world_size, ring) = family_and_dtype, mesh
    cases = [Case(family=family, kv_heads=4, autocast_to=dtype, changed_token=token) for token in (None, 3)]
    truths, singles = [], []
    for case in cases:
        exact = dataclasses.replace(case, autocast_to=None).model().double()
        out = exact(**case.whole_batch(), use_cache=False)
        out.loss.backward()
        truths.append({"logits": out.logits.detach(), **{name: p.grad for name, p in exact.named_parameters()}})
        single = stock_step(case)
        singles.append({"logits": single["logits"], **single["gradients"]})
    found = []
    for case in cases:
        results = ranks(world_size).run(parallel_step, case, strategy, ring)
        found.append({"logits": assemble(results, "logits", case.length), **results[0]["gradients"]})
        assert all(gradient.dtype == torch.float32 for gradient in results[0]["gradients"].values())
    for name in truths[0]:
        # Of all batches together: a ratio of errors of the few numbers of one bias is noise.
        error, limit = (
            sum(
                float((one[name].double() - true[name]).square().sum()) for one, true in zip(steps, truths, strict=True)
            )
            for steps in (found, singles)
        )
        assert error**0.5 <= 1.5 * limit**0.5, f"ring {ring}, {name}: {error**0.5:.1e}, single {limit**0.5:.1e}"


def test_parts_of_different_types(ranks):
    """What a stock model computes is computed, and what it refuses is refused in words that say what to do."""
    cases = [Case(kv_heads=4, autocast_to=dtype) for dtype in (None, torch.bfloat16)]
    found = iter(ranks(2).run(mixed_types, cases)[0])
    refused = 0
    for mixture in MIXTURES:
        for case in cases:
            stock = mixed_step(case, mixed_model(case, mixture), case.whole_batch())
            for result in (next(found), next(found)):
                if isinstance(stock, str):
                    refused += 1
                    assert "dtype" in result and "torch.autocast" in result, mixture
                else:
                    # Roundings to bf16 of single values, averaged over a batch: a few of a hundred numbers each.
                    assert result == pytest.approx(stock, rel=unit_roundoff(torch.bfloat16)), mixture
    assert refused == 2 * 3, "the head, norms in fp32 and the layer, without autocast"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropout_under_ring_does_not_depend_on_how_heads_and_tokens_are_cut(ranks, strategy):
    """It is drawn by head and position of the whole sequence: every mesh with a ring drops the same."""
    case = Case(kv_heads=4, changes=(("attention_dropout", 0.3),))
    first = ranks(2).run(parallel_step, case, strategy, 2)
    assert abs(first[0]["loss"] - stock_step(Case(kv_heads=4))["loss"]) > 1e-4, "something is dropped"
    for world_size, ring in ((4, 2), (4, 4)):
        results = ranks(world_size).run(parallel_step, case, strategy, ring)
        assert results[0]["loss"] == pytest.approx(first[0]["loss"], rel=1e-6)
        for name, gradient in first[0]["gradients"].items():
            error = (results[0]["gradients"][name] - gradient).norm() / gradient.norm()
            assert error <= 1e-4, f"ring {ring}, {name}: {error:.1e}"
