"""What the checks of :func:`odysseus_kernels.verify` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.integrations.verify.models import Batch, Pass, Step
from odysseus_kernels.integrations.verify.observe import assemble
from odysseus_kernels.nn.cut import KEY, SequenceCut
from odysseus_kernels.nn.group import SequenceGroup

__all__ = ["Trial", "listed"]

# fp32: sums in another order; measured 1e-7 to 1e-6 on two layers.  A mistake is a per cent or more.
_BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_LOSS_BOUNDS = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_MOST_NAMES = 4


def listed(names: list[str], between: str = ", ") -> str:
    """The first few names, for a message."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return between.join(names[:_MOST_NAMES]) + more


@dataclasses.dataclass
class Trial:
    """What the checks share; everything of the single process is the leader's alone.

    Attributes:
        group: the ranks that share the sequence.
        strategy: name of the strategy.
        subject: the parallelized model.
        reference: the single process's model; None except on the leader.
        whole, part: the whole batch, and this rank's part.
        cut: turns a whole batch into this rank's part.
        names: of the parts that are observed.
        step: gives the loss.
        gradients: error and scale of every gradient, once known.
        found, truth: the first forward of both.
        loss_found, loss_truth: of the step.
        record: what the step sent.
    """

    group: SequenceGroup
    strategy: str
    subject: nn.Module
    reference: nn.Module | None
    whole: Batch
    part: Batch
    cut: Callable[[Batch], Batch]
    names: list[str]
    step: Step
    gradients: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    found: Pass | None = None
    truth: Pass | None = None
    loss_found: torch.Tensor | None = None
    loss_truth: torch.Tensor | None = None
    record: CommRecorder | None = None

    @property
    def dtype(self) -> torch.dtype:
        return next(p for p in self.subject.parameters() if p.is_floating_point()).dtype

    @property
    def bound(self) -> float:
        return _BOUNDS[self.dtype]

    @property
    def loss_bound(self) -> float:
        return _LOSS_BOUNDS[self.dtype]

    @property
    def length(self) -> int:
        return int(self.whole["input_ids"].shape[1])

    @property
    def ranks(self) -> dict[str, int]:
        group = self.group
        return {"seq and ring": group.every_size, "seq": group.size, "ring": group.ring_size}

    @property
    def counts(self) -> torch.Tensor:
        """bool [B, L]: tokens, not padding."""
        mask = self.whole.get("attention_mask")
        return torch.ones_like(self.whole["input_ids"], dtype=torch.bool) if mask is None else mask.bool()

    def put_together(self, seen: Pass) -> Pass:
        """A pass of the ranks as the single process would have it."""
        parts = {name: self.assemble(seen.parts[name]) for name in self.names if name in seen.parts}
        return Pass(self.assemble(seen.logits), parts)

    @property
    def pieces(self) -> int:
        """In which the batch is striped; 1 where it does not say how it was cut."""
        return SequenceCut.read(self.part[KEY]).pieces if KEY in self.part else 1

    def assemble(self, local: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] on every rank, of this rank's part [B, s, ...]."""
        return assemble(local, self.group, self.length, self.pieces)
