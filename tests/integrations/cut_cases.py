"""Batches cut in the right and in wrong ways, and losses as users call them, on ranks; many in one launch."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from family_cases import Case, data_mesh, fully_sharded, make_mesh, parallel_model, without_labels
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import default_collate

import odysseus_kernels as ody
from odysseus_kernels.nn.cut import part_positions
from odysseus_kernels.strategies import STRATEGIES

CASE = Case(kv_heads=4, length=23)
# A trainer's batch: padded at the right with token and label 0.
PAD = 0
SMOOTHING = 0.1


def other_batch(step: int = 1) -> dict[str, torch.Tensor]:
    """Another batch of the same shape."""
    return {name: tensor.roll(step, dims=1) for name, tensor in CASE.whole_batch().items()}


def padded_batch() -> dict[str, torch.Tensor]:
    """Labels are the tokens, 0 where there is none; rows of unequal length."""
    ids = CASE.whole_batch()["input_ids"].clamp(min=1)
    ids[0, -6:] = ids[1, -2:] = PAD
    return {"input_ids": ids, "labels": ids.clone()}


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A loss of one's own over whole sequences: cross-entropy with label smoothing."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=SMOOTHING)


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Whole gradients; they are cleared."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()
    model.zero_grad()
    return found


# ---- what must be the single process's number ----------------------------------------------------------------------


def stock_losses() -> dict[str, Any]:
    """Losses and gradients of the stock model, by what is called."""
    model, batch = CASE.model(), CASE.whole_batch()
    found = {}
    for name, step in {
        "plain": lambda: model(**batch).loss,
        "ignored": lambda: model(**padded_batch(), ignore_index=PAD).loss,
        "divided": lambda: model(**batch, num_items_in_batch=50).loss,
        "smoothed": lambda: smoothed(model(input_ids=batch["input_ids"]).logits, batch["labels"]),
    }.items():
        loss = step()
        loss.backward()
        found[name] = {"loss": loss.item(), "gradients": gradients_of(model)}
    found["logits"] = model(input_ids=batch["input_ids"]).logits.detach()
    return found


def losses(rank: int, world_size: int, ring: int, ways: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """The same of parallelized models, several ways for each strategy; gradients on rank 0.

    ``ways``: of each strategy, which of the WAYS to make a batch.
    """
    mesh, found = make_mesh(world_size, ring), {}
    for strategy, some in ways.items():
        model = parallel_model(CASE, strategy, mesh)
        found[strategy] = steps = {}

        def step(name: str, way: str, loss: Callable[[], torch.Tensor], steps: Any = steps, model: Any = model) -> None:
            value = loss()
            whole = {}
            if all(known.partition(":")[0] != name for known in steps):  # to put gradients together takes long
                value.backward()
                whole = gradients_of(model)
            steps[f"{name}: {way}"] = {"loss": value.item(), "gradients": whole if rank == 0 else {}}

        batch = ody.shard_sequence(CASE.whole_batch(), mesh, strategy)
        step("ignored", "pad id", lambda m=model, s=strategy: m(**cut(padded_batch(), mesh, s), ignore_index=PAD).loss)
        items = [50, torch.tensor(50), torch.tensor([50.0]), torch.full((2, 1), 50)]
        for form in items if strategy == "tp" else items[-1:]:
            step("divided", str(form), lambda m=model, b=batch, f=form: m(**b, num_items_in_batch=f).loss)
        step("plain", "rows", lambda m=model, b=batch: accumulated(m, b))
        made = {way: make(batch) for way, make in COPIES.items()} | by_hand(mesh, strategy)
        assert made.keys() == set(WAYS)
        for way in some:
            step("plain", way, lambda m=model, b=made[way]: m(**b).loss)

        def own_loss(model: Any = model, batch: Any = batch) -> torch.Tensor:
            logits = ody.gather_sequence(model(**without_labels(batch)).logits, batch, mesh)
            return smoothed(logits, CASE.whole_batch()["labels"])

        step("smoothed", "gathered logits", own_loss)
        with torch.no_grad():
            outputs = model(**without_labels(batch), output_hidden_states=True)
            steps["logits"] = ody.gather_sequence(outputs.logits, batch, mesh)
            assert ody.gather_sequence(outputs.hidden_states[-1], batch, mesh).shape[1] == CASE.length
    return found


def cut(batch: dict[str, torch.Tensor], mesh: DeviceMesh, strategy: str) -> dict[str, torch.Tensor]:
    return ody.shard_sequence(batch, mesh, strategy)


def _pickled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    buffer = io.BytesIO()
    torch.save(batch, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


COPIES: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "moved": lambda batch: {name: tensor.to("cpu", copy=True) for name, tensor in batch.items()},
    "collated": lambda batch: {name: tensor[0] for name, tensor in default_collate([batch]).items()},
    "joined": lambda batch: {name: torch.cat([tensor[:1], tensor[1:]]) for name, tensor in batch.items()},
    "without counted_tokens": lambda batch: {n: t for n, t in batch.items() if n != "counted_tokens"},
}

WAYS = (*COPIES, "positions", "declared", "declared with its length")


def accumulated(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The batch's rows one by one, each divided by the tokens of all."""
    items = int((CASE.whole_batch()["labels"][:, 1:] != -100).sum())
    rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(CASE.batch)]
    parts = [model(**row, num_items_in_batch=items).loss for row in rows]
    return torch.stack(parts).sum()


