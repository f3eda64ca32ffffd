"""A model that changes its strategy is, to the bit, one that has had it from the start."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import Case
from switching_cases import (
    an_optimizer_that_was_left_out,
    beside_data_parallelism,
    checkpointed_and_copied,
    compiled_and_saved,
    moves_to_the_bit,
    refusals,
    sizes_that_do_not_divide,
)

# Every strategy into every other one.
EVERY_CHANGE = [
    "odysseus", "ulysses", "tp_sp", "tp", "odysseus", "tp_sp", "ulysses", "tsp", "odysseus", "tp", "tsp", "tp_sp",
    "odysseus", "tsp", "ulysses", "tp", "tp_sp", "tsp", "tp", "ulysses", "odysseus",
]  # fmt: skip
SOME_CHANGES = ["odysseus", "ulysses", "tsp", "tp", "odysseus"]
FIRST, LAST = SOME_CHANGES[:3], SOME_CHANGES[2:]


@pytest.mark.slow
def test_every_strategy_after_every_other(ranks: Any) -> None:
    assert len({*itertools.pairwise(EVERY_CHANGE)}) == 20
    for moved in ranks(2).run(moves_to_the_bit, Case(kv_heads=4), 1, "AdamW", EVERY_CHANGE):
        unmoved = {change for change, received in moved.items() if received == 0}
        assert unmoved == {"odysseus to ulysses", "ulysses to odysseus", "tp to tp_sp", "tp_sp to tp"}
        # The other half of each layer's output projection, as parameter and two moments, in fp32.
        assert moved["ulysses to tsp"] == 2 * 3 * (96 * 96 // 2) * 4


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        # Each change with half of the models; what a change moves is parameters by role, which all models have.
        pytest.param(
            case, changes, id=f"{case.family}-{'-'.join(changes)}", marks=() if default else pytest.mark.complete
        )
        for case, usual in (
            (Case(kv_heads=4, tied=True), FIRST),
            (Case(family="starcoder2", kv_heads=2), LAST),
            (Case(family="qwen3", vocabulary=121), FIRST),
            (Case(family="mixtral", kv_heads=1), LAST),
        )
        for changes in (FIRST, LAST)
        for default in (changes is usual,)
    ],
)
@pytest.mark.filterwarnings("ignore:the ranks do not divide a vocabulary")
def test_other_models(ranks: Any, case: Case, changes: list[str]) -> None:
    ranks(2).run(moves_to_the_bit, case, 1, "AdamW", changes)


def test_across_a_ring(ranks: Any) -> None:
    for moved in ranks(4).run(moves_to_the_bit, Case(kv_heads=4), 2, "AdamW", SOME_CHANGES):
        assert all(received > 0 for received in moved.values()), moved


def test_master_weights(ranks: Any) -> None:
    case = Case(kv_heads=4, dtype=torch.bfloat16)
    for moved in ranks(2).run(moves_to_the_bit, case, 1, "MasterWeights", SOME_CHANGES):
        # A parameter of two bytes; its master and two moments of four.
        assert moved["ulysses to tsp"] == 2 * (96 * 96 // 2) * (2 + 3 * 4)


def test_copies_checkpoints_and_frozen_parameters(ranks: Any) -> None:
    ranks(2).run(checkpointed_and_copied)


def test_refusals(ranks: Any) -> None:
    ranks(2).run(refusals)


def test_an_optimizer_that_was_left_out(ranks: Any) -> None:
    for losses, expected, received in ranks(2).run(an_optimizer_that_was_left_out):
        assert losses == expected
        assert received == 2 * 2 * (96 * 96 // 2) * 4, "two moments of each layer's output projection"


def test_beside_data_parallelism(ranks: Any) -> None:
    for text in itertools.chain(*ranks(4).run(beside_data_parallelism)):
        assert "got one of data parallelism around the model: save_checkpoint, parallelize anew" in text


def test_sizes_that_do_not_divide(ranks: Any) -> None:
    for text in ranks(4).run(sizes_that_do_not_divide):
        assert "LlamaForCausalLM, strategy 'ulysses': expected attention heads that 4 ranks divide, got 6" in text


def test_compiled_layers_and_checkpoints(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(compiled_and_saved, str(tmp_path / "step"))
