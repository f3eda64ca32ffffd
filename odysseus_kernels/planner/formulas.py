"""What one decoder layer sends on each rank, in whole bytes, operator by operator; what it keeps is in memory.py.

L tokens of the whole sequence times batch, R ring ranks outside of N seq ranks, W = R * N ranks in all, s = L / W
tokens of each rank, T = L / R tokens of each ring rank.  d hidden size, q and k widths of all query and key/value heads
together, i intermediate size, m = 3 matrices in a gated feed-forward network and 2 in a plain one.

One global tensor of S elements costs each of the ranks P that share it

================================ ==================================================================================
``all_gather, reduce_scatter``   (P - 1) / P * S
``all_reduce``                   2 * (P - 1) * ceil(S / P): it is padded to a multiple of P
``all_to_all``                   (P - 1) / P * S / P
``send_recv``                    (P - 1) / P * S: each rank's part to every other one, one after another
================================ ==================================================================================

Where they come from, all activations over seq:

============= ============================================ =======================================================
strategy      forward                                      backward
============= ============================================ =======================================================
tp            2 all_reduce of [T, d]                       2 all_reduce of [T, d]
tp_sp         2 all_gather, 2 reduce_scatter of [T, d]     the same, and 2 all_gather more with ``"regather"``
odysseus      1 all_gather, 1 reduce_scatter of [T, d];    the same, and 1 all_gather more with ``"regather"``;
              all_gather of m*d*i                          all_gather and reduce_scatter of m*d*i
ulysses       all_to_all of [T, 2q + 2k];                  all_to_all of [T, 2q + 2k];
              all_gather of all weights                    all_gather and reduce_scatter of all weights
tsp           send_recv of [L, 2k] over all W;             send_recv of [L, 2k], and again in the accumulator's type;
              all_gather of all weights                    all_gather and reduce_scatter of all weights
============= ============================================ =======================================================

ZeRO-3 weights are cut over all W ranks.  Weights that are cut over seq have copies on the ring, whose gradients are
all-reduced over it; those of norms, over the ranks that hold different tokens.  Ring attention sends k and v to R - 1
peers forward, and again in backward, where their partial gradients return in the accumulator's type (fp32, or fp64);
parts of them to fewer where a window or documents hide these from others (ring.py).  Under tsp all W ranks are its
ring.  For an attention function that takes all keys at once (eager) tsp gathers them in forward, where they are kept:
all_gather of [L, 2k] forward, reduce_scatter backward.
"""

from __future__ import annotations

from typing import Literal

from odysseus_kernels.planner.ledger import Ledger, Traffic, part_of
from odysseus_kernels.planner.ring import RingPeers, add_gathered_keys, add_ring_attention
from odysseus_kernels.planner.shapes import LayerShape

__all__ = [
    "PIPELINED",
    "STRATEGIES",
    "LayerShape",
    "Traffic",
    "check_sizes",
    "check_tile_rows",
    "head_traffic",
    "replicated_traffic",
    "traffic",
]

STRATEGIES = ("tp", "tp_sp", "ulysses", "odysseus", "tsp")
"""Strategies that have formulas."""

PIPELINED = ("tp_sp", "odysseus")
"""Strategies whose attention block can be one operator that gathers the sequence piece by piece."""

# What one operator stands for where attention is pipelined, and its name.
_BLOCKS = {
    **dict.fromkeys(PIPELINED, (("all_gather_linear", "linear_reduce_scatter"), "pipelined_attention")),
    "ulysses": (("linear_all_to_all", "all_to_all_linear"), "pipelined_ulysses"),
}

_ZERO3 = ("ulysses", "odysseus", "tsp")  # strategies whose feed-forward networks and heads are ZeRO-3


