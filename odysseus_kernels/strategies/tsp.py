"""TSP: tensor and sequence parallelism folded on the same ranks: each has a part of the weights and of the tokens.

=================== =================== ===========================================================================
parameters          cut                 how they are used
=================== =================== ===========================================================================
query, key, value   rows over all       ZeRO-3 linear on this rank's tokens; then keys and values of all ranks come
                                        to this rank's queries
output              rows over all       ZeRO-3 linear on this rank's tokens
gate, up, down      rows over all       ZeRO-3 linear on this rank's tokens; experts likewise
head                rows over all       ZeRO-3 linear; whole if tied to the embedding or if ranks do not divide it
embedding, norms    whole               on this rank's tokens, gradients added over the ranks
=================== =================== ===========================================================================

"All" are the ranks of ring and seq, one ring: the sequence is cut in zigzag order over them, which balances causal
attention, and Ring attention brings keys and values of all heads, unrepeated, from each rank to every other one:
gathered first (``mode="unfused"``) or attended to as they arrive.  Nothing gathered is kept: backward gathers again.
Heads need not divide by the ranks.  A dimension "ring" changes nothing but how ranks are numbered, and Ulysses on a
mesh with one rank of seq sends the same.

After "Folding Tensor and Sequence Parallelism for Memory-Efficient Transformer Training & Inference"
(arXiv:2604.26294), which gathers keys and values, cuts in zigzag order and circulates weights likewise.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.mlp import Zero3MLP
from odysseus_kernels.nn.zero3_attention import FoldedAttention
from odysseus_kernels.strategies import parts
from odysseus_kernels.strategies.base import LayerRole, ModelShape, ModuleRole, PlacementRule, Strategy

__all__ = ["TSP"]


def _check(shape: ModelShape, group: SequenceGroup) -> None:
    parts.check_zero3_attention(shape, group)
    parts.check_zero3_mlp(shape, group)


def _placements(shape: ModelShape, group: SequenceGroup) -> Mapping[LayerRole, PlacementRule]:
    head, _ = parts.zero3_head(shape, group)
    roles: tuple[LayerRole, ...] = ("query", "key", "value", "output", "gate", "up", "down")
    return {**parts.common_placements(head), **dict.fromkeys(roles, parts.ZERO3_ROWS)}


def _modules(shape: ModelShape, group: SequenceGroup) -> Mapping[ModuleRole, type[nn.Module]]:
    _, head = parts.zero3_head(shape, group)
    return {**parts.common_modules(head), "attention": FoldedAttention, "mlp": Zero3MLP}


TSP = Strategy("tsp", "sharded", _check, _placements, _modules, folded=True)
