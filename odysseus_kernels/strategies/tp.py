"""TP: classical tensor parallelism, every token on every rank, an all-reduce after attention and feed-forward.

=================== =================== ===========================================================================
parameters          cut                 how they are used
=================== =================== ===========================================================================
query, key, value   rows over seq       linear; the input's gradient is all-reduced; key and value whole with fewer
                                        heads than ranks
gate, up            rows over seq       the same
output, down        columns over seq    linear -> all-reduce; bias whole
experts             over all            ZeRO-3 on a slice of the tokens, outputs gathered
head                rows over seq       each rank scores its part of the vocabulary; whole if tied or not divisible
embedding, norms    whole               on all tokens; nothing is sent
=================== =================== ===========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.head_parallel_attention import TensorParallelAttention
from odysseus_kernels.nn.mlp import TensorParallelMLP
from odysseus_kernels.strategies import parts
from odysseus_kernels.strategies.base import LayerRole, ModelShape, ModuleRole, PlacementRule, Strategy

__all__ = ["TP"]


def _placements(shape: ModelShape, group: SequenceGroup) -> Mapping[LayerRole, PlacementRule]:
    head, _ = parts.vocabulary_head(shape, group)
    return {**parts.common_placements(head), **parts.tensor_parallel_placements(shape, group)}


def _modules(shape: ModelShape, group: SequenceGroup) -> Mapping[ModuleRole, type[nn.Module]]:
    _, head = parts.vocabulary_head(shape, group)
    return {**parts.common_modules(head, "replicated"), "attention": TensorParallelAttention, "mlp": TensorParallelMLP}


TP = Strategy("tp", "replicated", parts.check_tensor_parallel, _placements, _modules)