def by_hand(mesh: DeviceMesh, strategy: str) -> dict[str, dict[str, torch.Tensor]]:
    """Cut without shard_sequence: with positions that show it, and declared."""
    whole = CASE.whole_batch()
    names = mesh.mesh_dim_names or ()
    size, ring = mesh["seq"].size(), mesh["ring"].size() if "ring" in names else 1
    slices = 1 if strategy == "tp" else size
    part = mesh.get_local_rank("seq") if slices > 1 else 0
    part += slices * (mesh.get_local_rank("ring") if ring > 1 else 0)
    own = part_positions(ring * size, 1, part, 24) if strategy == "tsp" else part_positions(ring, slices, part, 24)
    ids = F.pad(whole["input_ids"], (0, 1))[:, own]
    targets = F.pad(whole["labels"][:, 1:], (0, 2), value=-100)[:, own]
    part_of_it = {"input_ids": ids, "labels": targets, "shift_labels": targets}
    return {
        "positions": {**part_of_it, "position_ids": own[None]},
        "declared": ody.declare_cut(part_of_it, mesh, strategy),
        "declared with its length": ody.declare_cut(part_of_it, mesh, strategy, length=23),
    }


def token_mean(rank: int, world_size: int, strategy: str) -> dict[str, Any]:
    """A step of two sequences, one for each data-parallel rank, as the mean over all tokens."""
    mesh = data_mesh((2, 1, 2))
    model = fully_sharded(parallel_model(CASE, strategy, mesh), mesh)
    own = mesh.get_local_rank("dp")
    rows = {name: tensor[own : own + 1] for name, tensor in padded_labels().items()}
    items = ody.num_items_in_batch(rows, mesh)
    loss = model(**ody.shard_sequence(rows, mesh, strategy), num_items_in_batch=items).loss
    loss.backward()
    gradients = gradients_of(model)
    return {"loss": loss.item(), "items": items, "gradients": gradients if rank == 0 else None}


def padded_labels() -> dict[str, torch.Tensor]:
    """Sequences with very different numbers of labels."""
    batch = CASE.whole_batch()
    batch["labels"][0, 5:] = -100
    batch["labels"][0, 1:5] = batch["input_ids"][0, 1:5]
    return batch


# ---- what must be an error -----------------------------------------------------------------------------------------


def attempt(step: Callable[[], Any]) -> list[str]:
    """[type, text] of the error, or what came out of it."""
    try:
        return ["no error", str(step())]
    except (ValueError, TypeError, ody.CommunicationError) as error:
        return [type(error).__name__, str(error)]


