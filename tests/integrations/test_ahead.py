"""Layers send ahead what the next ones gather: all of it is used, nothing is sent twice, and no number changes."""

from __future__ import annotations

import ahead_cases as cases
import pytest
from covering import every_pair
from llama_cases import Case

from odysseus_kernels.testing.spawn import RankPools

TRANSPORTS = ("symmetric", "collective")
BOTH = pytest.mark.parametrize("strategy", ("odysseus", "ulysses"))
EVERYWHERE = pytest.mark.parametrize("transport", TRANSPORTS)
PASSES = 4  # two steps of two batches


def expected(strategy: str, *, checkpointing: bool = False) -> cases.Counts:
    """(served, in the open, dropped) of three layers in one forward and one backward pass.

    Three weights of each feed-forward network; under Ulysses two exchanges of attention with weights.  In the open
    begin the first gather of forward if it is of weights, and the head's in backward.  A checkpoint computes each
    layer's forward again, the last one's behind the head, which does not know of it.
    """
    again = 2 if checkpointing else 1
    found = {
        "zero3_linear forward": (9 * again, 0, 0),
        "zero3_linear backward": (9, 0, 0),
        "zero3_linear_cross_entropy forward": (1, 0, 0),
        "zero3_linear_cross_entropy backward": (0, 1, 0),
    }
    if strategy == "ulysses":
        found |= {
            "linear_all_to_all forward": (2 * again, again, 0),
            "linear_all_to_all backward": (3, 0, 0),
            "all_to_all_linear forward": (3 * again, 0, 0),
            "all_to_all_linear backward": (3, 0, 0),
        }
    return found


def times(counts: cases.Counts, passes: int) -> cases.Counts:
    return {name: tuple(count * passes for count in found) for name, found in counts.items()}


@every_pair(strategy=("odysseus", "ulysses"), transport=TRANSPORTS, checkpoint=("none", "recompute", "reentrant"))
def test_all_gathers_but_the_first_are_served(ranks: RankPools, strategy: str, transport: str, checkpoint: str) -> None:
    case = Case(layers=3, checkpointing=checkpoint != "none", reentrant=checkpoint == "reentrant")
    for found, dropped in ranks(2).run(cases.training, case, strategy, transport):
        assert dropped == 0
        assert found == times(expected(strategy, checkpointing=checkpoint != "none"), PASSES)


@EVERYWHERE
@pytest.mark.parametrize("checkpointing", (False, True))
def test_pipelined_attention_sends_ahead(ranks: RankPools, transport: str, checkpointing: bool) -> None:
    case = Case(layers=3, checkpointing=checkpointing)
    for found, dropped in ranks(2).run(cases.training, case, "odysseus", transport, 1, 4):
        assert (found, dropped) == (expected("odysseus", checkpointing=checkpointing), 0)


@EVERYWHERE
@pytest.mark.parametrize("checkpointing", (False, True))
def test_groups_of_heads_send_ahead(ranks: RankPools, transport: str, checkpointing: bool) -> None:
    """Four of five exchanges share weights; backward's first one copies, and nobody can send that ahead of it."""
    case = Case(layers=3, kv_heads=4, checkpointing=checkpointing)
    counts = expected("ulysses", checkpointing=checkpointing)
    again = 2 if checkpointing else 1
    counts = {name: found for name, found in counts.items() if "all_to_all" not in name}
    counts |= {"pipelined_ulysses forward": (11 * again, again, 0), "pipelined_ulysses backward": (9, 3, 0)}
    for found, dropped in ranks(2).run(cases.training, case, "ulysses", transport, 1, 1, 2):
        assert (found, dropped) == (counts, 0)


@BOTH
@EVERYWHERE
def test_a_selective_checkpoint(ranks: RankPools, strategy: str, transport: str) -> None:
    """The head does not know that the layer before it sends nothing again."""
    once = expected(strategy) | {"zero3_linear backward": (8, 1, 0)}
    for found, dropped in ranks(2).run(cases.selective, strategy, transport):
        assert (found, dropped) == (once, 0)


@BOTH
def test_more_ranks(ranks: RankPools, strategy: str) -> None:
    for transport in TRANSPORTS:
        for found, dropped in ranks(3).run(cases.training, Case(layers=3), strategy, transport, 1):
            assert (found, dropped) == (expected(strategy), 0)


@BOTH
@pytest.mark.parametrize(
    "case",
    (
        pytest.param(Case(layers=3, bias=True), id="biases"),
        pytest.param(Case(layers=3, kv_heads=1), id="fewer heads than ranks"),
        pytest.param(Case(layers=3, tied=True), id="tied head"),
    ),
)
def test_nothing_is_sent_for_nothing(ranks: RankPools, strategy: str, case: Case) -> None:
    for transport in TRANSPORTS:
        for found, dropped in ranks(2).run(cases.training, case, strategy, transport, 1):
            assert dropped == 0
            assert found["zero3_linear forward"] == (9, 0, 0)


@BOTH
@pytest.mark.parametrize(
    ("frozen", "gathers"),
    (
        # Below the norm before the second layer's feed-forward network nothing is trained.
        (("embed", "layers.0.", "layers.1.self_attn", "layers.1.input"), 6),
        (("mlp",), 9),
        (("self_attn", "embed", "norm"), 9 - 2),
    ),
)
def test_frozen_weights(ranks: RankPools, strategy: str, frozen: tuple[str, ...], gathers: int) -> None:
    for transport in TRANSPORTS:
        for found, dropped in ranks(2).run(cases.training, Case(layers=3, frozen=frozen), strategy, transport, 1):
            assert dropped == 0
            assert found["zero3_linear backward"] == (gathers, 0, 0)


@pytest.mark.parametrize(
    ("strategy", "family"),
    (("tp_sp", "mixtral"), ("odysseus", "qwen3_moe"), ("ulysses", "mixtral"), ("tp", "qwen3_moe")),
)
def test_experts(ranks: RankPools, strategy: str, family: str) -> None:
    for transport in TRANSPORTS:
        for found, dropped in ranks(2).run(cases.experts, family, strategy, transport):
            assert dropped == 0
            if strategy != "tp":
                assert found["zero3_experts forward"][1] == 0


@BOTH
@EVERYWHERE
def test_evaluation(ranks: RankPools, strategy: str, transport: str) -> None:
    forward = {name: found for name, found in expected(strategy).items() if "forward" in name}
    head = forward.pop("zero3_linear_cross_entropy forward")
    forward["zero3_linear forward"] = (forward["zero3_linear forward"][0] + head[0], 0, 0)
    for found in ranks(2).run(cases.evaluation, strategy, transport):
        assert found == forward


@BOTH
@EVERYWHERE
def test_an_exception_between_two_layers(ranks: RankPools, strategy: str, transport: str) -> None:
    for dropped in ranks(2).run(cases.interrupted, strategy, transport):
        assert dropped <= 1  # what the pass before had sent


@BOTH
@EVERYWHERE
def test_unusual_orders(ranks: RankPools, strategy: str, transport: str) -> None:
    ranks(2).run(cases.unusual_orders, strategy, transport)


@BOTH
@EVERYWHERE
def test_weights_that_change_after_they_were_sent(ranks: RankPools, strategy: str, transport: str) -> None:
    for dropped in ranks(2).run(cases.changed_by_hooks, strategy, transport):
        assert dropped == {"odysseus": 3, "ulysses": 5}[strategy]  # all networks' first weights; two layers' attention
