"""``ody.trace``: what was called is in it, steps lie within their calls and name peers, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trace_cases as cases
from trace_format import problems_of

from odysseus_kernels.testing.spawn import RankPools

Event = dict[str, Any]


def _within(inner: Event, outer: Event) -> bool:
    return (
        inner["tid"] == outer["tid"]
        and outer["ts"] <= inner["ts"]
        and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    )


def _slices(result: dict[str, Any]) -> list[Event]:
    return [event for event in result["document"]["traceEvents"] if event["ph"] == "X"]


@pytest.mark.parametrize("mode", ("fused", "unfused"))
@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_a_step_is_covered(ranks: RankPools, tmp_path: Path, transport: str, mode: str) -> None:
    for rank, result in enumerate(ranks(2).run(cases.traced, str(tmp_path), transport, mode)):
        assert result["equal"]
        assert result["name"] == f"step-rank{rank}.json"
        named = result["document"]["traceEvents"][0]
        assert named["name"] == "process_name" and named["args"]["name"].startswith(f"rank {rank} on ")
        assert all(event["pid"] == rank for event in result["document"]["traceEvents"])
        events = _slices(result)

        calls = [event for event in events if event["cat"] == "call"]
        assert sorted({(c["args"]["operator"], c["args"]["phase"]) for c in calls}) == result["operators"]
        assert {c["args"]["transport"] for c in calls} == {transport}
        steps = [event for event in events if event["cat"] not in ("call", "send", "receive")]
        for step in steps:
            outer = [call for call in calls if _within(step, call)]
            assert outer and any(call["args"]["operator"] == step["args"]["operator"] for call in outer)
            assert step["name"].startswith("wait: ") or step["args"]["piece"] >= -1

        if transport == "symmetric":
            assert {step["cat"] for step in steps} == {"compute", "wait", "copy", "signal"}
            waits = [step for step in steps if step["cat"] == "wait"]
            assert waits and all(step["args"]["peer"] == 1 - rank and "chunk" in step["args"] for step in waits)
            copies = [step for step in steps if step["cat"] == "copy"]
            assert copies
            if mode == "fused":
                assert all(step["args"]["chunk"] == rank for step in copies)
        elif mode == "fused":
            assert {step["cat"] for step in steps} == {"compute", "wait", "issue"}
        computed = [step for step in steps if step["cat"] == "compute" and step["args"]["operator"] == "ring_attention"]
        # Unfused, attention comes between two exchanges, and only the peer's part of dk and dv is added in a step.
        own = {None} if mode == "fused" else set()
        assert {step["args"].get("peer") for step in computed} == {1 - rank, *own}


def test_forward_gather_by_chunks(ranks: RankPools, tmp_path: Path) -> None:
    """The two pieces of the peer's shard are waited for and multiplied one after another, behind the own shard."""
    for rank, result in enumerate(ranks(2).run(cases.traced, str(tmp_path), "symmetric", "fused")):
        steps = [
            (event["cat"], event["args"]["chunk"], event["args"]["piece"])
            for event in _slices(result)
            if event["cat"] in ("wait", "compute")
            and (event["args"]["operator"], event["args"]["phase"]) == ("all_gather_linear", "forward")
        ]
        peer = 1 - rank
        expected = [("compute", rank), ("wait", peer), ("compute", peer), ("wait", peer), ("compute", peer)]
        assert [step[:2] for step in steps] == expected
        assert [step[2] for step in steps[1:]] == [0, 0, 1, 1]


@pytest.mark.parametrize("mode", ("fused", "unfused"))
@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_what_all_ranks_wrote_is_a_valid_trace(ranks: RankPools, tmp_path: Path, transport: str, mode: str) -> None:
    results = ranks(2).run(cases.traced, str(tmp_path), transport, mode)
    for result in results:
        assert [problem for problem in problems_of(result["document"]) if "arrow" not in problem] == []
    merged = [event for result in results for event in result["document"]["traceEvents"]]
    assert problems_of({"traceEvents": merged}) == []
    moved = [event for event in merged if event.get("cat") in ("send", "receive")]
    assert bool(moved) == (transport == "collective")
    arrows = {event["id"] for event in merged if event["ph"] == "s"}
    assert len(arrows) == sum(event["cat"] == "send" for event in moved)


def test_every_byte_that_links_move_is_in_the_trace(ranks: RankPools, tmp_path: Path) -> None:
    """What one rank sends is what the recorder counts and what the other one receives."""
    results = ranks(2).run(cases.traced, str(tmp_path), "collective", "fused")
    sent, received = (
        [
            {event["args"]["transfer"]: event["args"]["bytes"] for event in _slices(result) if event["cat"] == kind}
            for result in results
        ]
        for kind in ("send", "receive")
    )
    assert sent[0] == received[1] and sent[1] == received[0]
    assert [sum(blocks.values()) for blocks in sent] == [result["bytes"] for result in results]
    for rank, result in enumerate(results):
        lanes = {
            event["args"]["name"]
            for event in result["document"]["traceEvents"]
            if event["ph"] == "M" and event["name"] == "thread_name"
        }
        assert lanes == {"calls", f"sends to rank {1 - rank}", f"receives from rank {1 - rank}"}


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_unfused_twins_copy_and_wait(ranks: RankPools, tmp_path: Path, transport: str) -> None:
    """Products come before or after: no step of a gather computes, and where there are no steps a wait is shown."""
    for result in ranks(2).run(cases.traced, str(tmp_path), transport, "unfused"):
        gather = [
            event
            for event in _slices(result)
            if event["args"].get("operator") == "all_gather_linear" and event["args"]["phase"] == "forward"
        ]
        found = {event["cat"] for event in gather}
        assert "wait" in found and "compute" not in found
        if transport == "collective":
            waits = [event["name"] for event in gather if event["cat"] == "wait"]
            assert waits == ["wait: every rank's call", "wait: all-gather"]
        else:
            assert "copy" in found


def test_faults_of_a_trace_are_found(ranks: RankPools, tmp_path: Path) -> None:
    """What the other tests rely on: a trace with a fault is not valid."""
    results = ranks(2).run(cases.traced, str(tmp_path), "collective", "fused")

    def broken(change: Callable[[list[Event]], object]) -> list[str]:
        merged = [dict(event) for result in results for event in result["document"]["traceEvents"]]
        change(merged)
        return problems_of({"traceEvents": merged})

    def first(events: list[Event], **wanted: Any) -> Event:
        return next(event for event in events if all(event.get(name) == value for name, value in wanted.items()))

    def lose(**wanted: Any) -> Callable[[list[Event]], object]:
        return lambda events: events.remove(first(events, **wanted))

    def change(field: str, value: Any) -> Callable[[list[Event]], object]:
        return lambda events: first(events, cat="compute").update({field: value})

    faults = {
        "overlap": change("dur", 10_000_000),
        "has no end": lose(ph="f"),
        "has no begin": lose(ph="s"),
        "points at no slice": lose(cat="receive"),
        "has no name": lose(name="thread_name"),
        "ts: expected <class 'int'>": change("ts", 1.25),
        "ts: expected a time": change("ts", -1),
        "dur: expected <class 'int'>": change("dur", 0.5),
        "dur: expected a time": change("dur", -1),
        "id: expected <class 'int'>": lambda events: first(events, ph="s").update(id="one"),
        "tid: expected": change("tid", "main"),
        "pid: expected": change("pid", None),
        "ph: expected": change("ph", "Y"),
    }
    assert broken(lambda events: None) == []
    for message, fault in faults.items():
        assert any(message in problem for problem in broken(fault)), message
