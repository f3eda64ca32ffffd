"""``ody.trace``: what was called is in it, steps lie within their calls and name peers, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trace_cases as cases

from odysseus_kernels.testing.spawn import RankPools

Event = dict[str, Any]


def _within(inner: Event, outer: Event) -> bool:
    # Times are microseconds since 1970 in fp64: a quarter of one is what they can tell apart.
    return (
        inner["tid"] == outer["tid"]
        and outer["ts"] - 0.5 <= inner["ts"]
        and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.5
    )


@pytest.mark.parametrize("mode", ("fused", "unfused"))
@pytest.mark.parametrize("transport", ("symmetric", "collective"))
def test_a_step_is_covered(ranks: RankPools, tmp_path: Path, transport: str, mode: str) -> None:
    for rank, result in enumerate(ranks(2).run(cases.traced, str(tmp_path), transport, mode)):
        assert result["equal"]
        assert result["name"] == f"step-rank{rank}.json"
        meta, *events = result["document"]["traceEvents"]
        assert meta["ph"] == "M" and meta["args"]["name"].startswith(f"rank {rank} on ")
        assert all(event["ph"] == "X" and event["pid"] == rank and event["dur"] >= 0 for event in events)

        calls = [event for event in events if event["cat"] == "call"]
        assert sorted({(c["args"]["operator"], c["args"]["phase"]) for c in calls}) == result["operators"]
        assert {c["args"]["transport"] for c in calls} == {transport}
        steps = [event for event in events if event["cat"] != "call"]
        for step in steps:
            outer = [call for call in calls if _within(step, call)]
            assert outer and any(call["args"]["operator"] == step["args"]["operator"] for call in outer)
            assert step["args"]["piece"] >= -1

        if transport == "symmetric":
            assert {step["cat"] for step in steps} == {"compute", "wait", "copy", "signal"}
            waits = [step for step in steps if step["cat"] == "wait"]
            assert waits and all(step["args"]["peer"] == 1 - rank and "chunk" in step["args"] for step in waits)
            copies = [step for step in steps if step["cat"] == "copy"]
            assert copies and all(step["args"]["chunk"] == rank for step in copies)
        elif mode == "fused":
            assert {step["cat"] for step in steps} == {"compute", "wait", "send"}
        computed = [step for step in steps if step["cat"] == "compute" and step["args"]["operator"] == "ring_attention"]
        assert {step["args"].get("peer") for step in computed} == {None, 1 - rank}


def test_forward_gather_by_chunks(ranks: RankPools, tmp_path: Path) -> None:
    """The two pieces of the peer's shard are waited for and multiplied one after another, behind the own shard."""
    for rank, result in enumerate(ranks(2).run(cases.traced, str(tmp_path), "symmetric", "fused")):
        steps = [
            (event["cat"], event["args"]["chunk"], event["args"]["piece"])
            for event in result["document"]["traceEvents"][1:]
            if event["cat"] in ("wait", "compute")
            and (event["args"]["operator"], event["args"]["phase"]) == ("all_gather_linear", "forward")
        ]
        peer = 1 - rank
        expected = [("compute", rank), ("wait", peer), ("compute", peer), ("wait", peer), ("compute", peer)]
        assert [step[:2] for step in steps] == expected
        assert [step[2] for step in steps[1:]] == [0, 0, 1, 1]
