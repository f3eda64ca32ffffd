"""What ranks run in the tests of models whose attention is pipelined."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from family_cases import Case, make_mesh, parallel_model, whole

import odysseus_kernels as ody
from odysseus_kernels.comm.groups import between_hosts
from odysseus_kernels.integrations import pipelining
from odysseus_kernels.planner.pipeline import pick_head_groups


def choices(rank: int, world: int) -> None:
    mesh, batch = make_mesh(world, 1), Case().whole_batch()
    model = parallel_model(Case(), "odysseus", mesh, pipeline=4)
    assert "pipelined in 4 pieces" in ody.explain(model)
    striped = ody.shard_sequence(batch, model)
    # Pieces of 1, 6, 4 and 1 rows of each rank.
    stripes = ((0, 1), (2, 6), (14, 4), (22, 1))
    expected_positions = [begin + rank * rows + row for begin, rows in stripes for row in range(rows)]
    assert striped["position_ids"][0].tolist() == expected_positions
    assert torch.equal(striped["input_ids"], ody.shard_sequence(batch, mesh, pieces=4)["input_ids"])
    expected = model(**striped).loss
    by_hand = {name: tensor for name, tensor in striped.items() if name != "sequence_cut"}
    assert model(**by_hand).loss == expected, "positions tell as well"
    refused = (
        (model, ody.shard_sequence(batch, mesh), r"cut in 1 pieces, and the model is parallelized with pipeline=4"),
        (model, ody.shard_sequence(batch, mesh, pieces=2), "cut in 2 pieces, and the model"),
        (parallel_model(Case(), "tp_sp", mesh, pipeline=None), striped, "cut in 4 pieces, .* pipeline=None"),
        (parallel_model(Case(), "ulysses", mesh), striped, "cut in 4 pieces, and strategy 'ulysses' takes none"),
        (
            parallel_model(Case(attention="eager"), "odysseus", mesh),
            striped,
            "cannot be pipelined: attention: expected",
        ),
    )
    for other, part, match in refused:
        with ody.CommRecorder() as record, pytest.raises(ValueError, match=match):
            other(**part)
        assert not record.rows()
    eager = parallel_model(Case(attention="eager"), "odysseus", mesh)
    assert "attention is not pipelined: attention: expected" in ody.explain(eager)
    assert torch.equal(ody.shard_sequence(batch, eager)["input_ids"], ody.shard_sequence(batch, mesh)["input_ids"])
    with pytest.raises(ValueError, match="pipeline=4: attention cannot be pipelined"):
        ody.shard_sequence(batch, parallel_model(Case(attention="eager"), "odysseus", mesh, pipeline=4))
    auto = parallel_model(Case(), "odysseus", mesh)
    assert "8 for 65,536 tokens" in ody.explain(auto) and "shard_sequence(batch, mesh) one" in ody.explain(auto)
    assert torch.equal(ody.shard_sequence(batch, auto)["input_ids"], ody.shard_sequence(batch, mesh)["input_ids"])
    assert torch.allclose(auto(**striped).loss, expected)
    with pytest.raises(ValueError, match="pieces: expected a whole number from 1 to 64, got 0"):
        ody.shard_sequence(batch, mesh, pieces=0)
    with pytest.raises(ValueError, match="pieces: expected 1 with strategy 'tp', which"):
        ody.shard_sequence(batch, mesh, "tp", pieces=2)
    norms = parallel_model(Case(family="qwen3"), "odysseus", mesh)
    norms.model.layers[1].self_attn.q_norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="q_norm has hooks"):
        norms(**striped)
    # What is put together again is in the order of the sequence.
    whole = ody.gather_sequence(striped["input_ids"][..., None], striped, mesh)
    assert torch.equal(whole[..., 0], batch["input_ids"])


def choices_of_groups(rank: int, world: int) -> None:
    mesh, batch = make_mesh(world, 1), Case().whole_batch()
    part = ody.shard_sequence(batch, mesh, "ulysses")
    model = parallel_model(Case(), "ulysses", mesh, pipeline=5)
    # Six key/value heads of each rank: three groups are the most that are no more than five.
    assert "attention is pipelined in 3 groups of heads, as the configuration says" in ody.explain(model)
    assert torch.equal(ody.shard_sequence(batch, model)["input_ids"], part["input_ids"]), "the sequence is not striped"
    expected = model(**part).loss
    by_hand = {name: tensor for name, tensor in part.items() if name != "sequence_cut"}
    assert model(**by_hand).loss == expected
    auto = parallel_model(Case(), "ulysses", mesh)
    assert "1 for 4,096 tokens, 3 for 8,192 tokens, between hosts and where a row is one" in ody.explain(auto)
    with ody.CommRecorder() as record:
        assert torch.allclose(auto(**part).loss, expected)
    assert not record.bytes(operator="pipelined_ulysses"), "so short a sequence is not worth a pipeline"
    hooked = parallel_model(Case(family="qwen3"), "ulysses", mesh, pipeline=2)
    hooked.model.layers[1].self_attn.q_norm.register_forward_hook(lambda *_: None)
    six = Case(kv_heads=6, changes=(("num_attention_heads", 6),))
    refused = (
        (parallel_model(Case(kv_heads=2), "ulysses", mesh, pipeline=4), "one of the 2 key/value heads, .*; 1 or fewer"),
        (parallel_model(six, "ulysses", mesh, pipeline=2), "no number from 2 to 2 divides the 3 .* heads .*; 3 does"),
        (parallel_model(Case(attention="eager"), "ulysses", mesh, pipeline=2), "attention: expected"),
        (hooked, "q_norm has hooks"),
    )
    for other, match in refused:
        with ody.CommRecorder() as record, pytest.raises(ValueError, match=f"cannot be pipelined: .*{match}"):
            other(**part)
        assert not record.rows()
        with pytest.raises(ValueError, match="cannot be pipelined"):
            ody.shard_sequence(batch, other)


def by_itself(rank: int, world: int) -> None:
    """``"auto"`` takes groups of heads where nothing else changes, and elsewhere runs what runs without a pipeline."""
    mesh = make_mesh(world, 1)
    # As if these few tokens were many.
    pipelining.pick_head_groups = lambda length, heads: 2  # type: ignore[assignment]
    try:
        alone = parallel_model(Case(), "ulysses", mesh)
        with ody.CommRecorder() as record:
            alone(**ody.shard_sequence(Case().whole_batch(), alone))
        assert not record.bytes(operator="pipelined_ulysses"), "on one host there is nothing to hide"
        # And these ranks on two hosts.
        pipelining.between_hosts = lambda *_: True  # type: ignore[assignment]
        for case, taken, said in (
            (Case(), True, "between hosts and where a row is one document without masked tokens"),
            (Case(length=23), True, "in groups of heads"),  # padded at its end, where nobody looks
            (Case(dtype=torch.float64), True, "in groups of heads"),
            (Case(packed=True), False, "in groups of heads"),
            (Case(padding_mask=True), False, "in groups of heads"),
            (Case(family="mistral"), False, "it has a sliding window"),
            (Case(changes=(("attention_dropout", 0.3),)), False, "it has dropout"),
            (Case(dtype=torch.bfloat16), False, "parts in bfloat16 are added up in fp32"),
            (Case(autocast_to=torch.bfloat16), False, "in groups of heads"),  # said outside of autocast
            (Case(kv_heads=2), False, "one of the 2 key/value heads"),
            (Case(attention="eager"), False, "attention: expected"),
        ):
            results = []
            for pipeline in ("auto", None):
                model = parallel_model(case, "ulysses", mesh, pipeline=pipeline)
                if pipeline == "auto":
                    assert said in ody.explain(model), (case, ody.explain(model))
                torch.manual_seed(3)
                with ody.CommRecorder() as record, case.autocast():
                    loss = model(**ody.shard_sequence(case.whole_batch(), model)).loss
                loss.backward()
                used = record.bytes(operator="pipelined_ulysses") > 0
                assert used == (taken and pipeline == "auto"), case
                results.append([loss.detach(), *(p.grad.to_local() for p in model.parameters())])
            for one, other in zip(*results, strict=True):
                if taken:
                    # The same products in another order; gradients are far below 1.
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
                else:
                    assert torch.equal(one, other), case
        dropping = parallel_model(Case(changes=(("attention_dropout", 0.3),)), "ulysses", mesh).eval()
        assert "in groups of heads" in ody.explain(dropping), "only training drops"
    finally:
        pipelining.pick_head_groups, pipelining.between_hosts = pick_head_groups, between_hosts


def asked_once(rank: int, world: int) -> None:
    """One forward looks once through the model for how its attention is pipelined, whatever it finds."""
    batch = Case(padding_mask=True).whole_batch()
    with (
        mock.patch.object(pipelining, "_why_not", wraps=pipelining._why_not) as asked,
        mock.patch.object(pipelining, "pick_head_groups", return_value=2),
        mock.patch.object(pipelining, "between_hosts", return_value=True),
    ):
        for pipeline in ("auto", 2):
            for case in (Case(), Case(family="mistral")):
                model = parallel_model(case, "ulysses", make_mesh(world, 1), pipeline=pipeline)
                part = ody.shard_sequence(batch, model)
                asked.reset_mock()
                model(**part)
                assert asked.call_count == 1, (case, pipeline)


def narrow(rank: int, world: int, case: Case) -> dict[str, tuple[float, float]]:
    """Errors of all gradients together, relative to fp64's, in groups of heads and without a pipeline."""
    stock, batch = case.model().double(), case.whole_batch()
    stock(**batch, use_cache=False).loss.backward()
    truth = torch.cat([p.grad.flatten() for p in stock.parameters()])
    errors = []
    for pipeline in (2, None):
        model = parallel_model(case, "ulysses", make_mesh(world, 1), pipeline=pipeline)
        with case.autocast():
            loss = model(**ody.shard_sequence(batch, model)).loss
        loss.backward()
        found = torch.cat([whole(p.grad).double().flatten() for p in model.parameters()])
        errors.append(((found - truth).norm() / truth.norm()).item())
    return {"gradients": (errors[0], errors[1])}


