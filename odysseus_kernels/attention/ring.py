"""Ring attention: each rank holds a part of the sequence, and keys and values of one rank after another come by.

Of a rank's keys only those parts come of which some are seen: all ranks decide it alike before anything is sent
(:func:`~odysseus_kernels.attention.layout.seen_parts`).  They come from their owner, not from the rank before, so that
what one rank needs does not depend on others'.

While queries meet one rank's keys and values, the next rank's travel; in backward the gradients of the keys and values
just used travel back meanwhile.  One :class:`~odysseus_kernels.comm.exchange.Exchange` each way.  Beside inputs,
outputs and gradients a rank holds the output, or dq, dk and dv, in fp32, and what the transport has in flight: nothing
is as long as the whole sequence but the documents' ids.

Concurrency contract: visits run on the calling thread, one at a time; a visited rank's keys and values are the
transport's memory, read within the visit only.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.attention.checks import check_ring_attention
from odysseus_kernels.attention.layout import Layout, with_key_mask
from odysseus_kernels.attention.parts import cut_of, exchange_of, seen_of
from odysseus_kernels.attention.unfused import add_up, gather_all
from odysseus_kernels.attention.visits import Visits
from odysseus_kernels.comm.arguments import check_config, check_tensors, refuse_second_derivative, under_autocast
from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.groups import dispatch, resolve_group
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.comm.transport import Call, Transport
from odysseus_kernels.config import OverlapConfig

__all__ = ["ring_attention"]

_NAME = "ring_attention"
_COLLECTIVE = "send_recv"


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    causal: bool = True,
    layout: Layout = "zigzag",
    documents: Tensor | None = None,
    key_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: int | None = None,
    first_head: int = 0,
    kernel: str = "sdpa",
    config: OverlapConfig | None = None,
) -> Tensor:
    """Attention over a sequence that is cut over R ranks, differentiable.

    B sequences of L tokens, S = L/R of them here; Hq query heads, Hkv key/value heads, widths D and Dv.

    forward:         out [B, Hq, S, Dv] = softmax(scale * q [B, Hq, S, D] @ all k.T, masked) @ all v, each rank's keys
                     merged by log-sum-exp in fp32, rounded once
    query gradient:  dq [B, Hq, S, D], added over the ranks visited in fp32
    key gradient:    dk [B, Hkv, S, D], made by every rank for its own queries and added here in fp32
    value gradient:  dv [B, Hkv, S, Dv], the same

    Elements sent by each rank (``send_recv``): B*Hkv*S*(D+Dv) to each of R-1 ranks, forward and again in backward, and
    there once more, for dk and dv.  A window and documents hide some of a rank's S keys from others: they are then cut
    into up to 8 parts of some 512 keys or more, B*Hkv*n*(D+Dv) elements for n keys, and a part travels only to ranks
    that see one of its keys, its gradients only from them.  (A contiguous causal layout hides all or none.)  dk and dv
    go straight to their owner, in fp32 (fp64 for fp64): rounded to 16 bits each, the shares of R ranks would add up to
    less than an unsharded run gives.  A ring's accumulator would make one hop more.

    Args:
        q: [B, Hq, S, D], this rank's tokens in ``layout``'s order.
        k: [B, Hkv, S, D]; Hkv divides Hq.
        v: [B, Hkv, S, Dv].
        group: the ring; None is the default group.
        causal: a query sees keys up to its own position.
        layout: ``"zigzag"``: of 2R blocks, rank i holds i and 2R-1-i, which balances causal work; ``"contiguous"``.
        documents: integers [B, L], ids of packed documents for the *whole* sequence in natural order, the same on every
            rank; a query sees keys of its own document only.
        key_mask: bool or integers [B, L], of the whole sequence like ``documents``: no query sees a key whose entry is
            0.  The output of a query that sees nothing is 0, as in ``scaled_dot_product_attention``.
        window: a query at position p sees keys p-window+1 to p (transformers' ``sliding_window``); with ``causal``.
        scale: of the scores; None is 1/sqrt(D).
        dropout: probability with which attention probabilities are dropped.
        dropout_seed: needed with ``dropout``, the same on every rank, another one for each layer and step.  What is
            dropped depends on it, the head and the positions, not on the number of ranks.
        first_head: which head of the whole model the first head of q is, where heads are split over other ranks.
        kernel: ``"sdpa"`` (PyTorch's flash kernels) or ``"flash_attention_2"`` (package flash-attn, CUDA).
        config: mode, transport, time limit.  ``"unfused"`` gathers all keys and values first.

    Returns:
        [B, Hq, S, Dv].

    Raises:
        ValueError: bad input, before anything is sent.
        CommunicationError: ranks differ in what they call (documents, dropout and seed included), or a peer is lost or
            silent.

    Example:
        >>> q, kv = torch.ones(1, 4, 8, 16), torch.ones(1, 2, 8, 16)  # this rank's 8 of 16 tokens
        >>> documents = torch.tensor([[0] * 10 + [1] * 6])  # of all 16, in their natural order
        >>> ody.ring_attention(q, kv, kv, group=group, documents=documents).shape
        torch.Size([1, 4, 8, 16])
    """
    check_tensors(_NAME, q=q, k=k, v=v, documents=documents)
    settled = check_config(config)
    q, k, v = under_autocast(q.device, q, k, v)
    resolved = resolve_group(group)
    check_ring_attention(
        q, k, v, resolved.size(), causal, layout, documents, key_mask, window, scale, dropout, dropout_seed, first_head,
        kernel, settled,
    )  # fmt: skip
    out, _ = torch.ops.odysseus.ring_attention(
        q,
        k,
        v,
        with_key_mask(documents, key_mask),
        resolved.group_name,
        settled.key(),
        causal,
        layout,
        window,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        float(dropout),
        0 if dropout_seed is None else dropout_seed,
        first_head,
        kernel,
    )
    return cast(Tensor, out)


def _group_by_name(name: str) -> dist.ProcessGroup:
    return torch._C._distributed_c10d._resolve_process_group(cast(Any, name))


def _output(q: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, Hq, S, Dv], laid out as [B, S, Hq, Dv]: what follows reads heads side by side, and keeps no copy of it."""
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, heads, v.shape[-1]), dtype=dtype).transpose(1, 2)


