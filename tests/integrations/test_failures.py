"""An error on one rank of a parallelized model is an error on all, at once, and the next right step is right."""

from __future__ import annotations

from pathlib import Path

import failure_cases as cases
import pytest
from llama_cases import stock_step

from odysseus_kernels.testing.spawn import RankPool, RankPools

MESHES = {
    "S2": {"seq": 2},
    "S4": {"seq": 4},
    "R2S2": {"ring": 2, "seq": 2},
}
TEXTS = {
    "id": "IndexError: index out of range",
    "label": "expected targets from 0 to 119",
    "hook": "ZeroDivisionError: of a hook",
    "backward": "ZeroDivisionError: of a hook",
    "scaled": "its backward pass ended with an error",
    "user": "ZeroDivisionError: of the user",
    "interrupt": "KeyboardInterrupt: stopped by hand",
}
# Below the ranks' ``timeout_s`` of 60 by far; on idle cores it takes a tenth of a second, on busy ones several.
AT_ONCE_S = 20


@pytest.fixture(scope="module")
def loss() -> float:
    """The stock model's."""
    return float(stock_step(cases.CASE)["loss"])


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
@pytest.mark.parametrize(("mesh", "strategy"), (("S2", "tp"), ("S4", "odysseus"), ("R2S2", "ulysses")))
def test_every_rank_learns_at_once(ranks: RankPools, loss: float, mesh: str, strategy: str, transport: str) -> None:
    sizes = MESHES[mesh]
    world = 2 if mesh == "S2" else 4
    results = ranks(world).run(cases.failing_steps, strategy, transport, sizes, 1)
    for rank, faults in enumerate(results):
        for fault, (error, message, seconds, next_loss) in faults.items():
            assert next_loss == pytest.approx(loss, rel=1e-6), (rank, fault)
            assert seconds < AT_ONCE_S, (rank, fault, error, message)
            if rank == 1:
                assert error not in ("", "PeerLostError", "SignalTimeoutError"), (fault, error, message)
            elif error == "RankMismatchError":
                # What ranks compare has told them: a loss that one of them scales; labels under tp, where all have all.
                told = {"scaled": "gradient 0.5 of the loss", "label": "batch"}
                assert told[fault] in message, (rank, fault, message)
            else:
                assert error == "PeerLostError", (rank, fault, error, message)
                assert "rank 1 left the step: " in message and TEXTS[fault] in message, message


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_ranks_that_are_a_batch_apart_have_to_begin_again(loss: float, transport: str) -> None:
    with RankPool(2, timeout=90) as pool:
        for errors, after in pool.run(cases.late_failure, transport, {"seq": 2}, 1):
            for _, message, seconds in errors:
                assert "make it again" in message and "step" in message, message
                assert seconds < AT_ONCE_S
            assert after == pytest.approx(loss, rel=1e-6)


def test_a_rank_that_catches_its_error_and_goes_on(loss: float) -> None:
    with RankPool(4, timeout=90) as pool:
        for first, second, after in pool.run(cases.goes_on, "ulysses", "symmetric", MESHES["R2S2"], 1):
            # Whichever is found first: that a step was left, or that calls of different steps met.
            left, met = "rank 1 has begun step 3 and left step 2", "rank 1 differs in call number"
            assert left in first[1] or met in first[1], first
            assert "make it again" in second[1] or "were in steps" in second[1], second
            assert first[2] < AT_ONCE_S and second[2] < AT_ONCE_S
            assert after == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(("strategy", "mesh"), (("tp", "S2"), ("odysseus", "R2S2")))
def test_a_rank_that_computes_in_another_way(ranks: RankPools, loss: float, strategy: str, mesh: str) -> None:
    results = ranks(2 if mesh == "S2" else 4).run(cases.odd_ways, strategy, MESHES[mesh], 1)
    for faults in results:
        for way, (error, message, seconds, next_loss) in faults.items():
            assert error in ("RankMismatchError", "PeerLostError"), (way, error, message)
            assert seconds < AT_ONCE_S, (way, seconds)
            assert next_loss == pytest.approx(loss, rel=1e-6), way
    for way, told in cases.ODD_WAYS.items():
        assert any(told in faults[way][1] for faults in results), [faults[way] for faults in results]


def test_meshes_in_another_order_than_their_groups_are_refused(ranks: RankPools, loss: float) -> None:
    for errors, right in ranks(4).run(cases.odd_meshes):
        for error, message in errors:
            assert error == "ValueError" and "ranks that increase" in message, (error, message)
        assert right == pytest.approx(loss, rel=1e-6)


def test_two_models_are_saved_at_the_same_time(ranks: RankPools, tmp_path: Path) -> None:
    losses = [cases.CASE.model(seed=which)(**cases.CASE.whole_batch()).loss.item() for which in (0, 1)]
    for rank, found in enumerate(ranks(4).run(cases.two_models, str(tmp_path))):
        assert found == pytest.approx([losses[rank % 2]] * 3, rel=1e-6)


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_a_save_that_not_all_ranks_make(ranks: RankPools, loss: float, tmp_path: Path, transport: str) -> None:
    for errors, left, after in ranks(2).run(cases.lonely_saves, transport, str(tmp_path)):
        for (error, message, seconds), what in zip(
            errors, 2 * ["save_checkpoint"] + 2 * ["save_pretrained"], strict=True
        ):
            assert error == "RankMismatchError" and what in message, (error, message)
            assert seconds < AT_ONCE_S
        assert left == ["right"]
        assert after == pytest.approx(loss, rel=1e-6)


def test_optimizers_from_before_are_refused(ranks: RankPools) -> None:
    for errors in ranks(2).run(cases.early_optimizer):
        assert len(errors) == 6
        for error, message in errors:
            assert error == "ValueError" and "make it after parallelize" in message, (error, message)


@pytest.mark.parametrize(
    ("transport", "bad", "fault", "wrapper"),
    (
        ("symmetric", 0, "id", ""),
        ("collective", 2, "backward", "fully_shard"),
        ("symmetric", 1, "id", "replicate"),
    ),
)
def test_other_replicas_learn_as_well(loss: float, transport: str, bad: int, fault: str, wrapper: str) -> None:
    with RankPool(4, timeout=90) as pool:
        results = pool.run(cases.data_parallel, transport, wrapper, bad, fault)
    for rank, (_, message, seconds, later, after) in enumerate(results):
        assert rank == bad or f"rank {bad} left the step: {TEXTS[fault]}" in message, (rank, message)
        assert seconds < AT_ONCE_S and later[2] < AT_ONCE_S
        assert "make it again" in later[1], (rank, later)
        assert after == pytest.approx(loss, rel=1e-6)
