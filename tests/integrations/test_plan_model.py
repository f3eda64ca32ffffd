"""The planner's elements, bytes, padding and refusals beside parallelized models."""

from __future__ import annotations

import pytest
from family_cases import Case
from plan_model_cases import model_on_a_rank

from odysseus_kernels.planner.formulas import STRATEGIES
from odysseus_kernels.planner.planning.models import model_sizes
from odysseus_kernels.planner.planning.split_bytes import step_traffic
from odysseus_kernels.planner.planning.split_memory import elements_of
from odysseus_kernels.planner.planning.splits import Split, why_not

_PADDED = 6  # where nn/cut.py writes it
# A tied head and biases; norms of heads and a head that ranks do not divide; fewer key/value heads than ranks; experts;
# heads, and widths, that four ranks do not divide.
CASES = [
    Case(family="qwen2", kv_heads=4, length=23, tied=True),
    Case(family="qwen3", kv_heads=4, vocabulary=121, length=22),
    Case(family="starcoder2", kv_heads=1),
    Case(family="mixtral", kv_heads=4, changes=(("output_router_logits", False),)),
    Case(kv_heads=3, changes=(("num_attention_heads", 3),)),
    Case(kv_heads=4, changes=(("intermediate_size", 146),)),
]
TP_EXPERTS = "experts: no formula says what they send under tp"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_planned_model_is_the_real_one(ranks, strategy):
    split = Split(strategy, 2, 2)
    results = ranks(4).run(model_on_a_rank, CASES, strategy, 2)
    planned = 0
    for case, *found in zip(CASES, *results, strict=True):
        first = found[0]
        model = model_sizes(first["config"])
        reason = why_not(model, split)
        if reason != TP_EXPERTS:
            assert bool(reason) == bool(first["refused"]), f"{case}: {reason!r}, {first['refused']!r}"
        if reason:
            continue
        elements = elements_of(model, split)
        assert [one["elements"] for one in found] == [model.layers * elements.layer + elements.ends] * 4, case
        assert first["cut"][_PADDED] == split.padded(case.length), case
        length = split.padded(case.length)
        sizes = {"tokens": case.batch * length, "element_size": 4, "checkpointing": False}
        sent = step_traffic(model, split, elements, **sizes, length=length).by_collective()
        # Under a window ring ranks send unlike much: it is the one that sends most that is planned.
        assert max((one["sent"] for one in found), key=lambda one: one["send_recv"]) == sent, case
        assert all({**one["sent"], "send_recv": sent["send_recv"]} == sent for one in found), case
        if model.window is None:
            assert [one["sent"] for one in found] == [sent] * 4, case
        planned += 1
    assert planned >= 3
