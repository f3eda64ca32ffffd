"""What each rank sends in a step under a split: ``planner/formulas.py`` added up over a model, and data parallelism.

fully_shard is PyTorch's, and the recorder does not see it: its weights are gathered in forward and in backward, and
their gradients reduced, (dp − 1)/dp of this rank's elements each.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from odysseus_kernels.planner.formulas import Traffic, head_traffic, replicated_traffic, traffic
from odysseus_kernels.planner.planning.models import ModelSizes
from odysseus_kernels.planner.planning.split_memory import LayerElements
from odysseus_kernels.planner.planning.splits import Split
from odysseus_kernels.planner.ring import busiest_peers

__all__ = ["StepTraffic", "step_traffic"]

FULLY_SHARD = "fully_shard"
"""Operator under which data parallelism's bytes are listed."""


@dataclasses.dataclass(frozen=True)
class StepTraffic:
    """Bytes that each rank sends in one step, by (phase, operator, collective).

    Attributes:
        layer: of one decoder layer, as :func:`~odysseus_kernels.planner.formulas.traffic` has it.
        ends: of embedding, last norm, head and loss.
        data_parallel: of fully_shard over dp, for one layer.
        data_parallel_ends: the same for embedding and head.
        layers: decoder layers.
    """

    layer: Traffic
    ends: Traffic
    data_parallel: Traffic
    data_parallel_ends: Traffic
    layers: int

    @property
    def total(self) -> int:
        """Bytes of the whole step."""
        return sum(self.by_collective().values())

    def by_collective(self) -> dict[str, int]:
        """Bytes of the whole step by collective."""
        sums: Counter[str] = Counter()
        for part, times in (
            (self.layer, self.layers),
            (self.data_parallel, self.layers),
            (self.ends, 1),
            (self.data_parallel_ends, 1),
        ):
            for (_, _, collective), count in part.items():
                sums[collective] += times * count
        return dict(sorted(sums.items()))


def step_traffic(
    model: ModelSizes,
    split: Split,
    elements: LayerElements,
    *,
    tokens: int,
    element_size: int,
    checkpointing: bool,
    length: int | None = None,
) -> StepTraffic:
    """Bytes of a step in which the ranks that share them take ``tokens`` of batch and sequence.

    With ``length``, of one sequence with its padding, ring ranks do not send what the model's window hides: bytes are
    then those of the rank that sends most.

    A pipelined attention block sends the same bytes as its two projections, under whose names they stand here.
    """
    shape = model.layer
    strategy, seq, ring = split.strategy, split.seq, split.ring
    if model.experts:
        # Experts are ZeRO-3 under every strategy, together a feed-forward network of all their widths.
        shape = dataclasses.replace(shape, intermediate=shape.intermediate * model.experts)
        strategy = "odysseus" if strategy == "tp_sp" else strategy
    zigzag = split.everyone if strategy == "tsp" else ring
    peers = None if length is None else busiest_peers(zigzag, length, model.window, element_size)
    layer = dict(
        traffic(
            shape,
            strategy,
            seq,
            tokens=tokens,
            ring=ring,
            element_size=element_size,
            checkpointing=checkpointing,
            ring_peers=peers,
        )
    )
    sizes = {"ring": ring, "element_size": element_size}
    if model.experts:
        _add(layer, replicated_traffic(model.experts * shape.hidden, strategy, seq, **sizes))
    ends: Traffic = {}
    for _ in range(2 if shape.norm_bias else 1):
        _add(ends, replicated_traffic(shape.hidden, split.strategy, seq, **sizes))
    _add(ends, replicated_traffic(model.vocabulary * shape.hidden, split.strategy, seq, **sizes))
    head = head_traffic(model.vocabulary, shape.hidden, split.strategy, seq, tokens=tokens, tied=model.tied, **sizes)
    _add(ends, head)
    return StepTraffic(
        layer,
        ends,
        _fully_shard(elements.layer, split.dp, element_size),
        _fully_shard(elements.ends, split.dp, element_size),
        model.layers,
    )


def _add(total: Traffic, part: Traffic) -> None:
    for key, count in part.items():
        total[key] = total.get(key, 0) + count


def _fully_shard(elements: int, dp: int, element_size: int) -> Traffic:
    if dp == 1:
        return {}
    sent = (dp - 1) * -(-elements // dp) * element_size
    return {
        ("forward", FULLY_SHARD, "all_gather"): sent,
        ("backward", FULLY_SHARD, "all_gather"): sent,
        ("backward", FULLY_SHARD, "reduce_scatter"): sent,
    }
