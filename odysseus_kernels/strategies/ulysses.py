"""DeepSpeed-Ulysses: tokens are exchanged for heads by all-to-alls around attention; all weights are ZeRO-3.

=================== =================== ===========================================================================
parameters          cut                 how they are used
=================== =================== ===========================================================================
query, key, value   rows over all       ZeRO-3 linear -> all-to-all, head group by head group
output              columns over all    all-to-all -> ZeRO-3 linear; the bias is cut, too
gate, up, down      rows over all       ZeRO-3 linear on this rank's tokens; experts likewise
head                rows over all       ZeRO-3 linear; whole if tied to the embedding or if ranks do not divide it
embedding, norms    whole               on this rank's tokens, gradients added over the ranks
=================== =================== ===========================================================================

"All" are the ranks of ring and seq. With one rank of seq this is Ring attention with ZeRO-3 weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.mlp import Zero3MLP
from odysseus_kernels.nn.zero3_attention import UlyssesAttention
from odysseus_kernels.strategies import parts
from odysseus_kernels.strategies.base import LayerRole, ModelShape, ModuleRole, PlacementRule, Strategy

__all__ = ["ULYSSES"]


def _check(shape: ModelShape, group: SequenceGroup) -> None:
    parts.check_heads(shape, group.size)
    parts.check_zero3_attention(shape, group)
    parts.check_zero3_mlp(shape, group)


def _placements(shape: ModelShape, group: SequenceGroup) -> Mapping[LayerRole, PlacementRule]:
    head, _ = parts.zero3_head(shape, group)
    roles: tuple[LayerRole, ...] = ("query", "key", "value", "gate", "up", "down")
    return {
        **parts.common_placements(head),
        **dict.fromkeys(roles, parts.ZERO3_ROWS),
        "output": parts.ZERO3_COLUMNS,
    }


def _modules(shape: ModelShape, group: SequenceGroup) -> Mapping[ModuleRole, type[nn.Module]]:
    _, head = parts.zero3_head(shape, group)
    return {**parts.common_modules(head), "attention": UlyssesAttention, "mlp": Zero3MLP}


ULYSSES = Strategy("ulysses", "sharded", _check, _placements, _modules)
