"""Parallelized models behave like models: outputs, hooks, two forwards in flight, accumulation, traffic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from llama_cases import Case, printed_loss, sequence_mesh, stock_step

from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.integrations.huggingface import parallelize
from odysseus_kernels.nn.sequence import shard_sequence

CASE = Case(kv_heads=4)


def _relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()


def hidden_states(rank: int, world_size: int) -> list[torch.Tensor]:
    mesh = sequence_mesh(world_size)
    model = parallelize(CASE.model(), mesh)
    assert type(model).__name__ == "LlamaForCausalLM"
    out = model(**shard_sequence(CASE.whole_batch(), mesh), output_hidden_states=True)
    assert out.past_key_values is None
    return list(out.hidden_states)


def test_hidden_states_are_recorded(ranks):
    expected = CASE.model()(**CASE.whole_batch(), output_hidden_states=True).hidden_states
    results = ranks(2).run(hidden_states)
    assert len(results[0]) == len(expected) == 3
    for parts, truth in zip(zip(*results, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), truth, rtol=1e-5, atol=1e-5)


def two_forwards_in_flight(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Different lengths and masks, recomputed in backward: state kept on the model would mix them up."""
    mesh = sequence_mesh(world_size)
    cases = [Case(checkpointing=True), Case(checkpointing=True, length=16, padding_mask=True)]
    model = parallelize(cases[0].model(), mesh)
    first, second = (model(**shard_sequence(case.whole_batch(), mesh)).loss for case in cases)
    (first + second).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def test_two_forwards_in_flight(ranks):
    parts = [stock_step(Case())["gradients"], stock_step(Case(length=16, padding_mask=True))["gradients"]]
    for name, gradient in ranks(2).run(two_forwards_in_flight)[0].items():
        assert _relative(gradient, parts[0][name] + parts[1][name]) < 1e-5, name


def accumulated(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Two micro-batches with the number of tokens of both, as a trainer accumulates."""
    mesh = sequence_mesh(world_size)
    model = parallelize(CASE.model(), mesh)
    batch = CASE.whole_batch()
    items = (batch["labels"][:, 1:] != -100).sum()
    for row in range(CASE.batch):
        part = {name: value[row : row + 1] for name, value in batch.items()}
        model(**shard_sequence(part, mesh), num_items_in_batch=items).loss.backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def test_gradient_accumulation(ranks):
    expected = stock_step(CASE)["gradients"]
    for name, gradient in ranks(2).run(accumulated)[0].items():
        assert _relative(gradient, expected[name]) < 1e-5, name


def logits_in_evaluation(rank: int, world_size: int, attention: str) -> torch.Tensor:
    mesh = sequence_mesh(world_size)
    model = parallelize(Case().model().eval(), mesh)
    model.set_attn_implementation(attention)
    batch = shard_sequence({"input_ids": CASE.whole_batch()["input_ids"]}, mesh)
    with torch.no_grad():
        # Without position_ids, which count over all ranks.
        return model(input_ids=batch["input_ids"], sequence_cut=batch["sequence_cut"]).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_in_evaluation(ranks, attention):
    expected = Case().model().eval()(CASE.whole_batch()["input_ids"]).logits
    logits = torch.cat(ranks(3).run(logits_in_evaluation, attention), dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def copied(rank: int, world_size: int) -> bool:
    mesh = sequence_mesh(world_size)
    model = parallelize(CASE.model(), mesh)
    batch = shard_sequence(CASE.whole_batch(), mesh)
    twin = copy.deepcopy(model)
    before = model(**batch).loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return torch.equal(twin(**batch).loss, before)


def test_models_can_be_copied(ranks):
    assert ranks(2).run(copied) == [True, True]


def half_precision(rank: int, world_size: int, dtype_name: str) -> dict[str, torch.Tensor]:
    mesh = sequence_mesh(world_size)
    model = parallelize(CASE.model().to(getattr(torch, dtype_name)), mesh)
    model(**shard_sequence(CASE.whole_batch(), mesh)).loss.backward()
    return {name: p.grad.full_tensor().float() for name, p in model.named_parameters()}


def test_bf16_is_no_further_from_the_truth_than_stock(ranks):
    truth = stock_step(CASE)["gradients"]
    stock = CASE.model().to(torch.bfloat16)
    stock(**CASE.whole_batch()).loss.backward()
    result = ranks(2).run(half_precision, "bfloat16")[0]
    for name, parameter in stock.named_parameters():
        ours, theirs = _relative(result[name], truth[name]), _relative(parameter.grad.float(), truth[name])
        assert ours <= 1.5 * theirs + 1e-3, f"{name}: {ours:.1e}, stock {theirs:.1e}"


def traffic(rank: int, world_size: int, gathered: str) -> dict[str, Any]:
    case = Case(kv_heads=4, vocabulary=97)  # a head that is not cut, so that ZeRO-3 is the feed-forward network only
    mesh = sequence_mesh(world_size)
    model = parallelize(case.model(), mesh, config=OverlapConfig(gathered=gathered, timeout_s=60))
    batch = shard_sequence(case.whole_batch(), mesh)
    with CommRecorder() as record:
        model(**batch).loss.backward()
    operators = ("all_gather_linear", "linear_reduce_scatter", "zero3_linear", "replicated_parameter")
    return {
        f"{operator} {phase}": record.bytes(operator=operator, phase=phase)
        for operator in operators
        for phase in ("forward", "backward")
    }


@pytest.mark.parametrize(("world_size", "gathered"), [(2, "regather"), (2, "save"), (4, "regather")])
def test_traffic_equals_the_formulas(ranks, world_size, gathered):
    layers, d, i, m, element = 2, 96, 144, 3, 4
    activations = layers * element * CASE.length * CASE.batch * d  # L * d of every layer
    weights = layers * element * m * d * i  # Pf of every layer
    replicated = element * (2 * 97 * d + (2 * layers + 1) * d)  # embedding, head and norms
    expected = {
        "all_gather_linear forward": activations,
        "all_gather_linear backward": activations * (2 if gathered == "regather" else 1),
        "linear_reduce_scatter forward": activations,
        "linear_reduce_scatter backward": activations,
        "zero3_linear forward": weights,
        "zero3_linear backward": 2 * weights,
        "replicated_parameter forward": 0,
        "replicated_parameter backward": 2 * replicated,  # an all-reduce sends everything twice
    }
    for result in ranks(world_size).run(traffic, gathered):
        # Messages are cut into equal parts, so small tensors may be padded by up to one element for each rank.
        for name, elements in expected.items():
            assert result[name] == pytest.approx(elements * (world_size - 1) / world_size, rel=1e-3), name


def test_a_loss_prints_as_any_number(ranks):
    for short, plain, number in ranks(2).run(printed_loss, Case()):
        assert short == f"{number:.3f}"
        assert float(plain) == number