def _shapes(visits: Visits, q: Tensor) -> str:
    """What must be equal on all ranks beside keys and values."""
    settings = f"causal={visits.causal}, {visits.layout}, window={visits.window}, scale={visits.scale:.6g}"
    parts = [f"q {list(q.shape)}", settings]
    if visits.dropout:
        parts.append(f"dropout {visits.dropout}, seed {visits.seed}, first_head {visits.first_head}")
    if visits.host_documents is not None:
        ids = visits.host_documents.contiguous().numpy().tobytes()
        parts.append(f"documents {hashlib.blake2b(ids, digest_size=6).hexdigest()}")
    return ", ".join(parts)


def _phase(phase: Literal["forward", "backward"], q: Tensor, k: Tensor, v: Tensor, world: int, visits: Visits) -> Phase:
    causal = visits.causal
    # With a window less travels, and another mode may be the faster one.
    window = "" if visits.window is None else f", window={visits.window}"
    nbytes = k.nbytes + v.nbytes
    products = 2 if phase == "forward" else 5
    return Phase(
        operator=_NAME,
        phase=phase,
        shapes=f"q {list(q.shape)}, k {list(k.shape)}, causal={causal}{window}",
        own="",
        dtype=q.dtype,
        flops=2 * products * q.numel() * k.shape[2] * world // (2 if causal else 1),
        gathered_bytes=nbytes,
        scattered_bytes=(k.numel() + v.numel()) * accumulator_dtype(q.dtype).itemsize if phase == "backward" else 0,
    )


