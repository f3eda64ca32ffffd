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
