"""How plans take attention: whole, in pieces, or in groups of heads; what they say of it, and what it changes."""

from __future__ import annotations

import pytest

from odysseus_kernels.planner.planning.machines import machine_for
from odysseus_kernels.planner.planning.models import model_sizes
from odysseus_kernels.planner.planning.pipelining import Form, form_of
from odysseus_kernels.planner.planning.plan import Plan, SplitPlan, plan
from odysseus_kernels.planner.planning.splits import Split

LONG = 1 << 14
SCALE_MODEL = "h100-nvlink@8"


def by_split(found: Plan) -> dict[Split, SplitPlan]:
    return {one.split: one for one in found.splits}


@pytest.mark.parametrize(
    ("pipeline", "split", "hardware", "changes", "form"),
    (
        # By itself: a long sequence, between CPU hosts, in 32 bits or more.
        ("auto", Split("ulysses", 4), SCALE_MODEL, {}, Form(head_groups=4)),
        ("auto", Split("ulysses", 4), SCALE_MODEL, {"dtype": "float64"}, Form(head_groups=4)),
        ("auto", Split("ulysses", 4), SCALE_MODEL, {"length": 8191}, Form(head_groups=4)),  # with its padding
        ("auto", Split("ulysses", 4), SCALE_MODEL, {"length": 8188}, Form()),
        ("auto", Split("ulysses", 4), SCALE_MODEL, {"dtype": "bfloat16"}, Form()),
        ("auto", Split("ulysses", 4), SCALE_MODEL, {"model": "mistral-7b"}, Form(head_groups=2)),
        ("auto", Split("ulysses", 4), SCALE_MODEL, {"model": "starcoder2-7b"}, Form()),
        ("auto", Split("ulysses", 4), "cpu", {}, Form()),
        ("auto", Split("ulysses", 4, 1, 64), "cpu", {}, Form()),  # blocks of four within hosts of 64
        ("auto", Split("ulysses", 3, 1, 32), "cpu", {}, Form(head_groups=2)),
        ("auto", Split("ulysses", 16), "h100-nvlink", {}, Form()),
        # A number: as many as divide a rank's heads, on every machine.
        (8, Split("ulysses", 4), "h100-nvlink", {"dtype": "bfloat16"}, Form(head_groups=8)),
        (7, Split("ulysses", 4), "h100-nvlink", {}, Form(head_groups=4)),
        (7, Split("ulysses", 8), "cpu", {"length": 64}, Form(head_groups=4)),
        (8, Split("ulysses", 4), SCALE_MODEL, {"model": "starcoder2-7b"}, Form()),  # one key/value head of each rank
        (8, Split("ulysses", 2, 2), SCALE_MODEL, {}, Form()),
        (8, Split("tsp", 4), SCALE_MODEL, {}, Form()),
        (None, Split("ulysses", 4), SCALE_MODEL, {}, Form()),
        (1, Split("ulysses", 4), SCALE_MODEL, {}, Form()),
        # Pieces of the sequence.
        ("auto", Split("odysseus", 4), "h100-nvlink", {}, Form(pieces=8)),
        ("auto", Split("tp_sp", 4, 4), "h100-nvlink", {}, Form(pieces=4)),
        (6, Split("tp_sp", 4, 4), "h100-nvlink", {}, Form(pieces=6)),
        (None, Split("odysseus", 4), "h100-nvlink", {}, Form()),
        (6, Split("odysseus", 1, 4), "h100-nvlink", {}, Form()),
        ("auto", Split("tp", 4), "h100-nvlink", {}, Form()),
    ),
)  # fmt: skip
def test_how_attention_is_taken(pipeline, split: Split, hardware: str, changes: dict, form: Form) -> None:
    model = model_sizes(changes.get("model", "llama-2-7b"))
    given = {"length": LONG, "dtype": "float32", **{k: v for k, v in changes.items() if k != "model"}}
    assert form_of(model, split, machine_for(hardware), pipeline=pipeline, **given) == form


def test_a_plan_says_how_it_takes_attention() -> None:
    arguments = {"model_config": "llama-2-7b", "world_size": 4, "seq_len": LONG, "hardware": SCALE_MODEL}
    by_form = {}
    for pipeline in ("auto", None, 8):
        found = plan(**arguments, dtype="float32", pipeline=pipeline)
        (note,) = (note for note in found.notes if note.startswith("attention with pipeline="))
        by_form[pipeline] = note, by_split(found)[Split("ulysses", 4)]
        ringed = by_split(found)[Split("ulysses", 2, 2)]
        assert (ringed.pieces, ringed.head_groups) == (1, 1)
    assert by_form["auto"][0] == (
        "attention with pipeline='auto': odysseus in 8 pieces, tp_sp in 8 pieces, ulysses in 4 groups of heads, "
        "all others whole"
    )
    assert by_form[None][0] == "attention with pipeline=None: whole"
    whole, auto, more = (by_form[pipeline][1] for pipeline in (None, "auto", 8))
    assert [one.as_dict()["head_groups"] for one in (whole, auto, more)] == [1, 4, 8]
    assert [one.as_dict()["pieces"] for one in (whole, auto, more)] == [1, 1, 1]
    # The same bytes and memory; only what is hidden differs, and more groups hide more.
    assert whole.traffic == auto.traffic == more.traffic and whole.memory == auto.memory == more.memory
    assert more.seconds.exposed < auto.seconds.exposed < 0.9 * whole.seconds.exposed
    assert whole.seconds.exposed_fused == auto.seconds.exposed_fused == more.seconds.exposed_fused
    # Cores of one host either copy or compute: groups hide nothing there.
    alone = plan(**{**arguments, "hardware": "cpu"}, dtype="float32", pipeline=8)
    same = by_split(plan(**{**arguments, "hardware": "cpu"}, dtype="float32", pipeline=None))
    for split, one in by_split(alone).items():
        if split.strategy == "ulysses":
            assert one.seconds == same[split].seconds
