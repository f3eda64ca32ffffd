"""What one decoder layer, and a language head, keep for backward on each rank, and tiles hold, in whole bytes.

Symbols as in formulas.py: L tokens over W = R * N ranks, s = L / W, hidden size d, key/value width dk, intermediate
size i.
"""

from __future__ import annotations

from typing import Literal

from odysseus_kernels.planner.formulas import LayerShape, check_sizes, check_tile_rows

__all__ = ["feed_forward_peak", "head_saved", "layer_inputs", "saved"]


def saved(
    shape: LayerShape,
    strategy: str,
    world: int,
    *,
    tokens: int,
    ring: int = 1,
    gathered: Literal["regather", "save"] = "regather",
    element_size: int = 4,
    fused_activation: bool = False,
    stock_norms: bool = True,
    checkpointing: bool = False,
    tiled: bool = False,
) -> dict[str, int]:
    """Bytes that each rank keeps for the backward of one decoder layer, by what they are; parameters are not counted.

    The formula's part is s * (6d + 2dk + 3i): inputs and outputs of both norms, queries, attention's output, keys and
    values, and what the feed-forward network keeps, of which an activation that is no kernel of its own makes 4i (in a
    plain network 2i).  What strategies keep beyond: Ulysses attention's output in both layouts (s * d), TP its input
    whole four times (4(N - 1) s * d), and with ``"save"`` each gathered input ((N - 1) s * d).

    Args:
        shape, strategy, world, tokens, ring, gathered, element_size: as in :func:`~.formulas.traffic`.
        fused_activation: whether activation and gate are one operator that recomputes.
        stock_norms: norms are chains of operators, as in transformers: each keeps the normalised input as well, one
            number in fp32 for each token, and its input in fp32 where that is another tensor.
        checkpointing: whether the whole layer is recomputed: its input is all that is kept.
        tiled: whether the feed-forward network is computed in tiles (``tile_rows``): of it, its input is all that is
            kept.

    Returns:
        Bytes of ``"activations"``, ``"log-sum-exp"``, ``"strategy"`` and ``"norms"``; their sum is the layer's.

    Raises:
        ValueError: as :func:`~.formulas.traffic` does, and for ``qk_norm``.
    """
    check_sizes(shape, strategy, world, ring, tokens, gathered)
    if shape.qk_norm:
        raise ValueError("qk_norm: expected a layer without norms of queries and keys: no formula says what they keep")
    own = tokens // (ring * world)
    rows = tokens // ring if strategy == "tp" else own  # tokens outside of attention
    d, i = shape.hidden, shape.intermediate
    if checkpointing:
        return {"activations": rows * d * element_size, "log-sum-exp": 0, "strategy": 0, "norms": 0}
    inner = 0 if tiled else (3 if fused_activation else 4) if shape.gated else 2
    heads_over = 1 if strategy == "tsp" else world
    attention = own * (2 * shape.query + 2 * shape.used_key_value(heads_over))
    activations = own * (4 * d + inner * i) + attention
    beyond = {"tp": 4 * (rows - own) * d, "ulysses": own * shape.query}.get(strategy, 0)
    if gathered == "save":
        inputs = {"tp_sp": 1 if tiled else 2, "odysseus": 1}.get(strategy, 0)
        beyond += inputs * (world - 1) * own * d
    # In fp32 the normalised input; in other types that, and the input in fp32 in place of the input.
    norms = 2 * rows * 4 * (d + 1) if stock_norms else 0
    return {
        "activations": activations * element_size,
        "log-sum-exp": own * shape.heads * max(4, element_size),
        "strategy": beyond * element_size,
        "norms": norms,
    }


