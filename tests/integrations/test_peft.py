"""PEFT's LoRA adapters in parallelized models: equal to one process, or refused by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("peft", reason="PEFT is optional: pip install odysseus_kernels[peft]")

import torch
from peft import PeftModel
from peft_cases import (
    CASE,
    CASES,
    LONG,
    MISUSED,
    OTHERWISE,
    RANK,
    UNSERVED,
    Adapted,
    address_taken_again,
    changes,
    drops,
    recomputed,
    refused,
    saved_and_resumed,
    step,
    steps,
    stock_changes,
    stock_step,
    traffic_of_a_layer,
)
from peft_uses_cases import BEGINNINGS, adapted, an_adapter_for_each_row, begun_after, begun_before

from odysseus_kernels.planner.adapters import lora_traffic
from odysseus_kernels.planner.formulas import LayerShape
from odysseus_kernels.strategies import STRATEGIES

# Rounding of fp32, as in the tests of families: losses of about 5 and gradients of any size.
LOSS, GRADIENT = 2e-6, 1e-4


def check(name, found, truth):
    """``found`` (loss, gradients) against those of one process."""
    assert abs(found[0] - truth[0]) <= LOSS * truth[0], f"{name}: {found[0]} {truth[0]}"
    assert found[1].keys() == truth[1].keys(), name
    for parameter, gradient in truth[1].items():
        error = (found[1][parameter] - gradient).norm() / gradient.norm()
        assert error <= GRADIENT, f"{name}, {parameter}: {error:.1e}"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_equal_one_process(ranks, strategy):
    for results in ranks(2).run(steps, strategy, 1, list(CASES), {}):
        assert {name.rpartition(", ")[0] for name in results} == set(CASES)
        for name, found in results.items():
            check(name, found, stock_step(CASES[name.rpartition(", ")[0]]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_ring_of_two_by_two_equals_one_process(ranks, strategy):
    for results in ranks(4).run(steps, strategy, 2, ["one head of keys"], {}):
        for name, found in results.items():
            check(name, found, stock_step(CASES["one head of keys"]))


@pytest.mark.parametrize("strategy", ["odysseus", "tp_sp", "ulysses"])
def test_pipelined_attention_has_adapters_in_its_weights(ranks, strategy):
    names = ["llama", "biases, plain network", "two adapters"]
    for results in ranks(2).run(steps, strategy, 1, names, {"pipeline": 2}):
        for name, found in results.items():
            check(name, found, stock_step(CASES[name.rpartition(", ")[0]]))


@pytest.mark.parametrize("strategy", ["odysseus", "ulysses"])
def test_layers_that_are_computed_again(ranks, strategy):
    for results in ranks(2).run(recomputed, strategy):
        for found in results:
            check("recomputed", found, stock_step(Adapted()))


@pytest.mark.parametrize(("world", "ring"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_weights_send_nothing_for_their_gradients(ranks, strategy, world, ring):
    shape = LayerShape(hidden=96, intermediate=144, heads=12, kv_heads=4, head_dim=8)
    expected = lora_traffic(shape, strategy, world // ring, tokens=LONG.batch * LONG.length, rank=RANK, ring=ring)
    for counts, ahead in ranks(world).run(traffic_of_a_layer, strategy, ring):
        assert counts == expected
        assert ahead["dropped"] == 0, "a weight was sent ahead of an adapter's call"
        for _, operator, collective in counts:
            assert (operator, collective) != ("zero3_linear", "reduce_scatter")
            assert not (operator in ("linear_all_to_all", "all_to_all_linear") and collective == "reduce_scatter")


@pytest.mark.parametrize("strategy", ["odysseus", "tp"])
def test_switching_scaling_and_merging_count_as_in_stock(ranks, strategy):
    truth = stock_changes()
    for found in ranks(2).run(changes, strategy):
        assert found.keys() == truth.keys()
        for name, (loss, gradients) in truth.items():
            check(name, found[name], (loss, gradients))


def test_saving_loading_and_resuming(ranks, tmp_path):
    results = ranks(2).run(saved_and_resumed, str(tmp_path))
    model = PeftModel.from_pretrained(CASE.model(), tmp_path / "adapter").train()
    loss = model(**CASE.whole_batch(), use_cache=False).loss.item()
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for result in results:
        assert result["losses"][1] < result["losses"][0]
        assert result["resumed"] == result["on"]
        assert result["bit-equal"], "resumed training must give the same bits"
        assert all(result["loaded"].values())
        assert abs(loss - result["on"][0]) <= LOSS * loss, "stock PEFT loads what was trained"
        assert abs(loss - result["loss_loaded"]) <= LOSS * loss
        assert "expected a PEFT directory with adapter_model.safetensors" in result["said"]
        for name, tensor in result["state"].items():
            assert torch.equal(tensor, results[0]["state"][name]), "all ranks train the same adapters"


def test_what_is_not_served_is_refused_by_name(ranks):
    for said in ranks(2).run(refused):
        for name, (_, text) in UNSERVED.items():
            for when in ("before", "after"):
                found = said.get(f"{name}, {when}", "")
                assert OTHERWISE.get(f"{name}, {when}", text) in found, f"{name}, {when}: {found}"
        for name, (_, text) in MISUSED.items():
            assert text in said.get(name, ""), f"{name}: {said.get(name)}"
        assert "expected LoRA adapters, got PROMPT_TUNING as adapter 'default'" in said["prompts, before"]
        assert "prompts, after" in said
        assert "lora_dropout: expected 0 where ranks compute the same tokens" in said["dropout"]
        truth = stock_step(Adapted())[0]
        assert abs(float(said["dropout at evaluation"]) - truth) <= LOSS * truth
        assert "expected a PEFT model, whose adapters are saved" in said["saving"]


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("strategy", ["odysseus", "tp"])
def test_adapters_that_begin_with_parts_of_the_weights(ranks, strategy, beginning):
    """As in one process where they are put on before; afterwards an error that says so."""
    truth = step(adapted(CASE.model(), beginning), CASE.whole_batch())
    for found in ranks(2).run(begun_before, strategy, beginning):
        check(beginning, found, truth)
    for said in ranks(2).run(begun_after, strategy, beginning):
        assert said.count(f"already, got {beginning}: put the adapters on the stock model") == 2, said


def test_an_adapter_for_each_row_is_refused(ranks):
    truth = stock_step(Adapted())[0]
    for said, loss in ranks(2).run(an_adapter_for_each_row):
        assert "adapter_names: expected none, got one for each row" in said
        assert abs(loss - truth) <= LOSS * truth


def test_dropout_draws_in_training_alone(ranks):
    truth = stock_step(Adapted())[0]
    for losses, evaluated in ranks(2).run(drops, "odysseus"):
        assert losses[0] != losses[1]
        assert all(abs(loss - truth) < 0.2 * truth for loss in losses), "dropout keeps expectations"
        assert abs(evaluated - truth) <= LOSS * truth


def test_an_address_that_is_taken_again_is_no_known_parameter(ranks):
    (first, mine), (second, other) = ranks(2).run(address_taken_again)
    assert not first
    if not second:
        pytest.skip("no parameter was given the address of the one that went")
    assert mine == other == 0.0


def test_the_cases_adapters_have_an_effect():
    plain = CASE.model()(**CASE.whole_batch(), use_cache=False).loss.item()
    assert abs(step(Adapted().stock(), CASE.whole_batch())[0] - plain) > 1e-3


@pytest.mark.without_ranks
def test_the_package_does_not_import_peft():
    code = "import sys, odysseus_kernels as ody; ody.parallelize; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
