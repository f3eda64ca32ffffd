"""What depends on masks, on windows and on the length before padding is what the stock model computes."""

from __future__ import annotations

import pytest
import torch
from family_cases import Case, assemble
from mask_cases import Batch, Run, parallel_runs, refusals, stock_run

from odysseus_kernels.strategies import STRATEGIES

# As in test_families.
LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-6

LLAMA, MISTRAL = Case(kv_heads=4), Case(family="mistral", kv_heads=4)
MASKED = (Batch(mask="mixed"), Batch(length=23, mask="all_labels"))

_known = {}


def stock(run):
    """Configurations may hold what has no hash."""
    key = repr(run)
    if key not in _known:
        _known[key] = stock_run(run)
    return _known[key]


def check(ranks, runs, world_size, ring):
    """``runs``: pairs of a run and a strategy; all in one launch."""
    results = ranks(world_size).run(parallel_runs, runs, ring)
    for number, (run, strategy) in enumerate(runs):
        for index, (batch, expected) in enumerate(zip(run.batches, stock(run), strict=True)):
            where = f"{run.case}, {batch}, {strategy}, {world_size} ranks, ring {ring}"
            steps = [result[number][index] for result in results]
            for step in steps:
                assert step["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE), where
            # At every token, those included that are masked: all that have labels count.
            torch.testing.assert_close(
                assemble(steps, "logits", batch.length),
                expected["logits"],
                rtol=LOGITS_TOLERANCE,
                atol=LOGITS_TOLERANCE,
                msg=lambda m, where=where: f"{where}: {m}",
            )
            gradients = steps[0]["gradients"]
            assert gradients.keys() == expected["gradients"].keys(), where
            for name, gradient in expected["gradients"].items():
                error = (gradients[name] - gradient).norm() / gradient.norm()
                assert error <= GRADIENT_TOLERANCE, f"{where}, {name}: {error:.1e}"


@pytest.mark.parametrize(("world_size", "ring"), [(2, 2), (4, 2), (4, 4)])
def test_masked_tokens_under_ring(ranks, world_size, ring):
    """Tokens that are masked see the others; what sees nothing adds nothing, as sdpa has it."""
    strategies = STRATEGIES if (world_size, ring) == (4, 2) else ("odysseus",)
    runs = [(Run(MISTRAL, MASKED), strategy) for strategy in strategies]
    check(ranks, [*runs, (Run(LLAMA, MASKED), "odysseus")], world_size, ring)


@pytest.mark.parametrize("world_size", [2, 4])
def test_masked_tokens_that_see_nothing_attend_to_all_without_a_ring(ranks, world_size):
    """Eager attention gives a token that sees nothing the mean over the whole sequence: padding is not in it."""
    runs = [
        (Run(Case(family=family, attention=attention, kv_heads=4), MASKED[1:]), strategy)
        for strategy in STRATEGIES
        for family, attention in (("mistral", "eager"), ("mistral", "sdpa"))
    ]
    check(ranks, runs, world_size, 1)


DYNAMIC = (("rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),)
LONG = (
    (
        "rope_parameters",
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 17,
            "factor": 4.0,
            "rope_theta": 10000.0,
        },
    ),
)
# Growing, staying grown within what was seen, back to the original frequencies; around every edge, padded or not.
GROWING = tuple(Batch(length=n) for n in (64, 65, 80, 66, 63, 65))
AROUND_SEVENTEEN = (
    Batch(length=17),
    Batch(length=18),
    Batch(length=17, mask="ones"),
    Batch(length=23, documents=(6, 17)),
    Batch(length=23, documents=(5, 18)),
    Batch(length=17, mask="mixed"),
)


@pytest.mark.parametrize(("world_size", "ring"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_rotations_follow_the_length_before_padding(ranks, world_size, ring):
    # Rotation is no matter of strategies but of how tokens are cut.
    strategies = {(2, 1): STRATEGIES, (4, 2): ("tp", "ulysses")}.get((world_size, ring), ("odysseus",))
    runs = [
        (Run(Case(kv_heads=4, changes=changes), batches), strategy)
        for strategy in strategies
        for changes, batches in ((DYNAMIC, GROWING), (LONG, AROUND_SEVENTEEN))
    ]
    check(ranks, runs, world_size, ring)


def test_windows_and_kinds_of_layers_are_those_of_the_configuration_at_the_call(ranks):
    changed = (Batch(), Batch(set=(("sliding_window", 3),)), Batch(mask="mixed", set=(("sliding_window", 5),)))
    kinds = (Batch(length=23, set=(("layer_types", ("sliding_attention", "full_attention")), ("sliding_window", 4))),)
    qwen3 = (
        ("use_sliding_window", True),
        ("sliding_window", 6),
        ("max_window_layers", 1),
    )
    runs = [
        Run(Case(family="qwen2_sliding"), changed + kinds),
        Run(Case(family="qwen3", changes=qwen3), changed + kinds),
        Run(Case(family="qwen3_moe", changes=qwen3[:2]), changed),
        *(Run(Case(family=family), changed) for family in ("mistral", "starcoder2")),
        Run(Case(family="mixtral"), changed),
        # No window any more.
        Run(MISTRAL, (Batch(), Batch(set=(("sliding_window", None),)))),
    ]
    for ring in (1, 2):
        check(ranks, [(run, "odysseus") for run in runs], 2, ring)
    check(ranks, [(runs[0], strategy) for strategy in STRATEGIES], 4, 2)


def test_the_attention_function_is_that_of_the_configuration_at_the_call(ranks):
    eager = Run(LLAMA, (*MASKED[:1], Batch(length=23, mask="mixed", set=(("_attn_implementation", "eager"),))))
    check(ranks, [(eager, "odysseus")], 2, 1)


def test_configurations_that_cannot_be_followed_are_refused(ranks):
    sliding = ["sliding_attention", "sliding_attention"]
    for ring in (1, 2):
        changes = [("is_causal", False), ("layer_types", ["chunked_attention"] * 2), ("sliding_window", None)]
        texts = [
            "is_causal: expected True",
            "layer_types: expected full_attention",
            "sliding_window: expected a number",
        ]
        if ring > 1:
            changes.append(("_attn_implementation", "eager"))
            texts.append('attention: expected "sdpa"')
        case = Case(family="qwen2_sliding", changes=(("layer_types", sliding),))
        for found in ranks(2).run(refusals, case, changes, ring):
            for said, text in zip(found, texts, strict=True):
                assert said.startswith(text), said


@pytest.mark.parametrize(("world_size", "ring"), [(4, 1), (2, 2)])
def test_windows_as_long_as_the_sequence(ranks, world_size, ring):
    """And one shorter, one longer, as long as the padded sequence; longer than it."""
    batches = tuple(Batch(length=23, set=(("sliding_window", n),)) for n in (22, 23, 24, 25, 100, 1))
    batches += (Batch(length=23, documents=(9, 14), set=(("sliding_window", 9),)), Batch(length=23, mask="mixed"))
    check(ranks, [(Run(MISTRAL, batches), strategy) for strategy in ("odysseus",)], world_size, ring)


@pytest.mark.parametrize(("world_size", "ring"), [(2, 1), (2, 2), (4, 2)])
def test_router_losses(ranks, world_size, ring):
    batches = tuple(Batch(length=n, mask=mask) for n in (24, 21) for mask in ("", "ones", "mixed", "all_labels"))
    strategies = STRATEGIES if world_size == 2 and ring == 1 else ("tp", "odysseus")
    check(ranks, [(Run(Case(family="mixtral"), batches), strategy) for strategy in strategies], world_size, ring)