def layer_inputs(
    hidden: int,
    strategy: str,
    world: int,
    *,
    layers: int,
    tokens: int,
    ring: int = 1,
    element_size: int = 4,
    keep: int | None = None,
) -> int:
    """Most bytes of inputs of checkpointed layers that a rank holds at one moment.

    Args:
        hidden, strategy, world, tokens, ring, element_size: as in :func:`saved`.
        layers: checkpointed layers.
        keep: of :func:`~odysseus_kernels.offload_activations`; None without it.  Then one input is in use while the
            next one is on its way.
    """
    rows = tokens // ring if strategy == "tp" else tokens // (ring * world)
    held = layers if keep is None else min(layers, max(keep, 2))
    return held * rows * hidden * element_size


def feed_forward_peak(
    shape: LayerShape,
    strategy: str,
    world: int,
    *,
    tokens: int,
    tile_rows: int,
    ring: int = 1,
    element_size: int = 4,
) -> dict[str, int]:
    """Most bytes that a feed-forward network in tiles holds, on the symmetric transport.

    With s tokens of a rank (under TP s = T, all of them), n of a tile, and P ranks that share its weights:

    ============= ==================================================================================
    what          elements
    ============= ==================================================================================
    forward       s d; a gated network's 4 n i, a plain one's 2 n i; ZeRO-3: its whole weights, m d i
    backward      s d; 6 n i or 3 n i; gradients of its weights, and ZeRO-3: its whole weights, each m d i
    ============= ==================================================================================

    Tensor parallelism holds a tile's gathered input, or dx, beside that, and has another moment that may be higher:
    that of the weights' gradients of one tile.  Biases are not counted; activations are those that keep their input
    only, as SiLU and GELU do.

    Args:
        shape, strategy, world, tokens, ring: as in :func:`saved`.
        tile_rows: n.
        element_size: 4 or 8; in 16 bits accumulators are wider than what they add.

    Returns:
        Bytes in ``"forward"`` and ``"backward"``: outputs and gradients included, inputs, the incoming gradient and
        parameters not.

    Raises:
        ValueError: as :func:`~.formulas.traffic` does, and for other element sizes.
    """
    check_sizes(shape, strategy, world, ring, tokens, "regather")
    if element_size not in (4, 8):
        raise ValueError(f"element_size: expected 4 or 8, got {element_size}: no formula says what 16 bits hold")
    check_tile_rows(tile_rows)
    d, own = shape.hidden, tokens // (ring * world)
    rows, tile = own * (world if strategy == "tp" else 1), min(tile_rows, own)
    inside, weight = tile * shape.intermediate, d * shape.intermediate
    matrices = shape.inner + 1
    forward, backward = (4, 6) if shape.gated else (2, 3)
    result = rows * d
    if strategy not in ("tp", "tp_sp"):
        held = result + matrices * weight
        elements = (held + forward * inside, held + matrices * weight + backward * inside)
    else:
        part = weight // world
        # TP-SP keeps a tile's gathered input; both receive its gradient.
        kept = world * tile * d if strategy == "tp_sp" else 0
        received = (1 if strategy == "tp_sp" else world) * tile * d
        activation = kept + backward * inside
        products = kept + received + shape.inner * part + (5 if shape.gated else 3) * inside
        elements = (result + forward * inside, result + matrices * part + max(activation, products))
    return {"forward": elements[0] * element_size, "backward": elements[1] * element_size}


def head_saved(hidden: int, strategy: str, world: int, *, tokens: int, ring: int = 1, element_size: int = 4) -> int:
    """Bytes kept for the backward of a language head with its loss, and of the embedding: no logits.

    For each of the rank's tokens its hidden state, its target, its log-sum-exp and its number in the vocabulary; under
    TP-SP the targets of all tokens of seq as well.  The head is one that the ranks divide, as in
    :func:`~.formulas.head_traffic`.
    """
    shared = tokens // ring
    rows = shared if strategy == "tp" else shared // world
    gathered = 8 * shared if strategy == "tp_sp" else 0
    return rows * (hidden * element_size + 8 + max(4, element_size) + 8) + gathered
