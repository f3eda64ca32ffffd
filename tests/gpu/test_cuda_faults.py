"""Ranks on GPUs that do not come, die, or call something else: an error that names them on every other rank."""

from __future__ import annotations

import cuda_cases as cases
import pytest
from cuda_cases import ENVIRONMENT

from odysseus_kernels.testing.spawn import RankPool

pytestmark = pytest.mark.gpu

OPERATORS = ("all_gather_linear", "linear_reduce_scatter")


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_rank_that_never_calls(operator: str) -> None:
    absent, timeout_s = 1, 2.0
    with RankPool(3, timeout=60, environment=ENVIRONMENT) as pool:
        results = pool.run(cases.absent_rank, operator, absent, timeout_s)
    for rank, result in enumerate(results):
        if rank == absent:
            assert result is None
            continue
        error, message, seconds = result
        # The first rank whose wait ends tells the others, whose own waits then end too.
        assert error in ("SignalTimeoutError", "PeerLostError"), message
        assert f"{operator} (forward): rank {rank} waited for" in message
        assert f"rank {absent}" in message
        assert "chunk" in message
        assert timeout_s - 0.5 < seconds < timeout_s + 4
    assert "SignalTimeoutError" in {result[0] for result in results if result}


def test_a_rank_whose_process_is_killed() -> None:
    victim, operator = 1, "linear_reduce_scatter"
    with RankPool(2, timeout=60, environment=ENVIRONMENT) as pool:
        outcomes = pool.outcomes(cases.killed_rank, operator, victim, grace=20)
    assert outcomes[victim].exit_code == -9
    assert outcomes[0].ok, outcomes[0].describe()
    error, message, seconds = outcomes[0].result
    assert error == "PeerLostError"
    assert f"{operator} (forward): rank 0 waited for rank {victim}" in message
    assert f"the process of rank {victim} is gone" in message
    assert "chunk" in message
    assert seconds < 0.5 + 2.0 + 1.0  # it dies after half a second, two are allowed, and drivers are slow to let go


def test_a_rank_that_calls_something_else() -> None:
    odd = 2
    with RankPool(3, timeout=60, environment=ENVIRONMENT) as pool:
        results = pool.run(cases.odd_rank, odd)
    for error, message, seconds in results:
        assert error == "RankMismatchError", message
        assert f"rank {odd} differs" in message
        assert "all_gather_linear forward" in message
        assert seconds < 15