def dropped(rank: int, world: int, strategy: str, pipeline: int) -> tuple[float, float]:
    """Loss of a step with attention dropout, and the norm of one gradient; ranks are seeded alike."""
    case = Case(changes=(("attention_dropout", 0.3),))
    model = parallel_model(case, strategy, make_mesh(world, 1), pipeline=pipeline)
    torch.manual_seed(3)
    loss = model(**ody.shard_sequence(case.whole_batch(), model)).loss
    loss.backward()
    return loss.item(), whole(model.model.layers[0].self_attn.q_proj.weight.grad).norm().item()


def checkpointed(rank: int, world: int, how: str, strategy: str) -> None:
    changes: tuple[tuple[str, Any], ...] = (("attention_dropout", 0.3),) if how == "dropout" else ()
    case = Case(kv_heads=4, changes=changes)
    found, operator = [], "pipelined_ulysses" if strategy == "ulysses" else "pipelined_attention"
    for checkpointing in (False, True):
        model = parallel_model(case, strategy, make_mesh(world, 1), pipeline=2 if strategy == "ulysses" else 4)
        if checkpointing:
            settings: dict[str, Any] = {"use_reentrant": False}
            if how == "selective":
                settings["context_fn"] = ody.selective_checkpoint
            model.gradient_checkpointing_enable(settings)
        torch.manual_seed(3)
        loss = model(**ody.shard_sequence(case.whole_batch(), model)).loss
        with ody.CommRecorder() as record:
            loss.backward()
        again = record.bytes(phase="forward", operator=operator)
        assert (again > 0) == (checkpointing and how != "selective"), again
        found.append([loss.detach(), *(p.grad.to_local() for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