@torch.library.custom_op("odysseus::ring_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    group_name: str,
    config_key: str,
    causal: bool,
    layout: str,
    window: int | None,
    scale: float,
    dropout: float,
    seed: int,
    first_head: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, S, Dv], log-sum-exp [B, Hq, S] in fp32)."""
    group, config = _group_by_name(group_name), OverlapConfig.from_key(config_key)
    visits = Visits(documents, causal, layout, window, scale, dropout, seed, first_head, kernel)
    shapes = _shapes(visits, q)
    shared = (k.contiguous(), v.contiguous())
    wide = accumulator_dtype(q.dtype)
    out = _output(q, v, wide)
    lse = q.new_empty(q.shape[:-1], dtype=wide)

    def run(transport: Transport, settled: OverlapConfig) -> None:
        me, world = transport.rank, transport.world
        parts = visits.parts(world, q.shape[2])
        out.zero_()
        lse.fill_(-math.inf)

        def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            if rank == me:
                visits.forward(me, me, world, q, *shared, out, lse)
                return
            for part, (keys, values) in seen_of(parts, me, rank, given):
                visits.forward(me, rank, world, q, keys, values, out, lse, part.rows)

        exchange = exchange_of(parts, visit, shared)
        call = Call(_NAME, "forward", settled, shapes=shapes, collective=_COLLECTIVE, exchange=exchange)
        if settled.mode != "unfused":
            transport.execute(call)
            return
        whole = gather_all(transport, call, shared, parts)
        for rank in (*range(me, world), *range(me)):
            visit(rank, cut_of(parts, [x[rank] for x in whole]), ())

    dispatch(group, config, q.device, run, _phase("forward", q, k, v, group.size(), visits))
    return out.to(q.dtype), lse


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    group_name: str,
    config_key: str,
    causal: bool,
    layout: str,
    window: int | None,
    scale: float,
    dropout: float,
    seed: int,
    first_head: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    return _output(q, v, q.dtype), q.new_empty(q.shape[:-1], dtype=accumulator_dtype(q.dtype))


@torch.library.custom_op("odysseus::ring_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    group_name: str,
    config_key: str,
    causal: bool,
    layout: str,
    window: int | None,
    scale: float,
    dropout: float,
    seed: int,
    first_head: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    group, config = _group_by_name(group_name), OverlapConfig.from_key(config_key)
    visits = Visits(documents, causal, layout, window, scale, dropout, seed, first_head, kernel)
    shapes = _shapes(visits, q)
    shared = (k.contiguous(), v.contiguous())
    wide = accumulator_dtype(q.dtype)
    sums = (torch.empty_like(shared[0], dtype=wide), torch.empty_like(shared[1], dtype=wide))
    dq = q.new_empty(q.shape, dtype=wide)

    def run(transport: Transport, settled: OverlapConfig) -> None:
        me, world = transport.rank, transport.world
        parts = visits.parts(world, q.shape[2])
        dq.zero_()

        def visit_own(dk: Tensor, dv: Tensor) -> None:
            visits.backward(me, me, world, grad, q, *shared, out, lse, dq, dk, dv)

        def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            if rank == me:
                visit_own(*sums)
                return
            for part, (keys, values, dk, dv) in seen_of(parts, me, rank, given, made):
                visits.backward(me, rank, world, grad, q, keys, values, out, lse, dq, dk, dv, part.rows)

        exchange = exchange_of(parts, visit, shared, sums)
        call = Call(_NAME, "backward", settled, shapes=shapes, collective=_COLLECTIVE, exchange=exchange)
        if settled.mode != "unfused":
            transport.execute(call)
            return
        whole = gather_all(transport, call, shared, parts)
        made = [torch.empty_like(x, dtype=wide) for x in whole]
        for rank in (*range(me + 1, world), *range(me)):
            visit(rank, cut_of(parts, [x[rank] for x in whole]), cut_of(parts, [x[rank] for x in made]))
        visit_own(*(x[me] for x in made))
        add_up(transport, call, made, sums, parts)

    dispatch(group, config, q.device, run, _phase("backward", q, k, v, group.size(), visits))
    return dq.to(q.dtype), sums[0].to(k.dtype), sums[1].to(v.dtype)


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    group_name: str,
    config_key: str,
    causal: bool,
    layout: str,
    window: int | None,
    scale: float,
    dropout: float,
    seed: int,
    first_head: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, documents, *ctx.settings = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, documents)
    ctx.mark_non_differentiable(lse)


def _autograd_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, documents = ctx.saved_tensors
    # All three, whichever are wanted: what ranks make for each other must not depend on what one of them wants.
    results = torch.ops.odysseus.ring_attention_backward(grad, q, k, v, out, lse, documents, *ctx.settings)
    wanted = (result if needed else None for result, needed in zip(results, ctx.needs_input_grad[:3], strict=True))
    return *wanted, *[None] * (1 + len(ctx.settings))


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, _NAME)