def check_sizes(shape: LayerShape, strategy: str, world: int, ring: int, tokens: int, gathered: str) -> None:
    """Raises ValueError for what no layer could be cut into, or an unknown strategy."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {STRATEGIES}, got {strategy!r}")
    if gathered not in ("regather", "save"):
        raise ValueError(f'gathered: expected "regather" or "save", got {gathered!r}')
    if min(world, ring, tokens) < 1:
        raise ValueError(f"expected world, ring and tokens of at least 1, got {world}, {ring} and {tokens}")
    if tokens % (world * ring):
        raise ValueError(f"tokens: expected a multiple of {ring} x {world} ranks (padding included), got {tokens}")
    if strategy == "tsp":
        return  # heads stay together
    if shape.heads % world or (shape.kv_heads % world and world % shape.kv_heads):
        raise ValueError(
            f"world: expected ranks that divide {shape.heads} query heads, and divide {shape.kv_heads} key/value heads "
            f"or are a multiple of them, got {world}"
        )


def traffic(
    shape: LayerShape,
    strategy: str,
    world: int,
    *,
    tokens: int,
    ring: int = 1,
    gathered: Literal["regather", "save"] = "regather",
    element_size: int = 4,
    checkpointing: bool = False,
    pipelined: bool = False,
    keys_at_once: bool = False,
    tile_rows: int | None = None,
    ring_peers: RingPeers | None = None,
) -> Traffic:
    """Bytes that each rank sends for forward and backward of one decoder layer, all gradients included.

    Args:
        shape: the layer.
        strategy: one of :data:`STRATEGIES`.
        world: ranks N of seq.
        tokens: L, batch and padding included.
        ring: ranks R of ring.
        gathered: as in :class:`~odysseus_kernels.OverlapConfig`.
        element_size: bytes of an element of activations and parameters.
        checkpointing: whether the whole layer is recomputed in backward: its forward then counts twice.
        pipelined: whether attention is one operator, :func:`~odysseus_kernels.pipelined_attention` (strategies
            ``"tp_sp"`` and ``"odysseus"``) or :func:`~odysseus_kernels.pipelined_ulysses` (``"ulysses"`` without a
            ring): the same bytes under its name.
        keys_at_once: under ``"tsp"``, whether the attention function takes all keys at once, as eager attention does.
        tile_rows: as in :class:`~odysseus_kernels.OverlapConfig`, or None.  With ``checkpointing``
            the layer is then recomputed up to its feed-forward network, which recomputes itself.
        ring_peers: how many others of the attention's ring one rank sends to, parts of its tokens counted as parts,
            where a window or documents hide some; None: all of them.

    Returns:
        Only what is not zero.

    Raises:
        ValueError: sizes that the ranks do not divide, or an unknown strategy.
    """
    check_sizes(shape, strategy, world, ring, tokens, gathered)
    ledger = Ledger(element_size)
    if strategy == "tsp":
        _folded_attention(ledger, shape, ring * world, tokens, keys_at_once)
        attending, width = 1 if keys_at_once else ring * world, shape.key_value
    else:
        _attention(ledger, shape, strategy, world, ring, tokens, gathered)
        attending, width = ring, shape.used_key_value(world) // world
    if attending > 1:
        peers = RingPeers(attending - 1, attending - 1) if ring_peers is None else ring_peers
        add_ring_attention(ledger, peers, 2 * tokens // attending * width)
    if pipelined:
        if strategy not in _BLOCKS or (strategy == "ulysses" and ring > 1):
            raise ValueError(
                f"pipelined: expected one of the strategies {tuple(_BLOCKS)}, the last without a ring, got "
                f"{strategy!r} and {ring} ring ranks"
            )
        ledger.rename(*_BLOCKS[strategy])
    if tile_rows is None:
        _feed_forward(ledger, shape, strategy, world, ring, tokens, gathered)
    else:
        check_tile_rows(tile_rows)
    different = ring * (1 if strategy == "tp" else world)  # ranks that hold different tokens
    for elements in (shape.hidden, shape.hidden) * (2 if shape.norm_bias else 1):
        ledger.replicated(different, elements)
    if shape.qk_norm:
        for _ in range(2):
            ledger.replicated(ring * world, shape.head_dim)
    if checkpointing:
        ledger.bytes.update({key: count for key, count in ledger.bytes.items() if key[0] == "forward"})
    if tile_rows is not None:
        _tiled_feed_forward(ledger, shape, strategy, world, ring, tokens, tile_rows)
    return ledger.result()


def check_tile_rows(tile_rows: int) -> None:
    """Raises ValueError for what is no number of tokens."""
    if tile_rows < 1:
        raise ValueError(f"tile_rows: expected 1 or more, got {tile_rows}")


def _attention(
    ledger: Ledger, shape: LayerShape, strategy: str, world: int, ring: int, tokens: int, gathered: str
) -> None:
    d, everyone = shape.hidden, ring * world
    own = tokens // everyone
    used = shape.used_key_value(world)
    widths = (shape.query, shape.key_value, shape.key_value)
    if strategy == "ulysses":
        for phase in ("forward", "backward"):
            # Each rank sends every peer that peer's heads of its own tokens, and gets its own heads of the peer's.
            ledger.shard(phase, "linear_all_to_all", "all_to_all", world, own * (shape.query + 2 * used) // world)
            ledger.shard(phase, "all_to_all_linear", "all_to_all", world, own * shape.query // world)
        for width in widths:
            ledger.zero3("linear_all_to_all", everyone, width * d)
            if shape.qkv_bias:
                ledger.zero3_bias("linear_all_to_all", everyone, width)
        ledger.zero3("all_to_all_linear", everyone, shape.query * d)
        if shape.out_bias:
            ledger.zero3_bias("all_to_all_linear", everyone, d)
    else:
        _gathered(ledger, strategy, world, own * d, gathered)
        _scattered(ledger, strategy, world, own * d)
        shares_heads = shape.kv_heads % world != 0  # then every rank holds key and value weights whole
        for width, whole in zip(widths, (False, shares_heads, shares_heads), strict=True):
            for elements in (width * d, width) if shape.qkv_bias else (width * d,):
                if whole:
                    ledger.replicated(everyone, elements)
                else:
                    ledger.replicated(ring, elements // world)
        ledger.replicated(ring, shape.query * d // world)
        if shape.out_bias:
            ledger.replicated(ring, d)


def _folded_attention(ledger: Ledger, shape: LayerShape, everyone: int, tokens: int, at_once: bool) -> None:
    d = shape.hidden
    for width in (shape.query, shape.key_value, shape.key_value):
        ledger.zero3("zero3_linear", everyone, width * d)
        if shape.qkv_bias:
            ledger.zero3_bias("zero3_linear", everyone, width)
    ledger.zero3("zero3_linear", everyone, shape.query * d)
    if shape.out_bias:
        ledger.zero3_bias("zero3_linear", everyone, d)
    if at_once:
        add_gathered_keys(ledger, everyone, 2 * tokens // everyone * shape.key_value)


def _gathered(ledger: Ledger, strategy: str, world: int, shard: int, gathered: str) -> None:
    """Column-parallel projections of an input of ``shard`` elements on each rank."""
    if strategy == "tp":
        ledger.all_reduce("backward", "column_parallel_linear", world, shard * world)
        return
    ledger.shard("forward", "all_gather_linear", "all_gather", world, shard)
    ledger.shard("backward", "all_gather_linear", "reduce_scatter", world, shard)
    if gathered == "regather":
        ledger.shard("backward", "all_gather_linear", "all_gather", world, shard)


def _scattered(ledger: Ledger, strategy: str, world: int, shard: int) -> None:
    """A row-parallel projection with an output of ``shard`` elements on each rank."""
    if strategy == "tp":
        ledger.all_reduce("forward", "linear_all_reduce", world, shard * world)
        return
    ledger.shard("forward", "linear_reduce_scatter", "reduce_scatter", world, shard)
    ledger.shard("backward", "linear_reduce_scatter", "all_gather", world, shard)


def _feed_forward(
    ledger: Ledger, shape: LayerShape, strategy: str, world: int, ring: int, tokens: int, gathered: str
) -> None:
    d, i, everyone = shape.hidden, shape.intermediate, ring * world
    widths = [i] * shape.inner
    if strategy in _ZERO3:
        for width in (*widths, d):
            ledger.zero3("zero3_linear", everyone, d * i)
            if shape.mlp_bias:
                ledger.zero3_bias("zero3_linear", everyone, width)
        return
    own = tokens // everyone
    _gathered(ledger, strategy, world, own * d, gathered)
    _scattered(ledger, strategy, world, own * d)
    _replicated_feed_forward(ledger, shape, world, ring)


def _replicated_feed_forward(ledger: Ledger, shape: LayerShape, world: int, ring: int) -> None:
    """Gradients of tensor-parallel weights, of which ranks of the ring hold copies."""
    d, i = shape.hidden, shape.intermediate
    for _ in range(shape.inner):
        for elements in (i * d, i) if shape.mlp_bias else (i * d,):
            ledger.replicated(ring, part_of(elements, world))
    ledger.replicated(ring, part_of(i * d, world))
    if shape.mlp_bias:
        ledger.replicated(ring, d)


def _tiled_feed_forward(
    ledger: Ledger, shape: LayerShape, strategy: str, world: int, ring: int, tokens: int, tile_rows: int
) -> None:
    """The same in tiles.

    ZeRO-3: as without, and biases of gate and up are gathered in backward, too.  TP-SP: the input is gathered for each
    forward and once in backward, whatever ``"gathered"`` says.  TP: all_reduce of each tile, padded by itself.
    """
    d, i, everyone = shape.hidden, shape.intermediate, ring * world
    own = tokens // everyone
    if strategy == "tp":
        rows = own * world
        for first in range(0, rows, tile_rows * world):
            elements = min(tile_rows * world, rows - first) * d
            ledger.all_reduce("forward", "linear_all_reduce", world, elements)
            ledger.all_reduce("backward", "column_parallel_linear", world, elements)
    elif strategy == "tp_sp":
        for _ in range(2):  # in forward, and again in backward, where it is still a forward call
            ledger.shard("forward", "all_gather_linear", "all_gather", world, own * d)
        ledger.shard("forward", "linear_reduce_scatter", "reduce_scatter", world, own * d)
        ledger.shard("backward", "linear_reduce_scatter", "all_gather", world, own * d)
        ledger.shard("backward", "all_gather_linear", "reduce_scatter", world, own * d)
    else:
        _feed_forward(ledger, shape, strategy, world, ring, tokens, "regather")
        if shape.mlp_bias:
            for _ in range(shape.inner):
                ledger.shard("backward", "zero3_linear", "all_gather", everyone, part_of(i, everyone))
        return
    _replicated_feed_forward(ledger, shape, world, ring)


def replicated_traffic(elements: int, strategy: str, world: int, *, ring: int = 1, element_size: int = 4) -> Traffic:
    """Bytes for the gradient of a parameter that every rank holds whole and uses for its own tokens.

    That is an embedding, or the norm after the last layer.
    """
    ledger = Ledger(element_size)
    ledger.replicated(ring * (1 if strategy == "tp" else world), elements)
    return ledger.result()


def head_traffic(
    vocabulary: int,
    hidden: int,
    strategy: str,
    world: int,
    *,
    tokens: int,
    ring: int = 1,
    element_size: int = 4,
    tied: bool = False,
) -> Traffic:
    """Bytes for a language head [vocabulary, hidden] with its mean cross-entropy; the embedding's come on top.

    Under ``"ulysses"``, ``"odysseus"`` and ``"tsp"`` the weight is ZeRO-3 and no logits travel.  Under tensor
    parallelism ranks of seq have parts of the vocabulary: hidden states of all tokens come to them, statistics of each
    token (two numbers) and gradients go back.  A head that the ranks do not divide, or that is tied to the
    embedding, is whole on all of them, and its share of the gradient is reduced by itself.

    Raises:
        ValueError: as :func:`traffic` does for ``strategy``.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {STRATEGIES}, got {strategy!r}")
    ledger, everyone = Ledger(element_size), ring * world
    different = ring * (1 if strategy == "tp" else world)
    zero3 = strategy in _ZERO3
    if tied or vocabulary % (everyone if zero3 else world):
        ledger.replicated(different, vocabulary * hidden)
    elif zero3:
        ledger.zero3("zero3_linear_cross_entropy", everyone, vocabulary * hidden)
    else:
        ledger.replicated(ring, vocabulary * hidden // world)
        name, wide = "vocab_parallel_linear_cross_entropy", Ledger(max(4, element_size))
        if strategy == "tp":
            rows = tokens // ring
            wide.shard("forward", name, "all_gather", world, 2 * rows)
            ledger.all_reduce("backward", name, world, rows * hidden)
        else:
            rows = tokens // everyone
            labels = Ledger(8)
            labels.shard("forward", name, "all_gather", world, rows)
            ledger.shard("forward", name, "all_gather", world, rows * hidden)
            wide.shard("forward", name, "all_to_all", world, 2 * rows)
            ledger.shard("backward", name, "all_gather", world, rows * hidden)
            wide.shard("backward", name, "all_gather", world, rows + 1)
            ledger.shard("backward", name, "reduce_scatter", world, rows * hidden)
            ledger.bytes.update(labels.bytes)
        ledger.bytes.update(wide.bytes)
    loss = Ledger(8)  # the sum and the number of tokens, in fp64
    loss.all_reduce("forward", "sequence_loss", different, 2)
    ledger.bytes.update(loss.bytes)
    return ledger.result()
