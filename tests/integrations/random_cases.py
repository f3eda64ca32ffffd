"""Random ways to use a parallelized model, right and wrong: what each rank gets, and whether the ranks can go on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from typing import Any

import torch
from family_cases import Case, make_mesh, packed_positions, parallel_model, whole

import odysseus_kernels as ody

ONE_LAYER = (("num_hidden_layers", 1),)
TIMEOUT_S = 20.0
RIGHT = Case(kv_heads=4, changes=ONE_LAYER)

SORTS = (
    "right",
    "other_class",
    "uncut",
    "uncut_with_positions",
    "by_hand",
    "by_hand_with_positions",
    "no_description",
    "other_samples",
    "lacks_mask",
    "bad_token",
    "bad_label",
    "other_items",
    "ignore_index",
    "user_error",
    "labels_taken",
    "skips_a_step",
    "cut_twice",
)
"""What is done; ``right`` and ``ignore_index`` must give the single process's number, the others that or an error."""


@dataclasses.dataclass(frozen=True)
class Use:
    """One step: a batch, and what is done with it, on one rank (``odd``) or on all."""

    sort: str
    strategy: str
    ring: int
    length: int
    rows: int
    mask: str  # "none", "left", "right" or "holes"
    packed: bool
    items: str  # "none", "int", "tensor" or "vector"
    odd: int
    seed: int

    def whole(self) -> dict[str, torch.Tensor]:
        """The batch that every rank should have."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.length)
        ids = torch.randint(1, 120, shape, generator=generator)
        labels = ids.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100)
        labels[:, -1] = ids[:, -1]
        batch = {"input_ids": ids, "labels": labels}
        if self.mask != "none":
            mask = torch.ones(shape, dtype=torch.int64)
            few = max(1, self.length // 4)
            if self.mask == "left":
                mask[0, :few] = 0
            elif self.mask == "right":
                mask[0, -few:] = 0
            else:
                mask[0, 1 : 1 + few] = 0
            batch["attention_mask"], batch["labels"] = mask, labels.masked_fill(mask == 0, -100)
        elif self.packed and self.length > 5 and self.sort != "by_hand":  # which gives no positions
            batch["position_ids"] = packed_positions(self.length).expand(shape).clone()
        if self.sort == "ignore_index":
            batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, 0)
        return batch

    def settings(self) -> dict[str, Any]:
        """Further arguments of the model."""
        given: dict[str, Any] = {"ignore_index": 0} if self.sort == "ignore_index" else {}
        made = {"none": None, "int": 13, "tensor": torch.tensor(13), "vector": torch.tensor([13])}[self.items]
        return given if made is None else {**given, "num_items_in_batch": made}


@functools.cache
def _model(strategy: str, world: int, ring: int) -> Any:
    return parallel_model(RIGHT, strategy, make_mesh(world, ring), timeout_s=TIMEOUT_S)


def _given(use: Use, mesh: Any, rank: int, world: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of this rank's call."""
    batch, settings, odd = use.whole(), use.settings(), rank == use.odd % world
    if use.sort == "other_samples" and odd:
        batch["input_ids"] = batch["input_ids"].roll(1, 1)
    if use.sort == "skips_a_step" and odd:
        batch = dataclasses.replace(use, seed=use.seed + 1).whole()
    if use.sort == "bad_token" and odd:
        batch["input_ids"] = batch["input_ids"].clone()
    if use.sort == "other_items" and odd:
        settings["num_items_in_batch"] = 14
    other = "tp" if use.strategy != "tp" else "odysseus"
    part = ody.shard_sequence(batch, mesh, other if use.sort == "other_class" else use.strategy)
    slices = world if use.strategy != "tp" else use.ring
    if use.sort.startswith("uncut"):
        part = {**batch, "shift_labels": torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)}
        if use.sort == "uncut_with_positions":
            part.setdefault("position_ids", torch.arange(use.length).expand(use.rows, -1))
    if use.sort.startswith("by_hand"):
        place = rank if use.strategy != "tp" else mesh.get_local_rank("ring") if use.ring > 1 else 0
        shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        part = {**batch, "labels": shifted, "shift_labels": shifted}
        if use.sort == "by_hand_with_positions" and "position_ids" not in part:
            part["position_ids"] = torch.arange(use.length).expand(use.rows, -1)
        if use.sort == "by_hand":
            part.pop("position_ids", None)
        part = {name: t.tensor_split(slices, 1)[place] for name, t in part.items()}
    if use.sort == "no_description":
        part.pop("sequence_cut")
    if use.sort == "lacks_mask" and odd:
        part.pop("attention_mask", None)
    if use.sort == "bad_token" and odd:
        part["input_ids"][0, 0] = 120
    if use.sort == "bad_label" and odd:
        part["shift_labels"][0, 0] = part["labels"][0, 0] = 777
    if use.sort == "labels_taken":
        part.pop("labels")
    if use.sort == "cut_twice":
        part = ody.shard_sequence(part, mesh, use.strategy)
    return part, settings


def run(rank: int, world: int, uses: list[Use]) -> list[dict[str, Any]]:
    """For each use what this rank got: a loss with the norms of gradients, or an error; then a right step."""
    found = []
    for use in uses:
        mesh, model = make_mesh(world, use.ring), _model(use.strategy, world, use.ring)
        begin, got = time.monotonic(), {}
        try:
            part, settings = _given(use, mesh, rank, world)
            with ody.step(model):
                if use.sort == "user_error" and rank == use.odd % world:
                    raise ZeroDivisionError("of the user's")
                loss = model(**part, **settings).loss
                if loss is not None:
                    loss.backward()
            norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))
            got = {
                "loss": float("nan") if loss is None else loss.item(),
                "norm": norm.item(),
            }
        except Exception as error:  # noqa: BLE001 - what is looked for
            got = {"error": f"{type(error).__name__}: {error}"[:300], "lasting": bool(getattr(error, "lasting", False))}
        got["seconds"] = time.monotonic() - begin
        model.zero_grad()
        with contextlib.suppress(Exception):
            got["next"] = model(**ody.shard_sequence(RIGHT.whole_batch(), mesh, use.strategy)).loss.item()
        found.append(got)
    return found
