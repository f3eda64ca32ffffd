"""One step of a parallelized Llama is one step of the stock Llama: loss, logits, every parameter's gradient."""

from __future__ import annotations

import pytest
import torch
from llama_cases import Case, parallel_step, stock_step

# Single precision carries 6e-8 relative; sums of a few hundred products in another order lose about a digit. The
# contract asks for 1e-5.
GRADIENT_TOLERANCE = 1e-5
LOGITS_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-6

CASES = {
    "multi_head": (Case(), (1, 2, 3, 4)),
    "grouped_heads": (Case(kv_heads=4), (2, 4)),
    "fewer_kv_heads_than_ranks": (Case(kv_heads=2, bias=True), (4,)),
    "one_kv_head": (Case(kv_heads=1), (2, 3)),
    "bias": (Case(bias=True), (2, 3)),
    "tied": (Case(tied=True), (2, 3)),
    "vocabulary_not_divisible": (Case(vocabulary=97), (2, 4)),
    "padded_length": (Case(length=23), (2, 3, 4)),
    "shorter_than_ranks": (Case(length=5), (4,)),
    "one_sequence": (Case(batch=1), (2,)),
    "attention_mask": (Case(padding_mask=True, length=22), (2, 3)),
    "packed_documents": (Case(packed=True), (2, 3)),
    "eager": (Case(attention="eager", kv_heads=4), (2, 4)),
    "eager_attention_mask": (Case(attention="eager", padding_mask=True), (2,)),
    "embeddings_given": (Case(inputs_embeds=True), (2,)),
    "checkpointing": (Case(checkpointing=True, kv_heads=2), (2, 4)),
    "reentrant_checkpointing": (Case(checkpointing=True, reentrant=True), (2,)),
    "frozen": (Case(frozen=("embed_tokens", "q_proj", "up_proj", "norm")), (2,)),
    "gathered_saved": (Case(gathered="save"), (2,)),
    "wide_heads": (Case(head_dim=16), (2,)),
    "dynamic_rope": (
        Case(length=80, batch=1, rope={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        (2,),
    ),
}


@pytest.mark.parametrize(("name", "world_size"), [(name, size) for name, (_, sizes) in CASES.items() for size in sizes])
def test_step_equals_stock(ranks, name, world_size):
    case = CASES[name][0]
    expected = stock_step(case)
    results = ranks(world_size).run(parallel_step, case)
    for result in results:
        assert result["loss"] == pytest.approx(expected["loss"], rel=LOSS_TOLERANCE)
    logits = torch.cat([result["logits"] for result in results], dim=1)[:, : case.length]
    torch.testing.assert_close(logits, expected["logits"], rtol=LOGITS_TOLERANCE, atol=LOGITS_TOLERANCE)
    gradients = results[0]["gradients"]
    assert gradients.keys() == expected["gradients"].keys()
    for parameter, truth in expected["gradients"].items():
        error = (gradients[parameter] - truth).norm() / truth.norm()
        assert error <= GRADIENT_TOLERANCE, f"{parameter}: {error:.1e}"
