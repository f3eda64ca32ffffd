"""A whole attention block, piece by piece of the sequence, from this rank's tokens to this rank's tokens.

Under a causal mask the queries of a piece need the keys of that piece and those before it.  So forward gathers one
piece after another, projects it, attends and sends the output's partial sums back; backward goes from the last piece to
the first, so that the gradients of a piece's keys and values are complete when its turn comes.  While a piece is
computed, attention included, the next one arrives and the last one's results leave.  Buffers, streams and who may run
beside the operator are the transport's contract (``comm/pipeline.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.attention.layout import with_key_mask
from odysseus_kernels.comm.arguments import check_config, refuse_second_derivative
from odysseus_kernels.comm.groups import resolve_group
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops import _several
from odysseus_kernels.ops._ahead import Shards, choose_ahead, recomputed_flag, take_ahead, tell_ahead
from odysseus_kernels.ops._attention_block import Block
from odysseus_kernels.ops._attention_pieces import ForwardPieces, Pieces, Settings
from odysseus_kernels.ops._pipeline_validate import check_pipelined_attention, piece_edges, scale_of_scores
from odysseus_kernels.ops._validate import group_by_name

__all__ = ["pipelined_attention"]

_NAME = "pipelined_attention"


def pipelined_attention(
    x: Tensor,
    weight: Sequence[Tensor],
    output_weight: Tensor,
    bias: Sequence[Tensor | None] | None = None,
    output_bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    ring: dist.ProcessGroup | DeviceMesh | None = None,
    head_dim: int,
    pieces: int | Sequence[int] = 8,
    rotation: tuple[Tensor, Tensor] | None = None,
    head_norms: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-6,
    documents: Tensor | None = None,
    key_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: int | None = None,
    first_head: int = 0,
    kernel: str = "sdpa",
    config: OverlapConfig | None = None,
    prefetch: Shards = None,
    prefetch_backward: Shards = None,
    prefetch_recomputed: Shards = None,
) -> Tensor:
    """Causal self-attention of a sequence that is cut over N ranks, with its projections, differentiable.

    B sequences of L tokens, L/N of them here; hidden size d; Hq query and Hkv key/value heads of this rank, D wide.
    With a ring of R, T = L/R of them are those of this ring rank, and T/N of these are here; else T = L.

    forward:          q, k, v = AG(x) @ weights.T + biases, normalized and rotated; o = attention(q, k, v);
                      y [B, T/N, d] = RS(o @ output_weight.T) + output_bias, added in fp32
    input gradient:   dx [B, T/N, d], through all of it, its partial sums added in fp32
    weight gradients: of all weights, biases and norms of this rank; AG(dy) and AG(x) arrive together, piece by piece

    Tokens are *striped*: the sequence is cut into pieces, and each piece into N stripes, of which rank r holds the
    r-th (:func:`shard_sequence` with ``pieces``).  So a piece is gathered from all ranks alike, and its tokens are in
    their natural order; with a ring, in that of its part in :func:`ring_attention`'s zigzag layout.

    Elements sent by each rank: (N-1) * T/N * d twice forward, three times backward (twice with
    ``config.gathered="save"``); with a ring also what :func:`ring_attention` sends, under its name.

    Args:
        x: [B, T/N, d], this rank's tokens, striped.
        weight: query, key and value weights [Hq*D, d], [Hkv*D, d], [Hkv*D, d]: this rank's heads.
        output_weight: [d, Hq*D], this rank's columns.
        bias: of the three projections, or None.
        output_bias: [d], the same on all ranks; added once.
        group: the ranks; None is the default group.
        ring: the ranks that hold the other parts of the sequence; None: there are none.
        head_dim: D.
        pieces: into how many pieces the sequence is cut, small ones at both ends
            (``planner.pipeline.piece_shares``), or how many rows of x each piece has.
        rotation: cos and sin, [1 or B, T, D], of these tokens in their order; None: no rotation.
        head_norms: weights [D] of RMS norms of query and key heads, the same on all ranks; their gradients are those of
            this rank's heads.
        norm_eps: of these norms.
        documents, key_mask, window, scale, dropout, dropout_seed, first_head, kernel: as in :func:`ring_attention`.
        config: mode, transport, what is kept for backward, time limit.
        prefetch, prefetch_backward, prefetch_recomputed: what every rank gathers next with ``group`` after this
            operator's forward, after its backward, and after a backward whose forward a checkpoint has computed again;
            sent ahead meanwhile (:func:`zero3_linear`).

    Returns:
        [B, T/N, d], striped as x is.

    Raises:
        ValueError: bad input, before anything is sent.
        CommunicationError: ranks differ in what they call (pieces, documents, dropout and seed included), or a peer is
            lost or silent.

    Example:
        >>> x, wq, wk = torch.ones(1, 8, 16), torch.ones(8, 16), torch.ones(4, 16)  # 8 of 16 tokens
        >>> y = ody.pipelined_attention(x, (wq, wk, wk), torch.ones(16, 8), group=group, head_dim=4, pieces=2)
        >>> y.shape
        torch.Size([1, 8, 16])
    """
    settled, resolved = check_config(config), resolve_group(group)
    around = None if ring is None else resolve_group(ring)
    around = None if around is None or around.size() == 1 else around
    edges = piece_edges(_NAME, x, pieces)
    settings = Settings(
        head_dim=head_dim,
        edges=edges,
        eps=norm_eps,
        window=window,
        scale=scale_of_scores(_NAME, head_dim, scale),
        dropout=dropout,
        seed=0 if dropout_seed is None else dropout_seed,
        first_head=first_head,
        kernel=kernel,
    )
    x, weights, biases, output_weight, output_bias = check_pipelined_attention(
        _NAME, x, weight, output_weight, bias, output_bias, resolved.size(),
        1 if around is None else around.size(), settings, rotation, head_norms, documents,
        key_mask, dropout_seed, settled,
    )  # fmt: skip
    keep = (
        settled.gathered == "save"
        and resolved.size() > 1
        and torch.is_grad_enabled()
        and any(one.requires_grad for one in weights)
    )
    found = torch.ops.odysseus.pipelined_attention(
        x,
        weights,
        *_several.present_biases(biases),
        output_weight,
        output_bias,
        list(rotation or ()),
        list(head_norms or ()),
        with_key_mask(documents, key_mask),
        resolved.group_name,
        "" if around is None else around.group_name,
        settled.key(),
        settings.key(),
        keep,
        *tell_ahead(_NAME, output_weight, prefetch, prefetch_backward, prefetch_recomputed),
    )
    return cast(Tensor, found[0])


@torch.library.custom_op("odysseus::pipelined_attention", mutates_args=())
def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    has_bias: Sequence[bool],
    output_weight: Tensor,
    output_bias: Tensor | None,
    rotation: Sequence[Tensor],
    head_norms: Sequence[Tensor],
    documents: Tensor | None,
    group_name: str,
    ring_name: str,
    config_key: str,
    settings_key: str,
    keep: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> list[Tensor]:
    """[y, q, k, v, out, log-sum-exp, q and k before their norms, gathered x, flag]; empty where it is not kept."""
    group, config = group_by_name(group_name), OverlapConfig.from_key(config_key)
    ring = group_by_name(ring_name) if ring_name else None
    block = Block(
        x, weights, output_weight, rotation, head_norms, documents, group, ring, config, Settings.of(settings_key)
    )
    prefetch = take_ahead(ahead, ahead_text, "forward")
    return [
        *block.forward(_several.biases_of_weights(biases, has_bias), output_bias, prefetch, keep=keep),
        recomputed_flag(),
    ]


@_forward.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    has_bias: Sequence[bool],
    output_weight: Tensor,
    output_bias: Tensor | None,
    rotation: Sequence[Tensor],
    head_norms: Sequence[Tensor],
    documents: Tensor | None,
    group_name: str,
    ring_name: str,
    config_key: str,
    settings_key: str,
    keep: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> list[Tensor]:
    pieces = Pieces(Settings.of(settings_key), group_by_name(group_name).size())
    made = ForwardPieces(x, weights, output_weight, bool(head_norms), pieces, keep=keep).results
    return [*made, torch.empty((), dtype=torch.bool)]


@torch.library.custom_op("odysseus::pipelined_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    output_weight: Tensor,
    rotation: Sequence[Tensor],
    head_norms: Sequence[Tensor],
    documents: Tensor | None,
    saved: Sequence[Tensor],
    group_name: str,
    ring_name: str,
    config_key: str,
    settings_key: str,
    input_needed: bool,
    weights_needed: Sequence[bool],
    biases_needed: Sequence[bool],
    output_needed: Sequence[bool],
    norms_needed: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
    recomputed: Tensor,
) -> list[Tensor]:
    """[dx, dweights..., dbiases..., doutput_weight, doutput_bias, dnorms...]; empty tensors where not needed."""
    group, config = group_by_name(group_name), OverlapConfig.from_key(config_key)
    ring = group_by_name(ring_name) if ring_name else None
    block = Block(
        x, weights, output_weight, rotation, head_norms, documents, group, ring, config, Settings.of(settings_key)
    )
    prefetch = choose_ahead(ahead, ahead_text, recomputed) if input_needed else None
    return block.backward(
        grad.contiguous(), saved, input_needed, weights_needed, biases_needed, output_needed, prefetch,
        norms_needed=norms_needed,
    )  # fmt: skip


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    output_weight: Tensor,
    rotation: Sequence[Tensor],
    head_norms: Sequence[Tensor],
    documents: Tensor | None,
    saved: Sequence[Tensor],
    group_name: str,
    ring_name: str,
    config_key: str,
    settings_key: str,
    input_needed: bool,
    weights_needed: Sequence[bool],
    biases_needed: Sequence[bool],
    output_needed: Sequence[bool],
    norms_needed: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
    recomputed: Tensor,
) -> list[Tensor]:
    return [
        x.new_empty(x.shape if input_needed else (0,)),
        *_several.empty_gradients(weights, weights_needed, biases_needed),
        output_weight.new_empty(output_weight.shape if output_needed[0] else (0,)),
        output_weight.new_empty(output_weight.shape[:1] if output_needed[1] else (0,)),
        *(norm.new_empty(norm.shape if norms_needed else (0,)) for norm in head_norms),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, has_bias, output_weight, output_bias, rotation, norms, documents, *rest = inputs
    ctx.set_materialize_grads(False)
    *ctx.settings, _, ahead, ahead_text = rest
    ctx.ahead = ahead, ahead_text
    ctx.counts = len(rotation), len(norms)
    ctx.save_for_backward(x, *weights, output_weight, documents, *rotation, *norms, *output[1:])
    _several.note_needed(ctx, weights, biases, has_bias)
    ctx.output_needed = [output_weight.requires_grad, output_bias is not None and output_bias.requires_grad]
    ctx.norms_needed = any(norm.requires_grad for norm in norms)


def _autograd_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, wq, wk, wv, output_weight, documents, *rest = ctx.saved_tensors
    rotations, norms = ctx.counts
    rotation, head_norms, saved = rest[:rotations], rest[rotations : rotations + norms], rest[rotations + norms :]
    recomputed = saved.pop()
    grad = x.new_zeros(x.shape) if grads[0] is None else grads[0]
    dx, *found = torch.ops.odysseus.pipelined_attention_backward(
        grad,
        x,
        [wq, wk, wv],
        output_weight,
        rotation,
        head_norms,
        documents,
        saved,
        *ctx.settings,
        ctx.needs_input_grad[0],
        ctx.weights_needed,
        ctx.biases_needed,
        ctx.output_needed,
        ctx.norms_needed,
        *ctx.ahead,
        recomputed,
    )
    return (
        dx if ctx.needs_input_grad[0] else None,
        *_several.wanted_gradients(ctx, found[:6]),
        None,
        *(one if needed else None for one, needed in zip(found[6:8], ctx.output_needed, strict=True)),
        [None] * rotations,
        [one if ctx.norms_needed else None for one in found[8:]],
        *[None] * 6,
        [None] * len(ctx.ahead[0]),
        None,
    )


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, _NAME)
