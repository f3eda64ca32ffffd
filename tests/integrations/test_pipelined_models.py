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


@pytest.mark.parametrize("how", ("whole", "selective", "dropout"))
def test_checkpointing(ranks, how):
    """A recomputed layer gives the same bits; forward's bytes are sent again, or not with selective checkpointing."""
    ranks(2).run(cases.checkpointed, how)
