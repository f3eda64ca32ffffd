"""Ranks that compare their calls without waiting, and waits of a device that are ended for a reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ledger_cases
import pytest
import torch

from odysseus_kernels.comm.collective import handshakes
from odysseus_kernels.errors import FallbackWarning
from odysseus_kernels.testing.spawn import run_ranks


@pytest.mark.parametrize("world", (2, 4))
def test_hosts_may_run_ahead_of_one_another(ranks: Any, world: int) -> None:
    assert ranks(world).run(ledger_cases.many_calls) == [300] * world


@pytest.mark.parametrize("odd", (0, 2))
def test_a_different_call_is_named_on_every_rank(ranks: Any, odd: int) -> None:
    for kind, message in ranks(3).run(ledger_cases.different_call, odd):
        assert kind == "RankMismatchError", message
        assert f"rank {odd} differs in call number 5" in message
        assert "gathers [1, 9, 2] float32" in message and "gathers [1, 4, 2] float32" in message


def test_the_supervisor_ends_waits_of_ranks_that_differ(ranks: Any) -> None:
    for codes, (kind, message) in ranks(3).run(ledger_cases.supervisor_sees_a_difference):
        assert codes == [3]
        assert kind == "RankMismatchError" and "rank 2 differs in call number 1" in message


def test_a_peer_that_was_first_to_compare_is_no_lost_peer(ranks: Any) -> None:
    for kind, message in ranks(2).run(ledger_cases.first_to_compare):
        assert kind == "RankMismatchError" and "ranks differ in call number 1" in message


def test_a_host_far_ahead_waits_and_says_for_whom(ranks: Any) -> None:
    (kind, message), _ = ranks(2).run(ledger_cases.lagging_peer)
    assert kind == "SignalTimeoutError"
    assert "gather (forward): rank 0 waited for rank 1 to begin call number 1" in message and "0.5 s" in message


@pytest.mark.parametrize("world", (2, 3))
def test_a_killed_peer_ends_waits_within_two_seconds(world: int) -> None:
    outcomes = run_ranks(ledger_cases.lost_peer, world, expect_failure=True, grace=10.0)
    assert outcomes[-1].exit_code == 7
    for outcome in outcomes[:-1]:
        assert outcome.ok, outcome.describe()
        seconds, codes, quiet, needed, gave_up = outcome.result
        assert seconds < 2.0 and codes == [2]
        assert quiet == ("", "")  # nobody waited for it: what was enqueued is complete
        assert needed[0] == "PeerLostError" and f"the process of rank {world - 1} is gone" in needed[1]
        assert gave_up[0] == "PeerLostError" and gave_up[1].startswith(ledger_cases.WAITS[0])


def test_a_wait_that_gives_up_is_an_error_on_all_ranks(ranks: Any) -> None:
    first, *others = ranks(3).run(ledger_cases.timed_out)
    assert first[0] == "SignalTimeoutError"
    assert first[1].startswith(ledger_cases.WAITS[0]) and "within 3 s (signal 0x100, expected 0x101)" in first[1]
    for kind, message in others:
        assert kind == "PeerLostError" and "rank 0 gave up: gather (forward): rank 0 waited" in message


def test_handshakes_beside_calls(ranks: Any) -> None:
    assert ranks(3).run(ledger_cases.handshakes, None) == [("", "")] * 3


def test_handshakes_find_a_different_call() -> None:
    """In processes of their own: ranks notice at different calls, after which their group is out of step."""
    for outcome in run_ranks(ledger_cases.handshakes, 3, 1, expect_failure=True):
        assert outcome.ok, outcome.describe()
        kind, message = outcome.result
        assert kind == "RankMismatchError" and "rank 1 differs in call number 8" in message
        assert "rank 1 called call 7 of other shapes" in message


def test_a_group_that_compares_first_calls_only_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "exchange_device", lambda group: torch.device("cuda", 0))
    with pytest.warns(FallbackWarning, match="process group of GPUs serves no CPU tensors: only the first call"):
        handshakes.Handshakes(SimpleNamespace(group_name="of GPUs"))  # type: ignore[arg-type]
