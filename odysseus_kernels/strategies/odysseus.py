"""Odysseus: attention cut by heads between two fused operators, feed-forward networks with ZeRO-3 weights.

=================== ============ ==================================================================================
parameters          placement    how they are used
=================== ============ ==================================================================================
query, key, value   Shard(0)     all-gather -> linear; key and value replicated with fewer heads than ranks
output              Shard(1)     linear -> reduce-scatter; bias replicated
gate, up, down      Shard(0)     ZeRO-3 linear on this rank's tokens
head                Shard(0)     ZeRO-3 linear; replicated if tied to the embedding or if ranks do not divide its rows
embedding, norms    Replicate    on this rank's tokens, gradients added over the ranks
=================== ============ ==================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor import Replicate, Shard

from odysseus_kernels.nn.attention import HeadParallelAttention
from odysseus_kernels.nn.linear import Zero3Linear
from odysseus_kernels.nn.mlp import Zero3MLP
from odysseus_kernels.nn.replicated import Replicated
from odysseus_kernels.strategies.base import LayerRole, ModelShape, ModuleRole, PlacementRule, Strategy

__all__ = ["ODYSSEUS"]

_ROWS = PlacementRule(Shard(0), Shard(0))
_COLUMNS = PlacementRule(Shard(1), Replicate())
_WHOLE = PlacementRule(Replicate(), Replicate())


def _check(shape: ModelShape, size: int) -> None:
    if shape.heads % size:
        raise ValueError(
            f"expected attention heads that {size} ranks divide, got {shape.heads}: use {_divisors(shape.heads)} ranks"
        )
    if shape.kv_heads % size and size % shape.kv_heads:
        fitting = [n for n in range(1, shape.heads + 1) if shape.heads % n == 0]
        fitting = [n for n in fitting if shape.kv_heads % n == 0 or n % shape.kv_heads == 0]
        raise ValueError(
            f"expected key/value heads that {size} ranks divide or are a multiple of, got {shape.kv_heads}: use "
            f"{_either(fitting)} ranks"
        )
    for name, rows in (("intermediate size", shape.intermediate), ("hidden size", shape.hidden)):
        if rows % size:
            raise ValueError(
                f"expected {'an' if name[0] in 'aeiou' else 'a'} {name} that {size} ranks divide (rows of the ZeRO-3 "
                f"feed-forward weights), got {rows}: the next one is {rows + size - rows % size}"
            )


def _placements(shape: ModelShape, size: int) -> Mapping[LayerRole, PlacementRule]:
    key_value = _WHOLE if shape.kv_heads % size else _ROWS
    return {
        "query": _ROWS,
        "key": key_value,
        "value": key_value,
        "output": _COLUMNS,
        "gate": _ROWS,
        "up": _ROWS,
        "down": _ROWS,
        "embedding": _WHOLE,
        "norm": _WHOLE,
        "head": _ROWS if _cuts_head(shape, size) else _WHOLE,
    }


def _modules(shape: ModelShape, size: int) -> Mapping[ModuleRole, type[nn.Module]]:
    return {
        "attention": HeadParallelAttention,
        "mlp": Zero3MLP,
        "embedding": Replicated,
        "norm": Replicated,
        "head": Zero3Linear if _cuts_head(shape, size) else Replicated,
    }


def _cuts_head(shape: ModelShape, size: int) -> bool:
    return not shape.tied and shape.vocabulary % size == 0


def _divisors(number: int) -> str:
    return _either([n for n in range(1, number + 1) if number % n == 0])


def _either(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


ODYSSEUS = Strategy("odysseus", _check, _placements, _modules)
