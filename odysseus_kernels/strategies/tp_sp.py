"""TP-SP: tensor parallelism with sequence parallelism, as Megatron does it.

=================== =================== ===========================================================================
parameters          cut                 how they are used
=================== =================== ===========================================================================
query, key, value   rows over seq       all-gather -> linear; key and value whole with fewer heads than ranks
gate, up            rows over seq       all-gather -> linear, one gather for both
output, down        columns over seq    linear -> reduce-scatter; bias whole
experts             over all            ZeRO-3 on this rank's tokens
head                rows over seq       each rank scores its part of the vocabulary; whole if tied or not divisible
embedding, norms    whole               on this rank's tokens, gradients added over the ranks
=================== =================== ===========================================================================

With ``gathered="regather"`` a rank keeps 1/N of the activations; ``"save"`` keeps what was gathered, as Megatron does.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.head_parallel_attention import HeadParallelAttention
from odysseus_kernels.nn.mlp import SequenceParallelMLP
from odysseus_kernels.strategies import parts
from odysseus_kernels.strategies.base import LayerRole, ModelShape, ModuleRole, PlacementRule, Strategy

__all__ = ["TP_SP"]


def _placements(shape: ModelShape, group: SequenceGroup) -> Mapping[LayerRole, PlacementRule]:
    head, _ = parts.vocabulary_head(shape, group)
    return {**parts.common_placements(head), **parts.tensor_parallel_placements(shape, group)}


def _modules(shape: ModelShape, group: SequenceGroup) -> Mapping[ModuleRole, type[nn.Module]]:
    _, head = parts.vocabulary_head(shape, group)
    return {**parts.common_modules(head), "attention": HeadParallelAttention, "mlp": SequenceParallelMLP}


TP_SP = Strategy("tp_sp", "sharded", parts.check_tensor_parallel, _placements, _modules)
