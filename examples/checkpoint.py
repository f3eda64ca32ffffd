"""Checkpoints of a run: weights, optimizer, generator and losses, for any number of ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import odysseus_kernels as ody

__all__ = ["latest", "load", "save"]

_COMPLETE = "checkpoint.json"


def latest(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    steps = [path.parent for path in folder.glob(f"step-*/{_COMPLETE}") if path.parent.suffix == ""]
    return max(steps, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def save(folder: Path, step: int, losses: dict[str, float], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes ``folder/step-<step>``; every rank calls it."""
    extra = {"step": step, "losses": losses, "random": torch.get_rng_state()}
    ody.save_checkpoint(folder / f"step-{step}", model, optimizer, extra=extra)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, float]]:
    """Restores everything from a checkpoint of any number of ranks; returns its step and the losses so far."""
    extra = ody.load_checkpoint(path, model, optimizer)
    torch.set_rng_state(extra["random"])
    return extra["step"], extra["losses"]
