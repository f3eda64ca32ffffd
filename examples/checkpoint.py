"""Checkpoints of a run: weights, optimizer, generator and losses, for any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

__all__ = ["latest", "load", "save"]

_PROGRESS = "progress.json"


def latest(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    # The progress file is written last: a checkpoint without it was interrupted.
    complete = [path.parent for path in folder.glob(f"step-*/{_PROGRESS}")]
    return max(complete, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def save(
    folder: Path, step: int, losses: dict[str, float], model: nn.Module, optimizer: torch.optim.Optimizer, rank: int
) -> None:
    """Writes ``folder/step-<step>``; every rank calls it."""
    target = folder / f"step-{step}"
    if rank == 0 and target.exists():
        (target / _PROGRESS).unlink(missing_ok=True)  # incomplete from now on
    dcp.save(_state(model, optimizer), checkpoint_id=target, no_dist=not dist.is_initialized())
    if rank == 0:
        unfinished = target / f"{_PROGRESS}.part"
        unfinished.write_text(json.dumps({"step": step, "losses": losses}))
        shutil.move(unfinished, target / _PROGRESS)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, float]]:
    """Restores everything from a checkpoint of any number of ranks; returns its step and the losses so far."""
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    torch.set_rng_state(state["random"])
    progress = json.loads((path / _PROGRESS).read_text())
    return progress["step"], progress["losses"]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "random": torch.get_rng_state()}
