"""Bytes of a layer whose feed-forward network is computed in tiles, with and without activation checkpointing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from typing import Any

from family_cases import Case, make_mesh, parallel_model
from torch.utils.checkpoint import set_checkpoint_early_stop

from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.nn.sequence import shard_sequence


def bytes_of_a_layer(
    rank: int, world_size: int, case: Case, strategy: str, ring: int, settings: dict[str, Any], checkpointed: bool
) -> dict[tuple[str, str, str], int]:
    """What one more layer sends in a step, by phase, operator and collective; checkpoints stop early, as they do."""
    counts = []
    for layers in (1, 2):
        deep = dataclasses.replace(case, changes=(*case.changes, ("num_hidden_layers", layers)))
        model = parallel_model(deep, strategy, make_mesh(world_size, ring), **settings)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # Without tiles a checkpoint that stops early leaves out what the formula counts.
        tiled = settings.get("tile_rows") is not None
        with CommRecorder() as record, contextlib.nullcontext() if tiled else set_checkpoint_early_stop(False):
            model(**shard_sequence(case.whole_batch(), model)).loss.backward()
        counts.append(Counter({(r["phase"], r["operator"], r["collective"]): r["bytes"] for r in record.rows()}))
    counts[1].subtract(counts[0])
    return {key: count for key, count in counts[1].items() if count}
