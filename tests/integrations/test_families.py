"""Every family under every strategy, plain and crossed with Ring, is the stock model: loss, logits, all gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from covering import every_pair
from family_cases import FAMILIES, Case, assemble, parallel_step, stock_step

from odysseus_kernels.strategies import STRATEGIES

# Single precision carries 6e-8 relative; sums of a few hundred products in another order lose about a digit. The
# contract asks for 1e-5 on logits and 1e-4 on gradients.
LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-6

# (ranks in all, ring ranks outside)
MESHES = ((2, 1), (3, 1), (4, 1), (2, 2), (4, 2))
# What is special about attention, masks and heads: Llama stands for all.
VARIANTS = {
    "grouped": Case(kv_heads=4),
    "fewer_kv_heads": Case(family="qwen2", kv_heads=2),
    "one_kv_head": Case(kv_heads=1),
    "tied": Case(tied=True),
    "vocabulary_not_divisible": Case(vocabulary=97),
    "odd_length": Case(length=23),
    "padding_mask": Case(padding_mask=True, length=22),
    "packed": Case(packed=True),
    "packed_sliding": Case(family="mistral", packed=True, kv_heads=4),
    "one_sequence": Case(batch=1),
}


def check(ranks, case, strategy, world_size, ring, settings=None):
    expected = stock_step(case)
    results = ranks(world_size).run(parallel_step, case, strategy, ring, settings)
    where = f"{case}, {strategy}, {world_size} ranks, ring {ring}"
    for result in results:
        assert result["loss"] == pytest.approx(expected["loss"], rel=LOSS_TOLERANCE), where
    logits, truth = assemble(results, "logits", case.length), expected["logits"]
    if case.padding_mask:
        # What padding computes counts nowhere.
        real = case.whole_batch()["attention_mask"].bool()
        logits, truth = logits[real], truth[real]
    torch.testing.assert_close(
        logits, truth, rtol=LOGITS_TOLERANCE, atol=LOGITS_TOLERANCE, msg=lambda m: f"{where}: {m}"
    )
    gradients = results[0]["gradients"]
    assert gradients.keys() == expected["gradients"].keys(), where
    for name, gradient in expected["gradients"].items():
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error <= GRADIENT_TOLERANCE, f"{where}, {name}: {error:.1e}"
    pipelined = any(row["operator"] in ("pipelined_attention", "pipelined_ulysses") for row in results[0]["traffic"])
    assert pipelined == bool(settings and settings.get("pipeline")), where


@every_pair(family=FAMILIES, strategy=STRATEGIES, mesh=MESHES)
def test_family_equals_stock(ranks, family, strategy, mesh):
    check(ranks, Case(family=family), strategy, *mesh)


@every_pair(variant=VARIANTS, strategy=STRATEGIES, mesh=((2, 1), (4, 1), (4, 2)))
def test_variant_equals_stock(ranks, variant, strategy, mesh):
    check(ranks, VARIANTS[variant], strategy, *mesh)


@every_pair(
    strategy=STRATEGIES, mode=("fused", "unfused"), transport=("symmetric", "collective"), mesh=((2, 1), (4, 2))
)
def test_modes_and_transports(ranks, strategy, mode, transport, mesh):
    check(ranks, Case(kv_heads=4), strategy, *mesh, {"mode": mode, "transport": transport})


def test_heads_of_tsp_need_not_divide(ranks):
    # Six query heads and three key/value heads on four ranks.
    case = Case(kv_heads=3, length=23, changes=(("num_attention_heads", 6),))
    for world_size, ring in ((4, 1), (4, 2)):
        check(ranks, case, "tsp", world_size, ring)


@every_pair(
    family=("llama", "mistral", "qwen3"),
    changes=({"length": 23}, {"packed": True}, {"padding_mask": True, "length": 22}),
    mesh=((2, 1), (4, 2)),
)
def test_eager_attention_under_tsp(ranks, family, changes, mesh):
    # It takes all keys at once, on meshes with a ring, too: padded lengths, windows, documents, masks.
    eager = Case(family=family, attention="eager", kv_heads=4)
    check(ranks, dataclasses.replace(eager, **changes), "tsp", *mesh)


def test_saved_gathers(ranks):
    for strategy in ("tp_sp", "odysseus"):
        for world_size, ring in ((2, 1), (4, 2)):
            check(ranks, Case(), strategy, world_size, ring, {"gathered": "save"})
