"""Choosing modes: all ranks alike, never measured slower than unfused, measured once."""

from __future__ import annotations

import dataclasses
import timeit
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import choice_cases as cases
import pytest
import torch
from choice_cases import FINGERPRINT, KEY, Run, constant
from hypothesis import given, settings
from hypothesis import strategies as st

from odysseus_kernels.comm.choice.cache import CachedChoice, ChoiceCache
from odysseus_kernels.comm.choice.measure import Choices, CudaTimer, Decision, HostTimer
from odysseus_kernels.comm.transport import CapacityExceededError
from odysseus_kernels.errors import PeerLostError, RankMismatchError
from odysseus_kernels.testing.spawn import RankPools

OTHER = dataclasses.replace(KEY, phase="backward")


def decided(outcomes: list[Decision | Exception]) -> list[Decision]:
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes  # type: ignore[return-value]


def measure(choices: list[Choices], per_rank: list[dict[str, Run]], key: Any = KEY) -> list[Decision | Exception]:
    keys = key if isinstance(key, list) else [key] * len(choices)
    return cases.on_threads(
        lambda rank: choices[rank].decide(keys[rank], per_rank[rank], {}, measure=True), len(choices)
    )


@pytest.mark.parametrize(
    ("rank_0", "rank_1", "mode"),
    (
        ({"unfused": 2.0, "fused": 1.0}, {"unfused": 2.0, "fused": 1.0}, "fused"),
        ({"unfused": 2.0, "fused": 1.0, "tiles": 0.5}, {"unfused": 2.0, "fused": 1.0, "tiles": 0.5}, "tiles"),
        # Faster here, slower there: the slowest rank counts.
        ({"unfused": 2.0, "fused": 1.0}, {"unfused": 2.0, "fused": 3.0}, "unfused"),
        ({"unfused": 2.0, "fused": 2.0}, {"unfused": 2.0, "fused": 2.0}, "unfused"),
        # Within the margin.
        ({"unfused": 2.0, "fused": 1.97}, {"unfused": 2.0, "fused": 1.97}, "unfused"),
        ({"unfused": 2.0, "fused": 1.95}, {"unfused": 2.0, "fused": 1.95}, "fused"),
    ),
)
def test_the_slowest_rank_counts(rank_0: dict[str, float], rank_1: dict[str, float], mode: str) -> None:
    choices, _ = cases.group(2)
    found = decided(measure(choices, [constant(**rank_0), constant(**rank_1)]))
    slowest = {name: max(rank_0[name], rank_1[name]) for name in rank_0}
    for rank, decision in enumerate(found):
        assert (decision.mode, decision.how) == (mode, "measured")
        assert decision.seconds == slowest
        assert decision.ratio == slowest["unfused"] / slowest[mode]
        assert choices[rank].decisions == (decision,)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.fixed_dictionaries({mode: st.floats(1e-6, 1.0) for mode in ("unfused", "fused", "tiles")}),
        min_size=3,
        max_size=3,
    )
)
def test_all_ranks_alike_and_never_slower(per_rank: list[dict[str, float]]) -> None:
    choices, _ = cases.group(3, budget_s=0)
    # In one order on all ranks, which the drawn dictionaries are not in.
    found = decided(measure(choices, [constant(**dict(sorted(seconds.items()))) for seconds in per_rank]))
    assert len({decision.mode for decision in found}) == 1
    for decision in found:
        assert decision.seconds[decision.mode] <= decision.seconds["unfused"]
        assert decision.seconds == found[0].seconds


def test_a_rare_outlier_does_not_count() -> None:
    """The median of four rounds is the mean of the middle two."""
    log: list[str] = []
    candidates = {
        "unfused": Run("unfused", [2.0], log),
        "fused": Run("fused", [1.0, 90.0, 1.0, 1.0, 1.0], log),  # the first is the warm-up
    }
    choices, _ = cases.group(1)
    (decision,) = decided(measure(choices, [candidates]))
    assert decision.mode == "fused" and decision.seconds == {"unfused": 2.0, "fused": 1.0}


