"""Training on parts from a loader is training in one process; what ranks cannot share is found."""

from __future__ import annotations

from typing import Any

import pytest
from loader_cases import (
    another_dataset_on_the_last_rank,
    counted_by_routers,
    plain_packed,
    plain_padded,
    reserved_bytes,
    train,
    train_beside_data_parallelism,
)

# Products are added in another order; three steps of training make no more of it.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def packed() -> list[float]:
    return plain_packed()


@pytest.mark.parametrize("strategy", ["tp", "odysseus", "tsp"])
def test_packed_documents_train_as_each_alone(ranks: Any, packed: list[float], strategy: str) -> None:
    for losses in ranks(2).run(train, (2,), strategy, {"num_workers": 1}):
        assert losses == pytest.approx(packed, rel=TOLERANCE)


def test_packed_documents_across_a_ring(ranks: Any, packed: list[float]) -> None:
    for losses in ranks(4).run(train, (2, 2), "ulysses", {}):
        assert losses == pytest.approx(packed, rel=TOLERANCE)


def test_padded_documents_train_as_with_torchs_loader(ranks: Any) -> None:
    expected = plain_padded()
    arguments = {"packing": "none", "shuffle": False, "round_to": 5}
    for losses in ranks(2).run(train, (2,), "ulysses", arguments):
        assert losses == pytest.approx(expected, rel=TOLERANCE)


def test_beside_data_parallelism_and_accumulation(ranks: Any) -> None:
    results = ranks(4).run(train_beside_data_parallelism)
    assert results[0] == results[1] and results[2] == results[3]
    means = [(first + second) / 2 for first, second in zip(results[0], results[2], strict=True)]
    # Two global batches of two rows each are what one process has in a batch of four.
    assert means == pytest.approx(plain_packed(), rel=TOLERANCE)


def test_a_dataset_that_differs_is_found_in_the_first_step(ranks: Any) -> None:
    for kind, text, after in ranks(4).run(another_dataset_on_the_last_rank):
        assert kind == "RankMismatchError" and "rank 3 differs" in text and "batch" in text, text
        assert after == "no error"


def test_rounded_lengths_need_no_more_memory_after_the_first_epoch(ranks: Any) -> None:
    """Windows of shared memory grow with the longest of what each of them carries, and calls take turns in them."""
    rounded, exact = (ranks(2).run(reserved_bytes, round_to, 3)[0] for round_to in (64, 1))
    after = {step for steps in rounded[1:] for step in steps}
    assert after == {rounded[0][-1]}, rounded
    assert len({nbytes for steps in exact for nbytes, _ in steps}) > 2, "else this test shows nothing"


def test_padding_behind_packed_documents_counts_for_no_router(ranks: Any) -> None:
    for parallel, alone in ranks(2).run(counted_by_routers):
        assert parallel == pytest.approx(alone, rel=1e-5)
