"""Batches with masks, packed documents, windows and rotations that depend on the length: stock, and on ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from family_cases import Case, make_mesh, parallel_model, without_labels

from odysseus_kernels.nn.sequence import shard_sequence


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch of a :class:`Run`.

    Attributes:
        length: of each sequence.
        mask: "" for none; "ones"; "mixed": a row padded at the left, one with holes, one padded at the right, a full
            one; "all_labels": the same, with labels on what is masked, too.
        documents: lengths of packed documents.
        set: attributes of the configuration that are changed before this batch.
    """

    length: int = 24
    mask: str = ""
    documents: tuple[int, ...] = ()
    set: tuple[tuple[str, Any], ...] = ()

    def tensors(self, rows: int = 4) -> dict[str, torch.Tensor]:
        """The batch that every rank has."""
        generator = torch.Generator().manual_seed(self.length)
        ids = torch.randint(120, (rows, self.length), generator=generator)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if self.documents:
            positions = torch.cat([torch.arange(n) for n in self.documents])
            batch["position_ids"] = positions.expand(rows, -1).clone()
        if self.mask:
            mask = torch.ones_like(ids)
            if self.mask != "ones":
                mask[0, :9] = 0
                mask[1, 3:6] = mask[1, 11] = mask[1, 15:17] = 0
                mask[2, -5:] = 0
            if self.mask != "all_labels":
                batch["labels"][mask == 0] = -100
            batch["attention_mask"] = mask
        return batch


@dataclasses.dataclass(frozen=True)
class Run:
    """A model and the batches that it sees one after another; gradients are those of the last."""

    case: Case
    batches: tuple[Batch, ...]


def stock_run(run: Run) -> list[dict[str, Any]]:
    """Losses (the router's, too), logits and gradients of the stock model for each batch."""
    return _steps(run, run.case.model(), lambda batch: batch, dict)


def parallel_runs(rank: int, world_size: int, runs: list[tuple[Run, str]], ring: int) -> list[list[dict[str, Any]]]:
    """The same of parallelized models: logits of this rank's tokens and where they lie, gradients on rank 0."""
    mesh, found = make_mesh(world_size, ring), []
    for run, strategy in runs:
        model = parallel_model(run.case, strategy, mesh)

        def whole(gradients: dict[str, Any]) -> dict[str, torch.Tensor]:
            full = {name: gradient.full_tensor() for name, gradient in gradients.items()}
            return full if rank == 0 else {}

        steps = _steps(run, model, lambda batch, strategy=strategy: shard_sequence(batch, mesh, strategy), whole)
        for step, batch in zip(steps, run.batches, strict=True):
            counts = torch.arange(batch.length)[None]
            step["where"] = shard_sequence({"input_ids": counts, "position_ids": counts}, mesh, strategy)[
                "position_ids"
            ][0]
        found.append(steps)
    return found


def _steps(run: Run, model: Any, cut: Any, whole: Any) -> list[dict[str, Any]]:
    found = []
    for batch in run.batches:
        for name, value in batch.set:
            setattr(model.config, name, list(value) if isinstance(value, tuple) else value)
        inputs = cut(batch.tensors())
        last = batch is run.batches[-1]
        with torch.set_grad_enabled(last):
            out = model(**inputs, use_cache=False)
        if last:
            out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            logits = model(**without_labels(inputs), use_cache=False).logits
        found.append(
            {
                "losses": [loss.item() for loss in (out.loss, getattr(out, "aux_loss", None)) if loss is not None],
                "logits": logits,
                "gradients": whole(gradients),
            }
        )
    return found


def refusals(rank: int, world_size: int, case: Case, changes: list[tuple[str, Any]], ring: int) -> list[str]:
    """What a forward says after each change of the configuration, which is undone."""
    mesh, found = make_mesh(world_size, ring), []
    model = parallel_model(case, "odysseus", mesh)
    batch = shard_sequence(Batch().tensors(), mesh)
    for name, value in changes:
        before = getattr(model.config, name, True)  # stock reads is_causal like this
        setattr(model.config, name, value)
        try:
            model(**batch)
            found.append("nothing was raised")
        except ValueError as error:
            found.append(str(error))
        setattr(model.config, name, before)
    assert torch.isfinite(model(**batch).loss), "the ranks go on together"
    return found
