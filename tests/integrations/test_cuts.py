"""A batch that was cut in another way than the model computes it is an error; losses are the single process's."""

from __future__ import annotations

import itertools

import pytest
import torch
from covering import covering
from cut_cases import (
    CASE,
    WAYS,
    gradients_of,
    losses,
    padded_labels,
    refused_alike,
    refused_on_some,
    refused_together,
    stock_losses,
    token_mean,
)

from odysseus_kernels.strategies import STRATEGIES

# As in test_families.
LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-6

MESHES = [(2, 1), (4, 1), (4, 2)]


@pytest.fixture(scope="module")
def stock():
    return stock_losses()


def check_gradients(found, expected, where):
    assert found.keys() == expected.keys(), where
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error <= GRADIENT_TOLERANCE, f"{where}, {name}: {error:.1e}"


def ways_of(mesh, complete):
    """Of each strategy the ways to make a batch: by default, every two of mesh, strategy and way meet."""
    rows = itertools.product(MESHES, STRATEGIES, WAYS) if complete else covering((MESHES, tuple(STRATEGIES), WAYS))
    ways = {strategy: [] for strategy in STRATEGIES}
    for where, strategy, way in rows:
        if where == mesh:
            ways[strategy].append(way)
    return ways


@pytest.mark.parametrize(("world_size", "ring"), MESHES)
def test_losses_as_users_call_them(ranks, stock, request, world_size, ring):
    for strategy, ways in ways_of((world_size, ring), request.config.getoption("complete")).items():
        results = ranks(world_size).run(losses, ring, {strategy: ways})
        for way, step in results[0][strategy].items():
            where = f"{strategy}, {way}, {world_size} ranks, ring {ring}"
            if way == "logits":
                for result in results:
                    logits = result[strategy]["logits"]
                    assert logits.shape == stock["logits"].shape, where
                    torch.testing.assert_close(logits, stock["logits"], rtol=LOGITS_TOLERANCE, atol=LOGITS_TOLERANCE)
                continue
            expected = stock[way.partition(":")[0]]
            for result in results:
                assert result[strategy][way]["loss"] == pytest.approx(expected["loss"], rel=LOSS_TOLERANCE), where
            if step["gradients"]:
                check_gradients(step["gradients"], expected["gradients"], where)


@pytest.mark.parametrize(("world_size", "ring"), MESHES)
def test_what_is_wrong_on_every_rank(ranks, stock, world_size, ring):
    words = {
        "other strategy": "this batch was cut",
        "other mesh": "this batch was cut",
        "uncut": "shard_sequence",
        "no positions": "declare_cut",
        "popped labels": "label_smoothing_factor",
        "no descriptor": "sequence_cut: expected what shard_sequence returned",
        "mixed lengths": "cut alike",
        "some rows": "expected shape [1,",
        "negative divisor": "num_items: expected a number of tokens, got -1",
        "unequal divisors": "num_items: expected one number",
        "no divisor": "num_items: expected a number",
    }
    for found in ranks(world_size).run(refused_alike, ring, 20.0):
        for strategy, texts in found.items():
            kind, value = texts.pop("fine")
            assert kind == "no error", value
            assert float(value) == pytest.approx(stock["plain"]["loss"], rel=LOSS_TOLERANCE)
            if strategy == "tp" and ring == 1:
                # Every rank has all tokens: these are right, or as right as the stock model would have them.
                whole = [texts.pop("uncut"), texts.pop("no positions")]
                assert all(kind == "no error" for kind, _ in whole), whole
                assert float(whole[0][1]) == pytest.approx(stock["plain"]["loss"], rel=LOSS_TOLERANCE)
            if strategy == "tsp":
                # All ranks are one ring on every mesh: the part is the same.
                kind, value = texts.pop("other mesh")
                assert kind == "no error", value
                assert float(value) == pytest.approx(stock["plain"]["loss"], rel=LOSS_TOLERANCE)
            elif world_size == 2 or strategy == "tp":
                texts.pop("other mesh")
            for name, (kind, text) in texts.items():
                assert kind in ("ValueError", "TypeError"), f"{strategy}, {name}: {kind}: {text}"
                assert words[name] in text, f"{strategy}, {name}: {text}"


@pytest.mark.parametrize(("world_size", "ring"), MESHES)
def test_what_only_a_comparison_shows(ranks, stock, world_size, ring):
    results = ranks(world_size).run(refused_together, ring, list(STRATEGIES))
    for rank, found in enumerate(results):
        for strategy, texts in found.items():
            kind, value = texts.pop("fine")
            assert kind == "no error", value
            assert float(value) == pytest.approx(stock["plain"]["loss"], rel=LOSS_TOLERANCE)
            for name, (kind, text) in texts.items():
                where = f"rank {rank}, {strategy}, {name}: {kind}: {text}"
                # In backward, ranks of a tensor-parallel ring do not all meet in one call: the others are told.
                told = kind == "PeerLostError" and "gradient 2.0 of the loss" in text
                assert kind == "RankMismatchError" or (told and strategy == "tp" and ring > 1), where
                assert "batch" in text or "loss" in text, where
                if world_size == 4 and ring == 1:
                    assert "rank 3 differs" in text, where


def test_what_one_rank_finds_alone(ranks):
    first, second = ranks(2).run(refused_on_some, "odysseus")
    said = "position_ids that are not those of this part (0 to 22 in the first row)"
    assert second[0] == "ValueError" and said in second[1], second
    # The other rank is told at once, not when its time is up, and both go on together.
    assert first[0] == "PeerLostError" and "rank 1" in first[1], first


@pytest.mark.parametrize("strategy", ["tp", "odysseus"])
def test_token_mean_beside_data_parallelism(ranks, strategy):
    model = CASE.model()
    loss = model(**padded_labels()).loss
    loss.backward()
    expected, counts = gradients_of(model), [(row[1:] != -100).sum().item() for row in padded_labels()["labels"]]
    results = ranks(4).run(token_mean, strategy)
    assert {result["items"] for result in results} == {sum(counts) / 2}
    mean = (results[0]["loss"] + results[2]["loss"]) / 2
    assert mean == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    check_gradients(results[0]["gradients"], expected, strategy)
