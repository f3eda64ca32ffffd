"""Memory of each rank under a split: weights and what training adds to them, what backward needs, what comes and goes.

What is kept for backward is ``planner/memory.py``'s to the byte, for stock modules of transformers; weights are counted
as ``strategies/`` places them.  Two parts are estimates: transients, and what :data:`ESTIMATED` names.

=============  =======================================================================================================
``weights``    elements of this rank times their size; fully_shard divides all of them by dp
``gradients``  fp32 sums for 16-bit weights (:class:`~odysseus_kernels.MasterWeights`), else of the weights' type
``optimizer``  Adam's two moments in fp32, and fp32 copies of 16-bit weights; fp64 weights have fp64 moments
``saved``      of all layers and the head; with offload the inputs of two layers, the others are in the host's memory
``transients`` the largest of a backward's working set, with checkpointing one layer recomputed; two visiting chunks of
               tokens, weights, or keys and values; one chunk of logits; with fully_shard two layers gathered
=============  =======================================================================================================
"""

from __future__ import annotations

import dataclasses

from odysseus_kernels.planner.memory import head_saved, layer_inputs, saved
from odysseus_kernels.planner.planning.models import ModelSizes
from odysseus_kernels.planner.planning.splits import ZERO3_ATTENTION, Split

__all__ = ["ESTIMATED", "LayerElements", "SplitMemory", "elements_of", "layer_saved", "split_memory"]

ESTIMATED = {
    "qk_norm": "what norms of queries and keys keep is estimated: no formula is proved for it",
    "experts": "what experts keep is estimated, and the loss that balances them left out",
}
"""What is said of a prediction that goes beyond the proved formulas."""

_KEPT_INPUTS = 1  # default of offload_activations' keep
_LOGIT_ROWS = 1024  # default of the losses' chunk_rows
_NARROW = 2  # bytes of bf16 and fp16


@dataclasses.dataclass(frozen=True)
class LayerElements:
    """Parameters of one rank, before data parallelism.

    Attributes:
        layer: of one decoder layer.
        ends: of embedding, last norm and head.
        largest_visiting: of the largest weight's part that one rank sends another under ZeRO-3; 0 without.
        logit_columns: rows of the head's weight that one chunk of logits meets.
    """

    layer: int
    ends: int
    largest_visiting: int
    logit_columns: int


@dataclasses.dataclass(frozen=True)
class SplitMemory:
    """Bytes of one rank.

    Attributes:
        weights, gradients, optimizer, saved, transients: see the module.
        offloaded: bytes in the host's memory, which are no part of the device's.
    """

    weights: int
    gradients: int
    optimizer: int
    saved: int
    transients: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.saved + self.transients


