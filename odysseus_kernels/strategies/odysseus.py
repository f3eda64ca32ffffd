"""Odysseus: attention cut by heads between two fused operators, feed-forward networks with ZeRO-3 weights.

=================== =================== ===========================================================================
parameters          cut                 how they are used
=================== =================== ===========================================================================
query, key, value   rows over seq       all-gather -> linear; key and value whole with fewer heads than ranks
output              columns over seq    linear -> reduce-scatter; bias whole
gate, up, down      rows over all       ZeRO-3 linear on this rank's tokens; experts likewise
head                rows over all       ZeRO-3 linear; whole if tied to the embedding or if ranks do not divide it
embedding, norms    whole               on this rank's tokens, gradients added over the ranks
=================== =================== ===========================================================================

"All" are the ranks of ring and seq; what is cut over seq alone has copies on the ring.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.head_parallel_attention import HeadParallelAttention
from odysseus_kernels.nn.mlp import Zero3MLP
from odysseus_kernels.strategies import parts
from odysseus_kernels.strategies.base import LayerRole, ModelShape, ModuleRole, PlacementRule, Strategy

__all__ = ["ODYSSEUS"]


def _check(shape: ModelShape, group: SequenceGroup) -> None:
    parts.check_heads(shape, group.size)
    parts.check_zero3_mlp(shape, group)


def _placements(shape: ModelShape, group: SequenceGroup) -> Mapping[LayerRole, PlacementRule]:
    head, _ = parts.zero3_head(shape, group)
    rows = parts.ZERO3_ROWS
    attention = parts.head_parallel_placements(shape, group)
    return {**parts.common_placements(head), **attention, "gate": rows, "up": rows, "down": rows}


def _modules(shape: ModelShape, group: SequenceGroup) -> Mapping[ModuleRole, type[nn.Module]]:
    _, head = parts.zero3_head(shape, group)
    return {**parts.common_modules(head), "attention": HeadParallelAttention, "mlp": Zero3MLP}


ODYSSEUS = Strategy("odysseus", "sharded", _check, _placements, _modules)
