"""What strategies are built from: rules for parameters, checks of sizes, and the parts that several share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import nn

from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.linear import VocabParallelLinear, Zero3Linear
from odysseus_kernels.nn.moe import SplitTokensExperts, Zero3Experts, check_experts
from odysseus_kernels.nn.parameters import Cut
from odysseus_kernels.nn.replicated import Replicated, ReplicatedHeadNorm
from odysseus_kernels.strategies.base import LayerRole, ModelShape, ModuleRole, PlacementRule

__all__ = [
    "ZERO3_COLUMNS",
    "ZERO3_ROWS",
    "check_divides",
    "check_heads",
    "check_tensor_parallel",
    "check_zero3_attention",
    "check_zero3_mlp",
    "common_modules",
    "common_placements",
    "head_parallel_placements",
    "tensor_parallel_placements",
    "vocabulary_head",
    "zero3_head",
]

# Tensor parallelism: rows (a bias with them) or columns (the bias whole) over seq.
ROWS = PlacementRule(Cut(0), Cut(0))
COLUMNS = PlacementRule(Cut(1), Cut())
# ZeRO-3: over all ranks that share the sequence.
ZERO3_ROWS = PlacementRule(Cut(0, "everyone"), Cut(0, "everyone"))
ZERO3_COLUMNS = PlacementRule(Cut(1, "everyone"), Cut(0, "everyone"))
WHOLE = PlacementRule(Cut(), Cut())


def check_heads(shape: ModelShape, size: int) -> None:
    """ValueError where ``size`` ranks cannot share the heads; says how many could."""
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


def check_divides(name: str, rows: int, ranks: int, what: str) -> None:
    """ValueError where ``ranks`` do not divide ``rows``; names the next size that they would divide."""
    if rows % ranks:
        raise ValueError(
            f"expected {'an' if name[0] in 'aeiou' else 'a'} {name} that {ranks} ranks divide ({what}), got {rows}: "
            f"the next one is {rows + ranks - rows % ranks}"
        )


def check_zero3_attention(shape: ModelShape, group: SequenceGroup) -> None:
    """ValueError where all ranks cannot share the rows of query, key and value weights."""
    for name, heads in (("query", shape.heads), ("key/value", shape.kv_heads)):
        check_divides(
            f"{name} projection", heads * shape.head_dim, group.every_size, "rows of the ZeRO-3 attention weights"
        )


def check_zero3_mlp(shape: ModelShape, group: SequenceGroup) -> None:
    """ValueError where all ranks cannot share the rows of a feed-forward network, or its experts."""
    if shape.experts:
        check_experts(shape.experts, group.every_size)
    what = "rows of the ZeRO-3 feed-forward weights"
    if not shape.experts:
        check_divides("intermediate size", shape.intermediate, group.every_size, what)
    check_divides("hidden size", shape.hidden, group.every_size, what)


def check_tensor_parallel(shape: ModelShape, group: SequenceGroup) -> None:
    """ValueError where the ranks of seq cannot share heads and the intermediate size."""
    check_heads(shape, group.size)
    if shape.experts:
        check_experts(shape.experts, group.every_size)
    if not shape.experts:
        check_divides("intermediate size", shape.intermediate, group.size, "cut over tensor-parallel ranks")


def head_parallel_placements(shape: ModelShape, group: SequenceGroup) -> dict[LayerRole, PlacementRule]:
    """Attention with columns and rows over seq; key and value whole with fewer heads than ranks."""
    key_value = WHOLE if shape.kv_heads % group.size else ROWS
    return {"query": ROWS, "key": key_value, "value": key_value, "output": COLUMNS}


def tensor_parallel_placements(shape: ModelShape, group: SequenceGroup) -> dict[LayerRole, PlacementRule]:
    """Attention and feed-forward network with rows and columns over seq."""
    return {**head_parallel_placements(shape, group), "gate": ROWS, "up": ROWS, "down": COLUMNS}


def common_placements(head: PlacementRule) -> dict[LayerRole, PlacementRule]:
    """What no strategy cuts, experts, which all cut alike, and the head where it is cut by ``head``."""
    return {
        "experts": ZERO3_ROWS,
        "router": WHOLE,
        "embedding": WHOLE,
        "norm": WHOLE,
        "head_norm": WHOLE,
        "head": head,
    }


def common_modules(
    head: type[nn.Module], tokens: Literal["sharded", "replicated"] = "sharded"
) -> Mapping[ModuleRole, type[nn.Module]]:
    """Classes of the same parts."""
    return {
        "experts": Zero3Experts if tokens == "sharded" else SplitTokensExperts,
        "router": Replicated,
        "embedding": Replicated,
        "norm": Replicated,
        "head_norm": ReplicatedHeadNorm,
        "head": head,
    }


def zero3_head(shape: ModelShape, group: SequenceGroup) -> tuple[PlacementRule, type[nn.Module]]:
    """A head cut over all ranks, on each rank's tokens; whole if tied to the embedding or if ranks do not divide it."""
    if shape.tied or shape.vocabulary % group.every_size:
        return WHOLE, Replicated
    return ZERO3_ROWS, Zero3Linear


def vocabulary_head(shape: ModelShape, group: SequenceGroup) -> tuple[PlacementRule, type[nn.Module]]:
    """A head whose vocabulary is cut over seq; whole if tied to the embedding or if ranks do not divide it."""
    if shape.tied or shape.vocabulary % group.size:
        return WHOLE, Replicated
    return ROWS, VocabParallelLinear


def _divisors(number: int) -> str:
    return _either([n for n in range(1, number + 1) if number % n == 0])


def _either(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
