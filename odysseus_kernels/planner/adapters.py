"""What one decoder layer sends when low-rank adapters of its projections are trained and its own weights are frozen.

Symbols as in formulas.py; r is the rank of the adapters, A [r, K] and B [n, r] those of a projection [n, K].

============================================ =====================================================================
frozen weights                               as formulas.py says, without gradients of weights and norms: no
                                             reduce_scatter of ZeRO-3 weights, nothing over the ring; and where the
                                             input of a projection is gathered, backward does not gather it again
projections of own tokens (ZeRO-3)           nothing
column-parallel, and Ulysses' first ones     all_gather, in backward reduce_scatter and all_gather of [T, 3r] (in a
                                             feed-forward network 2r or r); tp: all_reduce in backward
row-parallel, and Ulysses' output            reduce_scatter, in backward all_gather of [T, r]; tp: all_reduce in
                                             forward
gradients of A and B                         all_reduce of r * K and n * r, all together
============================================ =====================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Literal

from odysseus_kernels.planner.formulas import LayerShape, Ledger, Traffic, _gathered, _scattered, traffic

__all__ = ["PROJECTIONS", "frozen_traffic", "lora_traffic"]

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
"""Projections of a decoder layer by role; all of them are what PEFT calls ``"all-linear"``."""

_WEIGHTS = ("zero3_linear", "linear_all_to_all", "all_to_all_linear")
_COLUMN_PARALLEL = ("query", "key", "value", "gate", "up")


def frozen_traffic(sent: Traffic) -> Traffic:
    """What is left of a layer's traffic (:func:`~.formulas.traffic`) if no weight of it is trained, but its input is.

    Attention must not be one operator (``pipelined``), which adapters make part of its weights.

    Example:
        >>> gather, reduce = (("backward", "zero3_linear", name) for name in ("all_gather", "reduce_scatter"))
        >>> frozen_traffic({gather: 64, reduce: 96})
        {('backward', 'zero3_linear', 'all_gather'): 64}
    """
    dropped = {("backward", name, "reduce_scatter") for name in _WEIGHTS}
    dropped |= {("backward", "replicated_parameter", "all_reduce"), ("backward", "all_gather_linear", "all_gather")}
    return {key: count for key, count in sent.items() if key not in dropped}


def lora_traffic(
    shape: LayerShape,
    strategy: str,
    world: int,
    *,
    tokens: int,
    rank: int,
    projections: Collection[str] = PROJECTIONS,
    ring: int = 1,
    gathered: Literal["regather", "save"] = "regather",
    element_size: int = 4,
) -> Traffic:
    """Bytes that each rank sends for forward and backward of one decoder layer, of which adapters alone are trained.

    Args:
        shape, strategy, world, tokens, ring, gathered, element_size: as in :func:`~.formulas.traffic`; adapters are of
            the same type as weights.
        rank: r, of every adapter.
        projections: which have one, out of :data:`PROJECTIONS`.

    Returns:
        Only what is not zero. Gradients of the adapters of all layers travel in one call, which is padded to a multiple
        of the ranks once: this is a layer's share of it where the ranks divide that.

    Raises:
        ValueError: as :func:`~.formulas.traffic` does, and for unknown projections or a rank below 1.

    Example:
        >>> shape = LayerShape(hidden=64, intermediate=96, heads=8, kv_heads=8, head_dim=8)
        >>> sent = lora_traffic(shape, "odysseus", 2, tokens=64, rank=4, projections=["up"])
        >>> sent["backward", "replicated_parameter", "all_reduce"]  # 4 * (64 + 96) numbers of 4 bytes
        2560
    """
    unknown = sorted(set(projections) - set(PROJECTIONS))
    if unknown or rank < 1:
        raise ValueError(
            f"expected projections out of {PROJECTIONS} and a rank of at least 1, got {sorted(projections)} and {rank}"
        )
    base = traffic(shape, strategy, world, tokens=tokens, ring=ring, gathered=gathered, element_size=element_size)
    ledger, everyone = Ledger(element_size), ring * world
    different = ring * (1 if strategy == "tp" else world)  # ranks that hold different tokens
    own = tokens // everyone
    sizes = {
        **dict.fromkeys(("key", "value"), (shape.key_value, shape.hidden)),
        **dict.fromkeys(("gate", "up"), (shape.intermediate, shape.hidden)),
        "query": (shape.query, shape.hidden),
        "output": (shape.hidden, shape.query),
        "down": (shape.hidden, shape.intermediate),
    }
    sums: Counter[int] = Counter()  # elements that are added over so many ranks, in one call for all layers
    adapted = [name for name in PROJECTIONS if name in projections and (shape.gated or name != "gate")]
    for names in (("query", "key", "value", "output"), ("gate", "up", "down")):
        cut = strategy in ("tp", "tp_sp") or (names[0] == "query" and strategy in ("ulysses", "odysseus"))
        here = [name for name in names if name in adapted]
        columns = [name for name in here if name in _COLUMN_PARALLEL]
        if cut and columns:
            _gathered(ledger, strategy, world, own * rank * len(columns), gathered)
        for name in here:
            rows, width = sizes[name]
            column_parallel = name in columns
            if cut and not column_parallel:
                _scattered(ledger, strategy, world, own * rank)
            # The part of A or B that meets cut features is padded to the whole, and added over all ranks.
            sums[everyone if cut and not column_parallel else different] += rank * width
            sums[everyone if cut and column_parallel else different] += rank * rows
    for ranks, elements in sums.items():
        ledger.replicated(ranks, elements)
    total = Ledger(element_size)
    total.bytes.update(frozen_traffic(base))
    total.bytes.update(ledger.bytes)
    return total.result()