def elements_of(model: ModelSizes, split: Split) -> LayerElements:
    """Parameters of one rank as the strategy's table places them, biases and norms included."""
    shape, seq, everyone = model.layer, split.seq, split.everyone
    d, i, query, key = shape.hidden, shape.intermediate, shape.query, shape.key_value
    if split.strategy in ZERO3_ATTENTION:
        attention = 2 * d * (query + key) // everyone
        attention += (query + 2 * key) // everyone if shape.qkv_bias else 0
        attention += d // everyone if shape.out_bias else 0
    else:
        own_key = key if shape.kv_heads % seq else key // seq  # whole where ranks share heads
        attention = 2 * d * (query // seq + own_key)
        attention += query // seq + 2 * own_key if shape.qkv_bias else 0
        attention += d if shape.out_bias else 0
    zero3 = split.strategy not in ("tp", "tp_sp")
    inner = shape.inner
    if model.experts:
        network = model.feed_forward_parameters // everyone + model.experts * d  # and the router, whole
    elif zero3:
        network = (inner + 1) * d * i // everyone + ((inner * i + d) // everyone if shape.mlp_bias else 0)
    else:
        network = (inner + 1) * d * i // seq + (inner * i // seq + d if shape.mlp_bias else 0)
    norm = d * (2 if shape.norm_bias else 1)
    layer = attention + network + 2 * norm + (2 * shape.head_dim if shape.qk_norm else 0)
    over = everyone if zero3 else seq
    columns = model.vocabulary if model.tied or model.vocabulary % over else model.vocabulary // over
    visiting = 0
    if model.experts:
        visiting = inner * d * i * model.experts // everyone
    elif zero3:
        visiting = d * i // everyone
    head = 0 if model.tied else columns * d
    return LayerElements(layer, model.vocabulary * d + norm + head, visiting, columns)


def layer_saved(model: ModelSizes, split: Split, *, tokens: int, element_size: int, checkpointing: bool = False) -> int:
    """Bytes that one layer keeps for backward; estimated for norms of heads and for experts."""
    shape = model.layer
    if model.experts:
        # Experts keep two products of each pair of token and expert, an unfused gated network four.
        shape = dataclasses.replace(shape, intermediate=shape.intermediate * model.used_experts // 2)
    head_norms = 0
    if shape.qk_norm:
        shape = dataclasses.replace(shape, qk_norm=False)
        if not checkpointing:  # as of the layer's norms: the normalised input, and one number for each row, in fp32
            over = 1 if split.strategy == "tsp" else split.seq
            width = shape.query + shape.used_key_value(over)
            head_norms = tokens // split.everyone * 4 * (width + width // shape.head_dim)
    kept = saved(
        shape,
        split.strategy,
        split.seq,
        tokens=tokens,
        ring=split.ring,
        element_size=element_size,
        checkpointing=checkpointing,
    )
    return sum(kept.values()) + head_norms


def split_memory(
    model: ModelSizes, split: Split, *, tokens: int, element_size: int, checkpointing: bool, offload: bool
) -> SplitMemory:
    """Memory of one rank while ``tokens`` of batch and sequence go through the ranks that share them."""
    elements = elements_of(model, split)
    own = -(-(model.layers * elements.layer + elements.ends) // split.dp)
    narrow = element_size == _NARROW
    hidden, sizes = model.layer.hidden, {"tokens": tokens, "ring": split.ring, "element_size": element_size}
    layers = model.layers * layer_saved(model, split, tokens=tokens, element_size=element_size)
    held = layers
    if checkpointing:
        layers = layer_inputs(hidden, split.strategy, split.seq, layers=model.layers, **sizes)
        keep = _KEPT_INPUTS if offload else None
        held = layer_inputs(hidden, split.strategy, split.seq, layers=model.layers, keep=keep, **sizes)
    head = head_saved(hidden, split.strategy, split.seq, **sizes)
    return SplitMemory(
        weights=own * element_size,
        gradients=own * (4 if narrow else element_size),
        optimizer=own * (12 if narrow else 2 * element_size),
        saved=held + head,
        transients=_transients(model, split, elements, tokens, element_size, checkpointing),
        offloaded=layers - held,
    )


def _transients(
    model: ModelSizes, split: Split, elements: LayerElements, tokens: int, element_size: int, checkpointing: bool
) -> int:
    shape, own = model.layer, tokens // split.everyone
    rows = tokens // split.ring if split.strategy == "tp" else own
    over = 1 if split.strategy == "tsp" else split.seq
    key_value = shape.used_key_value(over)
    network = own * (shape.inner + 1) * shape.intermediate * max(1, model.used_experts)
    attention = own * (2 * shape.query + 2 * key_value)
    found = (max(network, attention) + 2 * rows * shape.hidden) * element_size
    if checkpointing:
        found += layer_saved(model, split, tokens=tokens, element_size=element_size)
    if split.seq > 1 and split.strategy in ("tp_sp", "odysseus"):
        found += 2 * own * shape.hidden * element_size
    if split.everyone > 1:
        found += elements.largest_visiting * (2 * element_size + 4)  # two parts, and one's gradient in fp32
    ring = split.everyone if split.strategy == "tsp" else split.ring
    if ring > 1:
        found += 2 * 2 * own * key_value * (element_size + max(4, element_size))
    if split.dp > 1:
        found += 3 * elements.layer * element_size  # two layers gathered, one layer's gradients
    return found + 2 * min(rows, _LOGIT_ROWS) * elements.logit_columns * max(4, element_size)
