"""Models whose attention is pipelined are the stock model: loss, logits, all gradients."""

from __future__ import annotations

import dataclasses

import pipelined_model_cases as cases
import pytest
import torch
from covering import every_pair
from family_cases import FAMILIES, Case, assemble, logits_pair
from test_families import VARIANTS, check

STRATEGIES = ("odysseus", "tp_sp")


@every_pair(family=FAMILIES, strategy=STRATEGIES, mesh_and_pieces=((2, 1, 4), (3, 1, 2), (4, 1, 3), (4, 2, 3)))
def test_family_equals_stock(ranks, family, strategy, mesh_and_pieces):
    *mesh, pieces = mesh_and_pieces
    check(ranks, Case(family=family), strategy, *mesh, {"pipeline": pieces})


@every_pair(variant=VARIANTS, strategy=STRATEGIES, mesh=((2, 1), (4, 2)))
def test_variant_equals_stock(ranks, variant, strategy, mesh):
    check(ranks, VARIANTS[variant], strategy, *mesh, {"pipeline": 4})


@every_pair(
    settings=({"gathered": "save"}, {"mode": "unfused"}, {"transport": "collective"}),
    strategy=STRATEGIES,
    mesh=((2, 1), (4, 2)),
)
def test_modes_and_transports(ranks, settings, strategy, mesh):
    check(ranks, Case(kv_heads=4, family="qwen3"), strategy, *mesh, {"pipeline": 3, **settings})


@every_pair(family=FAMILIES, mesh=((2, 1), (3, 1)))
def test_family_under_ulysses_equals_stock(ranks, family, mesh):
    """Groups of heads instead of pieces of the sequence; experts, windows, norms and biases as they are."""
    check(ranks, Case(family=family), "ulysses", *mesh, {"pipeline": 2})


@pytest.mark.parametrize("variant", ("grouped", "tied", "odd_length", "padding_mask", "packed", "packed_sliding"))
def test_variant_under_ulysses_equals_stock(ranks, variant):
    check(ranks, VARIANTS[variant], "ulysses", 2, 1, {"pipeline": 2})


@pytest.mark.parametrize("settings", ({"mode": "unfused"}, {"transport": "collective"}, {"pipeline": 8}))
def test_modes_under_ulysses(ranks, settings):
    check(ranks, Case(family="qwen3"), "ulysses", 2, 1, {"pipeline": 3, **settings})


def test_who_is_pipelined_under_ulysses(ranks):
    ranks(2).run(cases.choices_of_groups)


def test_what_ulysses_pipelines_by_itself(ranks):
    ranks(2).run(cases.by_itself)


def test_a_forward_asks_once_for_groups_of_heads(ranks):
    ranks(2).run(cases.asked_once)


@pytest.mark.parametrize("case", (Case(dtype=torch.bfloat16), Case(autocast_to=torch.bfloat16, family="qwen3")))
def test_narrow_types_under_ulysses(ranks, case):
    """Where a number asks for it: no further from fp64 than without a pipeline."""
    for found in ranks(2).run(cases.narrow, case):
        for name, (error, usual) in found.items():
            # The same roundings, of sums in another order; 1.5 is the contract's.
            assert error <= 1.5 * usual, (name, error, usual)


def test_dropout_is_that_of_heads_and_tokens(ranks):
    """Not of ranks, groups of heads, pieces or strategies."""
    runs = ((2, "ulysses", 2), (2, "ulysses", 6), (4, "ulysses", 3), (2, "odysseus", 2))
    found = [one for world, *how in runs for one in ranks(world).run(cases.dropped, *how)]
    for one in found[1:]:
        assert one == pytest.approx(found[0], rel=1e-4)  # fp32: sums in another order


def test_who_is_pipelined(ranks):
    """Batches that do not fit are refused before anything is sent; what is chosen is said."""
    ranks(2).run(cases.choices)


@pytest.mark.parametrize("ring", (1, 2))
def test_packed_documents_do_not_leak(ranks, ring):
    """Another token in the first document: not a bit changes in the second one's logits."""
    case = Case(packed=True, kv_heads=4)
    other = dataclasses.replace(case, changed_token=3)
    results = ranks(2 * ring).run(logits_pair, case, other, "odysseus", ring, {"pipeline": 4})
    first, second = assemble(results, "first", case.length), assemble(results, "second", case.length)
    cut = case.length // 2 - 1
    assert torch.equal(first[:, cut:], second[:, cut:])
    assert not torch.equal(first[:, 3:cut], second[:, 3:cut])


@pytest.mark.parametrize("strategy", ("odysseus", "ulysses"))
@pytest.mark.parametrize("how", ("whole", "selective", "dropout"))
def test_checkpointing(ranks, how, strategy):
    """A recomputed layer gives the same bits; forward's bytes are sent again, or not with selective checkpointing."""
    ranks(2).run(cases.checkpointed, how, strategy)
