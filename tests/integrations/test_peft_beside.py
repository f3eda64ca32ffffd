"""LoRA beside FSDP2, autocast and torch.compile equals one process; its gradients are added in one call."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

pytest.importorskip("peft", reason="PEFT is optional: pip install odysseus_kernels[peft]")

import torch
from family_cases import Case
from peft_beside_cases import (
    WRAPPERS,
    mixed_types,
    mixed_types_stock,
    of_replicas,
    on_two,
    partly,
    stock_replicas,
    sums,
)
from peft_cases import LONG, RANK, Adapted, stock_step

from odysseus_kernels.planner.adapters import lora_traffic
from odysseus_kernels.planner.formulas import LayerShape
from odysseus_kernels.strategies import STRATEGIES

# Rounding of fp32, as in the tests of families.
LOSS, GRADIENT = 2e-6, 1e-4
ADAPTED = Adapted(Case(kv_heads=4))
NARROW = Adapted(Case(kv_heads=4, autocast_to=torch.bfloat16))


def _errors(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == truth.keys()
    return {name: float((found[name] - one).norm() / one.norm()) for name, one in truth.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_replicas(ranks: Any, wrapper: str, strategy: str) -> None:
    losses, truth = stock_replicas(ADAPTED)
    for rank, (once, twice) in enumerate(ranks(4).run(of_replicas, ADAPTED, strategy, wrapper)):
        assert once[0] == twice[0] == pytest.approx(losses[rank // 2], rel=LOSS)
        assert max(_errors(once[1], truth).values()) <= GRADIENT
        assert max(_errors({name: one / 2 for name, one in twice[1].items()}, truth).values()) <= GRADIENT


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast(ranks: Any, strategy: str) -> None:
    """No further from fp32 than one process with autocast is, with the contract's 1.5; so is each gradient."""
    truth, stock = stock_step(ADAPTED), stock_step(NARROW)
    allowed = _errors(stock[1], truth[1])
    for loss, gradients in ranks(2).run(on_two, NARROW, strategy, False):
        assert abs(loss - truth[0]) <= 1.5 * abs(stock[0] - truth[0]) + 2**-9 * truth[0]
        found = _errors(gradients, truth[1])
        assert max(found[name] / allowed[name] for name in found) <= 1.5


def test_autocast_beside_fully_shard(ranks: Any) -> None:
    truth, stock = stock_replicas(ADAPTED), stock_replicas(NARROW)
    allowed = _errors(stock[1], truth[1])
    for (_, gradients), _ in ranks(4).run(of_replicas, NARROW, "odysseus", "fully_shard"):
        found = _errors(gradients, truth[1])
        assert max(found[name] / allowed[name] for name in found) <= 1.5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_layers(ranks: Any, strategy: str) -> None:
    one_layer = Adapted(
        dataclasses.replace(ADAPTED.case, changes=(("num_hidden_layers", 1),))
    )  # to compile half as long
    truth = stock_step(one_layer)
    for loss, gradients in ranks(2).run(on_two, one_layer, strategy, True):
        assert loss == pytest.approx(truth[0], rel=LOSS)
        assert max(_errors(gradients, truth[1]).values()) <= GRADIENT


@pytest.mark.parametrize(("world", "ring"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_sum_for_all_adapters(ranks: Any, strategy: str, world: int, ring: int) -> None:
    """As many calls as there are groups of ranks, for any number of layers, and the formula's bytes."""
    shape = LayerShape(hidden=96, intermediate=144, heads=12, kv_heads=4, head_dim=8)
    sent = lora_traffic(shape, strategy, world // ring, tokens=LONG.batch * LONG.length, rank=RANK, ring=ring)
    each = sent["backward", "replicated_parameter", "all_reduce"]
    groups = 2 if strategy == "tp" and ring > 1 else 1
    for found in ranks(world).run(sums, strategy, ring, Adapted(), {}):
        assert found == [(groups, each), (groups, 3 * each)]


@pytest.mark.parametrize("strategy", ["odysseus", "ulysses"])
def test_one_sum_with_pipelined_attention(ranks: Any, strategy: str) -> None:
    for found in ranks(2).run(sums, strategy, 1, Adapted(), {"pipeline": 2}):
        assert [calls for calls, _ in found] == [1, 1]


def test_one_sum_for_each_type(ranks: Any) -> None:
    truth = mixed_types_stock()
    for calls, (loss, gradients) in ranks(2).run(mixed_types):
        assert calls == 2
        assert loss == pytest.approx(truth[0], rel=LOSS)
        assert max(_errors(gradients, truth[1]).values()) <= GRADIENT


def test_gradients_that_are_accumulated_asked_for_or_left_out(ranks: Any) -> None:
    truth = stock_step(Adapted())[1]
    last = {name: one for name, one in truth.items() if "layers.1" in name}
    for found in ranks(2).run(partly):
        assert max(_errors(found["once"], truth).values()) <= GRADIENT
        assert all(torch.equal(one, 2 * found["once"][name]) for name, one in found["twice"].items())
        assert all(torch.equal(one, found["once"][name]) for name, one in found["asked"].items())
        assert found["some"].keys() == last.keys()
        assert max(_errors(found["some"], last).values()) <= GRADIENT
        assert not found["left behind"]


def test_the_narrow_case_is_narrow() -> None:
    assert dataclasses.replace(NARROW, case=ADAPTED.case) == ADAPTED
    assert max(_errors(stock_step(NARROW)[1], stock_step(ADAPTED)[1]).values()) > 1e-3