def refused_alike(rank: int, world_size: int, ring: int, timeout_s: float) -> dict[str, dict[str, list[str]]]:
    """What every rank finds by itself."""
    mesh, found = make_mesh(world_size, ring), {}
    other_mesh = make_mesh(world_size, 1 if ring > 1 else 2)
    whole = CASE.whole_batch()
    for strategy in STRATEGIES:
        model = parallel_model(CASE, strategy, mesh, timeout_s=timeout_s)
        batch = ody.shard_sequence(whole, mesh, strategy)
        local = whole["input_ids"][:, : batch["input_ids"].shape[1]]

        def forward(inputs: Any, model: Any = model, **settings: Any) -> list[str]:
            return attempt(lambda: model(**inputs, **settings).loss.item())

        mixed = {name: torch.cat((tensor, tensor)) for name, tensor in batch.items()}
        mixed["sequence_cut"][-1, 5] -= 1
        found[strategy] = {
            "other strategy": forward(ody.shard_sequence(whole, mesh, "odysseus" if strategy == "tp" else "tp")),
            "other mesh": forward(ody.shard_sequence(whole, other_mesh, strategy)),
            "uncut": forward({"input_ids": whole["input_ids"], "labels": whole["labels"], "shift_labels": shifted()}),
            "no positions": attempt(lambda m=model, x=local: m(input_ids=x).logits.shape),
            "popped labels": attempt(lambda m=model, b=batch: m(**{k: v for k, v in b.items() if k != "labels"})),
            "no descriptor": forward({**batch, "sequence_cut": batch["input_ids"]}),
            "mixed lengths": forward(mixed),
            "some rows": forward({**batch, "sequence_cut": batch["sequence_cut"][:1]}),
            "negative divisor": forward(batch, num_items_in_batch=-1),
            "unequal divisors": forward(batch, num_items_in_batch=torch.tensor([[3], [4]])),
            "no divisor": forward(batch, num_items_in_batch="many"),
            "fine": forward(batch),
        }
    return found


def shifted() -> torch.Tensor:
    """Labels of the whole batch, shifted but not cut."""
    return F.pad(CASE.whole_batch()["labels"][:, 1:], (0, 1), value=-100)


def refused_together(rank: int, world_size: int, ring: int, strategies: list[str]) -> dict[str, dict[str, list[str]]]:
    """What only a comparison with the other ranks shows: the last rank does something else."""
    mesh, found = make_mesh(world_size, ring), {}
    odd = rank == world_size - 1
    whole = CASE.whole_batch()
    for strategy in strategies:
        model = parallel_model(CASE, strategy, mesh)
        batch = ody.shard_sequence(whole, mesh, strategy)

        def forward(inputs: Any, model: Any = model, **settings: Any) -> list[str]:
            return attempt(lambda: model(**inputs, **settings).loss.item())

        def given(changes: dict[str, torch.Tensor], strategy: str = strategy) -> dict[str, torch.Tensor]:
            return ody.shard_sequence({**whole, **changes} if odd else whole, mesh, strategy)

        restarting = torch.cat((torch.arange(10), torch.arange(13)))[None]
        steps = itertools.count(2 if odd else 1)  # the last rank leaves out a step

        def scaled(model: Any = model, batch: Any = batch) -> None:
            (model(**batch).loss * (2.0 if odd else 1.0)).backward()

        found[strategy] = texts = {
            "other samples": forward(given(other_batch())),
            "other positions": forward(given({"position_ids": restarting})),
            "a mask": forward(given({"attention_mask": torch.ones_like(whole["input_ids"])})),
            "other labels": forward(given({"labels": whole["input_ids"]})),
            "a step left out": forward(ody.shard_sequence(other_batch(next(steps)), mesh, strategy)),
            "other divisor": forward(batch, num_items_in_batch=50 + int(odd)),
            "other ignore_index": forward(batch, ignore_index=-1 if odd else -100),
        }
        if strategy != "tp":
            another = given(other_batch())
            texts["other batch gathered"] = attempt(
                lambda b=another: ody.gather_sequence(b["input_ids"][..., None], b, mesh)
            )
        texts["scaled loss"] = attempt(scaled)
        if strategy == "tp" and ring == 1:
            local = batch["position_ids"].flip(1) if odd else batch["position_ids"]
            texts["positions changed behind the cut"] = forward({**batch, "position_ids": local})
        texts["fine"] = forward(batch)
    return found


def refused_on_some(rank: int, world_size: int, strategy: str) -> list[str]:
    """The whole batch on every rank, with its positions: those of the first rank's part fit as far as that can see."""
    mesh = make_mesh(world_size, 1)
    model = parallel_model(CASE, strategy, mesh)
    labels = shifted()
    inputs = {"input_ids": CASE.whole_batch()["input_ids"], "position_ids": torch.arange(CASE.length)[None]}
    found = attempt(lambda: model(**inputs, labels=labels, shift_labels=labels).loss.item())
    assert model(**ody.shard_sequence(CASE.whole_batch(), mesh, strategy)).loss.isfinite(), "the ranks go on together"
    return found
