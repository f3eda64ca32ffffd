"""DeepSpeed-Ulysses' attention block, group by group of heads, from this rank's tokens to this rank's tokens.

Heads do not depend on one another.  So while attention of one group of every rank's heads is computed, the next group's
weights and projections travel, and the last group's output goes back; in backward likewise.  Every stage is one
exchange (``comm/exchange.py``), within whose visits attention is computed unit by unit.  Buffers, streams and who may
run beside the operator are the transport's contract (``comm/host/transport.py``, ``comm/collective/transport.py``).
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
from odysseus_kernels.ops._attention_pieces import Settings
from odysseus_kernels.ops._pipeline_validate import check_pipelined_ulysses, piece_edges, scale_of_scores
from odysseus_kernels.ops._ulysses_block import NAME, UlyssesBlock
from odysseus_kernels.ops._ulysses_groups import HeadGroups
from odysseus_kernels.ops._ulysses_heads import ForwardHeads, Needed
from odysseus_kernels.ops._validate import group_by_name

__all__ = ["pipelined_ulysses"]


def pipelined_ulysses(
    x: Tensor,
    weight: Sequence[Tensor],
    output_weight: Tensor,
    bias: Sequence[Tensor | None] | None = None,
    output_bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    head_dim: int,
    head_groups: int = 4,
    rotation: tuple[Tensor, Tensor] | None = None,
    head_norms: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-6,
    documents: Tensor | None = None,
    key_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: int | None = None,
    kernel: str = "sdpa",
    config: OverlapConfig | None = None,
    prefetch: Shards = None,
    prefetch_backward: Shards = None,
    prefetch_recomputed: Shards = None,
) -> Tensor:
    """Causal self-attention of a sequence that is cut over N ranks, with its ZeRO-3 projections, differentiable.

    B sequences of L tokens, L/N of them here, one after another; hidden size d; Hq query and Hkv key/value heads of the
    whole model, D wide, Hq/N and Hkv/N of which each rank attends with; n output features.  What
    :func:`linear_all_to_all`, attention and :func:`all_to_all_linear` compute, and send, to the byte.

    forward:          q, k, v = A2A(x @ AG(weights).T + AG(biases)), normalized and rotated; o = attention(q, k, v);
                      y [B, L/N, n] = A2A(o) @ AG(output_weight, 1).T + AG(output_bias)
    input gradient:   dx [B, L/N, d], through all of it, added in fp32
    weight gradients: of this rank's shards, added in fp32: sums over all ranks' tokens
    bias gradients:   likewise; those of the norms are of this rank's heads

    Saved for backward are q, k, v and o of this rank's heads, and for the output weight A2A(o).  Of all that is as wide
    as the hidden state there are this rank's tokens only, and of others' weights those of two groups of one rank.

    Args:
        x: [B, L/N, d], this rank's tokens.
        weight: query, key and value weights [Hq/N*D, d], [Hkv/N*D, d], [Hkv/N*D, d]: the rows of this rank's heads.
        output_weight: [n, Hq/N*D], this rank's columns.
        bias: of the three projections, this rank's, or None.
        output_bias: [n/N], this rank's part, or None.
        group: the ranks; None is the default group.
        head_dim: D.
        head_groups: into how many groups each rank's heads are cut; divides Hkv/N.  One is no pipeline.
        rotation: cos and sin, [1 or B, L, D]; None: no rotation.
        head_norms: weights [D] of RMS norms of query and key heads, the same on all ranks.
        norm_eps: of these norms.
        documents, key_mask, window, scale, dropout, dropout_seed, kernel: as in :func:`ring_attention`.
        config: mode, transport, time limit.
        prefetch, prefetch_backward, prefetch_recomputed: what every rank gathers next with ``group`` after this
            operator's forward, after its backward, and after a backward whose forward a checkpoint has computed again;
            sent ahead meanwhile (:func:`zero3_linear`).

    Returns:
        [B, L/N, n].

    Raises:
        ValueError: bad input, before anything is sent.
        CommunicationError: ranks differ in what they call (groups, documents, norms, rotation, dropout and seed, and
            which biases and gradients there are, included), or a peer is lost or silent.

    Example:
        >>> x, wq, wk = torch.ones(1, 8, 16), torch.ones(16, 16), torch.ones(8, 16)  # 8 of 16 tokens; 4 and 2 heads
        >>> y = ody.pipelined_ulysses(x, (wq, wk, wk), torch.ones(16, 16), group=group, head_dim=4, head_groups=2)
        >>> y.shape
        torch.Size([1, 8, 16])
    """
    settled, resolved = check_config(config), resolve_group(group)
    settings = Settings(
        head_dim=head_dim,
        edges=piece_edges(NAME, x, 1),
        eps=norm_eps,
        window=window,
        scale=scale_of_scores(NAME, head_dim, scale),
        dropout=dropout,
        seed=0 if dropout_seed is None else dropout_seed,
        first_head=0,
        kernel=kernel,
    )
    x, weights, biases, output_weight, output_bias = check_pipelined_ulysses(
        NAME, x, weight, output_weight, bias, output_bias, resolved.size(), settings, head_groups, rotation, head_norms,
        documents, key_mask, dropout_seed, settled,
    )  # fmt: skip
    found = torch.ops.odysseus.pipelined_ulysses(
        x,
        weights,
        *_several.present_biases(biases),
        output_weight,
        output_bias,
        list(rotation or ()),
        list(head_norms or ()),
        with_key_mask(documents, key_mask),
        resolved.group_name,
        settled.key(),
        settings.key(),
        head_groups,
        torch.is_grad_enabled() and output_weight.requires_grad,
        *tell_ahead(NAME, output_weight, prefetch, prefetch_backward, prefetch_recomputed),
    )
    return cast(Tensor, found[0])


@torch.library.custom_op("odysseus::pipelined_ulysses", mutates_args=())
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
    config_key: str,
    settings_key: str,
    head_groups: int,
    keep: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> list[Tensor]:
    """[y, q, k, v, out, log-sum-exp, q and k before their norms, all heads' out, flag]; empty where it is not kept."""
    block = UlyssesBlock(
        x, weights, output_weight, rotation, head_norms, documents, group_by_name(group_name),
        OverlapConfig.from_key(config_key), Settings.of(settings_key), head_groups,
    )  # fmt: skip
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
    config_key: str,
    settings_key: str,
    head_groups: int,
    keep: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> list[Tensor]:
    width, world = Settings.of(settings_key).head_dim, group_by_name(group_name).size()
    groups = HeadGroups(head_groups, width, weights[0].shape[0], weights[1].shape[0], world)
    made = ForwardHeads(x, groups, normed=bool(head_norms), keep=keep).results
    return [x.new_empty((*x.shape[:2], output_weight.shape[0])), *made, torch.empty((), dtype=torch.bool)]


@torch.library.custom_op("odysseus::pipelined_ulysses_backward", mutates_args=())
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
    config_key: str,
    settings_key: str,
    head_groups: int,
    input_needed: bool,
    weights_needed: Sequence[bool],
    biases_needed: Sequence[bool],
    output_needed: Sequence[bool],
    norms_needed: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
    recomputed: Tensor,
) -> list[Tensor]:
    """[dx, dweights..., dbiases..., doutput_weight, dnorms..., doutput_bias]; empty tensors where not needed."""
    block = UlyssesBlock(
        x, weights, output_weight, rotation, head_norms, documents, group_by_name(group_name),
        OverlapConfig.from_key(config_key), Settings.of(settings_key), head_groups,
    )  # fmt: skip
    needed = Needed(
        input=input_needed, weights=weights_needed, biases=biases_needed, output=output_needed[0], norms=norms_needed
    )
    prefetch = choose_ahead(ahead, ahead_text, recomputed) if input_needed else None
    return block.backward(grad.contiguous(), saved, needed, prefetch, bias_needed=output_needed[1])


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
    config_key: str,
    settings_key: str,
    head_groups: int,
    input_needed: bool,
    weights_needed: Sequence[bool],
    biases_needed: Sequence[bool],
    output_needed: Sequence[bool],
    norms_needed: bool,
    ahead: Sequence[Tensor],
    ahead_text: str,
    recomputed: Tensor,
) -> list[Tensor]:
    world = group_by_name(group_name).size()
    return [
        x.new_empty(x.shape if input_needed else (0,)),
        *_several.empty_gradients(weights, weights_needed, biases_needed),
        output_weight.new_empty(output_weight.shape if output_needed[0] else (0,)),
        *(norm.new_empty(norm.shape if norms_needed else (0,)) for norm in head_norms),
        grad.new_empty(output_weight.shape[0] // world if output_needed[1] else 0),
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
    ctx.result = output[0].shape


def _autograd_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, wq, wk, wv, output_weight, documents, *rest = ctx.saved_tensors
    rotations, norms = ctx.counts
    rotation, head_norms, saved = rest[:rotations], rest[rotations : rotations + norms], rest[rotations + norms :]
    recomputed = saved.pop()
    grad = x.new_zeros(ctx.result) if grads[0] is None else grads[0]
    dx, *found, doutput_bias = torch.ops.odysseus.pipelined_ulysses_backward(
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
        found[6] if ctx.output_needed[0] else None,
        doutput_bias if ctx.output_needed[1] else None,
        [None] * rotations,
        [one if ctx.norms_needed else None for one in found[7:]],
        *[None] * 6,
        [None] * len(ctx.ahead[0]),
        None,
    )


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, NAME)