@pytest.mark.parametrize(("budget_s", "rounds"), ((0.0, 4), (1.0, 4), (15.0, 10), (17.9, 10), (1000.0, 20)))
def test_runs_are_equal_on_all_ranks(budget_s: float, rounds: int) -> None:
    """Ranks whose clocks differ make the same runs in the same order: the slowest rank's 1.5 s decide how many."""
    logs: list[list[str]] = [[], []]
    choices, exchange = cases.group(2, budget_s=budget_s)
    per_rank = [constant(logs[0], unfused=1.0, fused=0.5), constant(logs[1], unfused=0.01, fused=0.02)]
    decided(measure(choices, per_rank))
    warm_up = ["unfused"] * 2 + ["fused"] * 2
    assert logs[0] == logs[1] == warm_up + ["unfused", "fused", "fused", "unfused"] * (rounds // 2)
    assert exchange.count == 3


def test_decided_once() -> None:
    log: list[str] = []
    choices, exchange = cases.group(1)
    candidates = constant(log, unfused=2.0, fused=1.0)
    first = choices[0].decide(KEY, candidates, {}, measure=True)
    runs = len(log)
    same_key = dataclasses.replace(KEY)
    for measure_now in (True, False):
        assert choices[0].decide(same_key, candidates, {}, measure=measure_now) is first
        assert choices[0].find(same_key, measure=measure_now) is first
    assert len(log) == runs and exchange.count == 3
    assert choices[0].find(OTHER, measure=True) is None
    # Microseconds; the limit leaves room for a busy machine.
    assert timeit.timeit(lambda: choices[0].find(KEY, measure=True), number=1000) / 1000 < 50e-6


def test_prediction_gives_way_to_measurement() -> None:
    choices, exchange = cases.group(1)
    candidates = constant(unfused=1.0, fused=2.0)
    predicted = choices[0].decide(KEY, candidates, {"unfused": 1.0, "fused": 0.5, "other": 0.1}, measure=False)
    assert (predicted.mode, predicted.how, exchange.count) == ("fused", "model", 0)
    assert predicted.seconds == {"unfused": 1.0, "fused": 0.5}
    assert choices[0].find(KEY, measure=False) is predicted
    assert choices[0].find(KEY, measure=True) is None
    measured = choices[0].decide(KEY, candidates, {}, measure=True)
    assert (measured.mode, measured.how) == ("unfused", "measured")
    assert choices[0].decide(KEY, candidates, {}, measure=False) is measured
    assert choices[0].decisions == (measured,)


def test_prediction_needs_more_than_a_narrow_lead() -> None:
    (choices,), _ = cases.group(1)
    found = choices.decide(KEY, constant(unfused=1.0, fused=1.0), {"unfused": 1.0, "fused": 0.95}, measure=False)
    assert found.mode == "unfused"
    with pytest.raises(ValueError, match=r"expected seconds for some of \['unfused', 'fused'\], got \['tiles'\]"):
        choices.decide(OTHER, constant(unfused=1.0, fused=1.0), {"tiles": 1.0}, measure=False)


def test_a_single_candidate_is_not_run() -> None:
    log: list[str] = []
    choices, exchange = cases.group(1)
    decision = choices[0].decide(KEY, constant(log, tiles=1.0), {}, measure=True)
    assert (decision.mode, decision.how, log, exchange.count) == ("tiles", "only", [], 0)
    with pytest.raises(ValueError, match="expected at least one"):
        choices[0].decide(OTHER, {}, {}, measure=True)


def test_noted_modes_are_listed_last() -> None:
    (choices,), _ = cases.group(1)
    asked = choices.note(KEY, "fused")
    assert choices.note(KEY, "fused") is asked and asked.how == "asked" and asked.ratio is None
    default = choices.note(KEY, "fused", "default")
    assert default.how == "default" and choices.find(KEY, measure=True) is None
    decision = choices.decide(KEY, constant(unfused=1.0), {}, measure=True)
    assert choices.decisions == (decision, asked, default)


@pytest.mark.parametrize("error", (ValueError("odd rows"), CapacityExceededError("too large")))
def test_candidates_that_cannot_be_had_are_dropped(error: Exception) -> None:
    log: list[str] = []
    choices, _ = cases.group(2)

    def candidates() -> dict[str, Run]:
        return {**constant(log, unfused=2.0, fused=1.0), "tiles": Run("tiles", [0.1], log, error)}

    found = decided(measure(choices, [candidates(), candidates()]))
    for decision in found:
        assert decision.mode == "fused" and set(decision.seconds) == {"unfused", "fused"}
        assert decision.dropped == {"tiles": f"{type(error).__name__}: {error}"}
    assert log.count("tiles") == 2  # once on each rank


def test_what_is_left_of_two() -> None:
    choices, exchange = cases.group(1)
    candidates = {**constant(unfused=1.0), "tiles": Run("tiles", [0.1], [], ValueError("odd rows"))}
    (decision,) = decided(measure(choices, [candidates]))
    assert (decision.mode, decision.how) == ("unfused", "only") and "tiles" in decision.dropped
    assert exchange.count == 2


def test_no_candidate_can_be_had() -> None:
    choices, _ = cases.group(2)
    refusing = {
        "unfused": Run("unfused", [1.0], [], ValueError("bad input")),
        "fused": Run("fused", [1.0], [], CapacityExceededError("too large")),
    }
    for outcome in measure(choices, [refusing, refusing]):
        assert isinstance(outcome, CapacityExceededError) and str(outcome) == "too large"
    assert choices[0].decisions == ()


def test_candidates_refused_on_one_rank_only() -> None:
    choices, _ = cases.group(3)
    refusing = {**constant(unfused=1.0), "tiles": Run("tiles", [0.1], [], ValueError("odd rows"))}
    complete = constant(unfused=1.0, tiles=0.1)
    for outcome in measure(choices, [complete, refusing, complete]):
        assert isinstance(outcome, RankMismatchError)
        assert "rank 1 differs" in str(outcome) and "odd rows" in str(outcome)


def test_errors_between_ranks_propagate_and_decide_nothing() -> None:
    """RankMismatchError is a ValueError, too, and must not be taken for a mode that cannot be had."""
    for error in (RankMismatchError("rank 1 differs"), PeerLostError("rank 1 is gone")):
        (choices,), _ = cases.group(1)
        with pytest.raises(type(error), match="rank 1"):
            choices.decide(KEY, {**constant(unfused=1.0), "fused": Run("fused", [1], [], error)}, {}, measure=True)
        assert choices.decisions == ()
        assert choices.decide(KEY, constant(unfused=2.0, fused=1.0), {}, measure=True).mode == "fused"


def test_ranks_that_decide_different_things() -> None:
    choices, _ = cases.group(3)
    candidates = [constant(unfused=2.0, fused=1.0) for _ in range(3)]
    for outcome in measure(choices, candidates, [KEY, KEY, OTHER]):
        assert isinstance(outcome, RankMismatchError)
        assert "rank 2 differs" in str(outcome) and "all_gather_linear backward" in str(outcome)
    choices, _ = cases.group(3)
    candidates[0] = constant(unfused=2.0, tiles=1.0)
    for outcome in measure(choices, candidates):
        assert isinstance(outcome, RankMismatchError)
        assert "rank 0 differs" in str(outcome) and "unfused, tiles" in str(outcome)


def test_what_may_differ_between_ranks() -> None:
    choices, _ = cases.group(2)
    keys = [dataclasses.replace(KEY, own=f"weight [{rank}, 8]", device=f"GPU {rank}") for rank in range(2)]
    found = decided(measure(choices, [constant(unfused=2.0, fused=1.0)] * 2, keys))
    assert [decision.mode for decision in found] == ["fused", "fused"]


@pytest.mark.parametrize("reply", ("not JSON", "[]", '{"key": 1}'))
def test_texts_of_something_else(reply: str) -> None:
    choices = Choices(None, lambda text: [text, reply])
    with pytest.raises(RankMismatchError, match="rank 1 sent"):
        choices.decide(KEY, constant(unfused=2.0, fused=1.0), {}, measure=True)


def test_a_clock_that_fails_is_an_error_on_all_ranks() -> None:
    choices, _ = cases.group(2)
    outcomes = measure(choices, [constant(unfused=1.0, fused=1.0), constant(unfused=1.0, fused=float("nan"))])
    for outcome in outcomes:
        assert isinstance(outcome, RankMismatchError) and "rank 1 measured nan s for fused" in str(outcome)


def test_messages_fit_whatever_the_shapes_are() -> None:
    """The exchange of the tests asserts that texts are ASCII of at most 4096 bytes."""
    key = dataclasses.replace(KEY, shapes='"é' * 3000)
    choices, _ = cases.group(2)
    refusing = {
        **constant(unfused=2.0, fused=1.0),
        **{mode: Run(mode, [0], [], ValueError('"\\é' * 3000)) for mode in ("tiles", "a", "b", "c")},
    }
    assert decided(measure(choices, [refusing, refusing], key))[0].mode == "fused"


def test_cached_choices_are_taken_where_all_ranks_agree(tmp_path: Path) -> None:
    log: list[str] = []
    choices, _ = cases.group(2, [ChoiceCache(tmp_path, FINGERPRINT) for _ in range(2)])
    first = decided(measure(choices, [constant(log, unfused=2.0, fused=1.0) for _ in range(2)]))
    runs = len(log)
    choices, exchange = cases.group(2, [ChoiceCache(tmp_path, FINGERPRINT) for _ in range(2)])
    second = decided(measure(choices, [constant(log, unfused=2.0, fused=3.0) for _ in range(2)]))
    assert [(one.mode, one.how, one.seconds) for one in second] == [("fused", "cached", first[0].seconds)] * 2
    assert len(log) == runs and exchange.count == 1


@pytest.mark.parametrize("modes", (("fused", None), ("fused", "unfused"), ("tiles", "tiles")))
def test_caches_that_disagree_or_are_of_no_use(tmp_path: Path, modes: tuple[str | None, ...]) -> None:
    """One has no choice, they have different ones, or one that is no candidate now: all measure, and keep that."""
    caches = [ChoiceCache(tmp_path / str(rank), FINGERPRINT) for rank in range(2)]
    for cache, mode in zip(caches, modes, strict=True):
        if mode is not None:
            cache.put(KEY.text, CachedChoice(mode, {mode: 1.0}))
    choices, _ = cases.group(2, caches)
    found = decided(measure(choices, [constant(unfused=1.0, fused=0.5) for _ in range(2)]))
    assert [(one.mode, one.how) for one in found] == [("fused", "measured")] * 2
    for rank in range(2):
        kept = ChoiceCache(tmp_path / str(rank), FINGERPRINT).get(KEY.text)
        assert kept == CachedChoice("fused", {"unfused": 1.0, "fused": 0.5})


@pytest.mark.parametrize("world", (2, 3))
def test_real_operators(ranks: RankPools, tmp_path: Path, world: int) -> None:
    found = ranks(world).run(cases.real_operators, str(tmp_path))
    assert len({one["modes"][0] for one in found}) == 1
    for one in found:
        assert one["how"] == ["measured", "cached"]
        assert one["modes"][0] == one["modes"][1]
        assert one["seconds"][0] == one["seconds"][1] == found[0]["seconds"][0]
        assert one["runs"] == found[0]["runs"] and min(one["runs"].values()) >= 6
        assert not any(one["later"].values())


def test_real_operators_with_caches_that_disagree(ranks: RankPools, tmp_path: Path) -> None:
    found = ranks(2).run(cases.disagreeing_operators, str(tmp_path))
    assert found[0] == found[1]
    assert all(how.startswith("measured") for how in found[0])


def test_host_timer() -> None:
    runs: list[int] = []
    assert 0 <= HostTimer().measure(lambda: runs.append(1)) < 10
    assert runs == [1]


def test_cuda_timer_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls, with a stand-in for the device: waits for it, then brackets the run with events."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.5  # ms

    class Device:
        def __init__(self, device: torch.device) -> None:
            assert device.index == 3

        def __enter__(self) -> None:
            log.append("enter")

        def __exit__(self, *error: object) -> None:
            log.append("leave")

    stand_in = SimpleNamespace(Event=Event, device=Device, synchronize=lambda: log.append("idle"))
    monkeypatch.setattr(torch, "cuda", stand_in)
    assert CudaTimer(torch.device("cuda", 3)).measure(lambda: log.append("run")) == 2.5e-3
    assert log == ["enter", "idle", "record", "run", "record", "wait", "leave"]


def test_bad_budget() -> None:
    with pytest.raises(ValueError, match="budget_s: expected at least 0 seconds, got -1"):
        Choices(None, lambda text: [text], budget_s=-1)
