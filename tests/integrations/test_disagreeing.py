"""One rank that disagrees about its model, or about the step before: all ranks are told what it is, none waits."""

from __future__ import annotations

import pytest
from disagreeing_cases import (
    BUILT,
    CALLED,
    CASE,
    CHANGED,
    SET,
    STEPS,
    changed,
    harmless,
    parallelized,
    refused,
    trained,
)
from family_cases import stock_step

from odysseus_kernels.strategies import STRATEGIES

# Of ranks that wait for one that raises, or does something else: far below their time limit of 60 s.
SECONDS = 20.0


def check(results, expected):
    """Each rank was told the text that is expected, soon."""
    for rank, said in enumerate(results):
        assert said.keys() == expected.keys()
        for name, text in expected.items():
            kind, found, seconds = said[name]
            assert kind in ("RankMismatchError", "PeerLostError", "ValueError"), f"{name}, rank {rank}: {said[name]}"
            assert text in found, f"{name}, rank {rank}: {said[name]}"
            assert seconds < SECONDS, f"{name}, rank {rank}: {said[name]}"


@pytest.mark.parametrize("bad", [0, 1])
def test_settings_of_a_model_are_compared_when_it_is_parallelized(ranks, bad):
    expected = {name: text for name, (*_, text) in (BUILT | SET | CALLED).items()}
    check(ranks(2).run(parallelized, bad), expected)


def test_what_was_changed_since_is_compared_at_the_next_forward(ranks):
    expected = {name: text for name, (*_, text) in CHANGED.items()}
    expected |= {"adapters' scaling": "default scaling 3", "adapters' dropout": "default scaling 2 dropout 0.1"}
    check(ranks(2).run(changed, 1), expected)


@pytest.mark.parametrize("foreach", [False, True])
def test_steps_that_ended_otherwise_are_told_at_the_next_forward(ranks, foreach, tmp_path):
    said = (*["weights changed before 3 forwards"] * 2, "gradients there before", "embeddings without gradients")
    check(ranks(2).run(trained, 1, foreach, str(tmp_path / "saved")), dict(zip(STEPS, said, strict=True)))


def test_a_rank_whose_batch_was_refused_has_counted_what_its_peers_have(ranks):
    assert ranks(2).run(refused, 1) == [("PeerLostError", ""), ("ValueError", "")]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_decides_no_number_may_differ(ranks, strategy):
    truth = stock_step(CASE)
    for rank, (loss, gradients) in enumerate(ranks(2).run(harmless, strategy)):
        assert abs(loss - truth["loss"]) <= 2e-6 * truth["loss"]
        assert rank or gradients.keys() == truth["gradients"].keys()
        for name, gradient in gradients.items():
            expected = 2 * truth["gradients"][name]  # of two backward passes
            error = (gradient - expected).norm() / expected.norm()
            assert error <= 1e-4, f"{name}: {error:.1e}"  # as in test_changed_models
