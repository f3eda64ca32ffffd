"""Training a parallelized model is training the stock model; its state travels between numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from llama_cases import Case, sequence_mesh
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from transformers import LlamaForCausalLM

from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.integrations.huggingface import parallelize
from odysseus_kernels.nn.sequence import shard_sequence

STEPS = 50
CASE = Case(kv_heads=4, length=47)
FULL = StateDictOptions(full_state_dict=True)


def _optimizer(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    # The fused-over-tensors implementation is the default on GPUs; on CPUs it has to be asked for.
    return torch.optim.AdamW(model.parameters(), lr=5e-4, foreach=True)


def _train(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, mesh: Any, steps: range
) -> list[tuple[float, float]]:
    """Losses and norms of the gradients before clipping."""
    history = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(CASE.vocabulary, (CASE.batch, 1), generator=generator)
        ids = (start + 7 * torch.arange(CASE.length)) % CASE.vocabulary  # a rule that can be learned
        batch = {"input_ids": ids, "labels": ids}
        loss = model(**(batch if mesh is None else shard_sequence(batch, mesh))).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        norm = norm if mesh is None else norm.full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
    return history


def _parallel(world_size: int) -> tuple[LlamaForCausalLM, Any]:
    mesh = sequence_mesh(world_size)
    return parallelize(CASE.model(), mesh, config=OverlapConfig(timeout_s=60)), mesh


def train(rank: int, world_size: int, steps: int) -> dict[str, Any]:
    model, mesh = _parallel(world_size)
    optimizer = _optimizer(model)
    history = _train(model, optimizer, mesh, range(steps))
    weights = get_model_state_dict(model, options=FULL)
    return {"history": history, "weights": weights if rank == 0 else None}


def save(rank: int, world_size: int, folder: str, steps: int) -> list[tuple[float, float]]:
    model, mesh = _parallel(world_size)
    optimizer = _optimizer(model)
    history = _train(model, optimizer, mesh, range(steps))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    return history


def resume(rank: int, world_size: int, folder: str, start: int, stop: int) -> list[tuple[float, float]]:
    model, mesh = _parallel(world_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # what is not loaded must show
    optimizer = _optimizer(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return _train(model, optimizer, mesh, range(start, stop))


@pytest.fixture(scope="module")
def stock():
    model = CASE.model()
    history = _train(model, _optimizer(model), None, range(STEPS))
    assert history[-1][0] < 0.8 * history[0][0], "this run must learn, or equal losses say little"
    return {"history": history, "weights": model.state_dict()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_equal_single_process(ranks, stock, world_size):
    results = ranks(world_size).run(train, STEPS)
    assert all(result["history"] == results[0]["history"] for result in results), "ranks must agree to the bit"
    for (loss, norm), (true_loss, true_norm) in zip(results[0]["history"], stock["history"], strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-4)  # the contract's figure for 50 steps in single precision
        assert norm == pytest.approx(true_norm, rel=1e-3)  # gradients react more strongly than losses
    # Whole state dicts go back into a stock model under the same names.
    assert results[0]["weights"].keys() == stock["weights"].keys()
    for name, weight in results[0]["weights"].items():
        error = (weight - stock["weights"][name]).norm() / stock["weights"][name].norm()
        assert error < 1e-3, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("saved_on", "resumed_on"), [(2, 2), (2, 1), (1, 2), (2, 4)])
def test_checkpoint_resumes(ranks, stock, tmp_path: Path, saved_on: int, resumed_on: int):
    folder = str(tmp_path / "checkpoint")
    before = ranks(saved_on).run(save, folder, 4)[0]
    after = ranks(resumed_on).run(resume, folder, 4, 8)[0]
    if saved_on == resumed_on:
        uninterrupted = ranks(saved_on).run(train, 8)[0]["history"]
        assert before + after == uninterrupted, "the same ranks must go on as if nothing had happened, to the bit"
    for (loss, _), (true_loss, _) in zip(before + after, stock["history"][:8], strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-4)


def weights_round_trip(rank: int, world_size: int, kv_heads: int, tied: bool) -> dict[str, Any]:
    case = Case(kv_heads=kv_heads, tied=tied, bias=True)
    stock = case.model()
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    keys = list(before)
    model = parallelize(stock, sequence_mesh(world_size))
    shards = sum(p.to_local().numel() for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    after = get_model_state_dict(model, options=FULL)
    same = all(torch.equal(after[name], before[name]) for name in keys)
    # And in again: other weights, whole on every rank.
    other = case.model(seed=1).state_dict()
    set_model_state_dict(model, dict(other), options=FULL)  # which puts its own tensors into the dict
    loaded = get_model_state_dict(model, options=FULL)
    return {
        "keys": list(model.state_dict()) == keys,
        "same": same,
        "loaded": all(torch.equal(loaded[name], other[name]) for name in keys),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "share": shards / total,
        "count": total == sum(value.numel() for value in dict(case.model().named_parameters()).values()),
    }


@pytest.mark.parametrize(("world_size", "kv_heads", "tied"), [(2, 12, False), (4, 2, False), (3, 12, True)])
def test_weights_are_kept_to_the_bit(ranks, world_size, kv_heads, tied):
    for result in ranks(world_size).run(weights_round_trip, kv_heads, tied):
        assert result["keys"]
        assert result["same"]
        assert result["loaded"]
        assert result["count"]
        assert result["tied"] == tied
        assert result["share"] < 1, "sharded parameters must not be whole on every rank"
