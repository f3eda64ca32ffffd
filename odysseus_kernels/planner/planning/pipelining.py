"""How a plan takes the attention of a split: in pieces of the sequence, in groups of heads, or whole.

What ``integrations/pipelining.py`` decides for a model with ``OverlapConfig(pipeline=...)``, from sizes alone: rows are
one document without masked tokens, there is neither dropout nor an adapter, and batches are cut by
``shard_sequence(batch, model)``.  Where a number of pieces or groups cannot be had the package raises an error; a plan,
which looks at all strategies, then takes attention whole.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from odysseus_kernels.planner.formulas import PIPELINED
from odysseus_kernels.planner.pipeline import fit_head_groups, pick_head_groups, pick_pieces
from odysseus_kernels.planner.planning.machines import Machine
from odysseus_kernels.planner.planning.models import ModelSizes
from odysseus_kernels.planner.planning.splits import Split

__all__ = ["Form", "Pipeline", "form_of"]

Pipeline = int | Literal["auto"] | None

_WIDE = ("float32", "float64")


@dataclasses.dataclass(frozen=True)
class Form:
    """How attention is taken.

    Attributes:
        pieces: in which the sequence is gathered; 1 where it is not pipelined so.
        head_groups: of each rank's heads, as Ulysses' attention is pipelined; 1 where it is not.
    """

    pieces: int = 1
    head_groups: int = 1

    @property
    def name(self) -> str:
        """As in ``"in 8 pieces"``."""
        if self.pieces > 1:
            return f"in {self.pieces} pieces"
        return f"in {self.head_groups} groups of heads" if self.head_groups > 1 else "whole"


def form_of(
    model: ModelSizes, split: Split, machine: Machine, *, length: int, dtype: str, pipeline: Pipeline = "auto"
) -> Form:
    """How a model's attention takes sequences of ``length`` tokens under a split.

    Args:
        model, split, machine: what runs where.
        length: tokens of each sequence, padding not counted.
        dtype: of weights and activations.
        pipeline: as in :class:`~odysseus_kernels.OverlapConfig`.

    Raises:
        ValueError: ``pipeline`` is something else than a number from 1 on, ``"auto"`` or None.
    """
    if pipeline not in ("auto", None) and (isinstance(pipeline, bool) or not isinstance(pipeline, int) or pipeline < 1):
        raise ValueError(f'pipeline: expected "auto", None or a whole number above 0, got {pipeline!r}')
    if pipeline is None or split.seq == 1:
        return Form()
    if split.strategy in PIPELINED:
        return Form(pieces=pick_pieces(length // split.ring) if pipeline == "auto" else int(pipeline))
    heads = model.layer.kv_heads // split.seq
    if split.strategy != "ulysses" or split.ring > 1 or heads < 2:
        return Form()
    if pipeline != "auto":
        return Form(head_groups=fit_head_groups(int(pipeline), heads))
    # By itself only where nothing but the order changes, no kernel is slower, and there is something to hide.
    between_hosts = not machine.within_host(split.seq, split.everyone * split.dp)
    plain = machine.cpu and model.window is None and dtype in _WIDE
    padded = split.padded(length)
    return Form(head_groups=pick_head_groups(padded, heads) if plain and between_hosts else 1)
