"""Log-probabilities of given ids, entropy and the likeliest ids of a linear head's distributions, without its logits.

Where the weight lies decides what travels.  ``"whole"``: nothing.  ``"zero3"``: every rank has rows of its own, and the
parts of the weight visit them, each once in forward and once in backward however many chunks of rows there are.
``"vocab_parallel"``: every rank has the same rows and a part of the vocabulary, and statistics of the rows travel.

What is given to a visit is a peer's memory or a buffer of the transport, read on the calling thread until the visit
returns; gradients of the weight leave while the next part is multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm import functional
from odysseus_kernels.comm.arguments import check_config, check_tensors, refuse_second_derivative, under_autocast
from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.groups import dispatch, resolve_group
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.comm.transport import Call, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops._ahead import Shards, take_ahead, tell_ahead
from odysseus_kernels.ops._cross_entropy import add_gradients, check_targets, loss_config, loss_phase
from odysseus_kernels.ops._exchange import execute_exchange
from odysseus_kernels.ops._row_statistics import RowStatistics, check_row_input, logits_gradient
from odysseus_kernels.ops._validate import group_by_name

__all__ = ["LogProbs", "Placement", "linear_log_probs"]

_NAME = "linear_log_probs"

Placement = Literal["whole", "zero3", "vocab_parallel"]


class LogProbs(NamedTuple):
    """Of the distribution of each row, in fp32 (fp64 for fp64).

    Attributes:
        log_probs: [..., K], of the ids that were given, 0 where there was none; with a gradient.
        entropy: [...], in nats, with a gradient; None where it was not asked for.
        is_top: bool [..., K], whether no id is likelier than the one that was given; False where there was none.
        top_ids: int64 [..., k], the likeliest ids, the likeliest first; of equally likely ones any.
        top_log_probs: [..., k], theirs, without a gradient.
    """

    log_probs: Tensor
    entropy: Tensor | None
    is_top: Tensor
    top_ids: Tensor
    top_log_probs: Tensor


def linear_log_probs(
    hidden: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None,
    placement: Placement,
    temperature: float = 1.0,
    entropy: bool = False,
    top_k: int = 0,
    ignore_index: int = -100,
    chunk_rows: int = 1024,
    config: OverlapConfig | None = None,
    prefetch_backward: Shards = None,
) -> LogProbs:
    """Log-probabilities under p = softmax((hidden @ W.T + b) / temperature), where W, b are all ranks' rows of a head.

    N ranks; R rows; K ids for each; d features; V rows of the vocabulary.

    forward:          log_probs [R, K]  = log p[id]
                      entropy [R]       = -sum of p * log p
    input gradient:   dhidden [R, d]    = dlogits @ W, with vocab_parallel added over the ranks; dlogits =
                                          (sum over k of grad_k * (onehot(id_k) - p)
                                          - grad_entropy * p * (log p + entropy)) / temperature
    weight gradient:  dweight           = dlogits.T @ hidden, added in fp32; zero3 [V/N, d]: RS, the sum over all ranks'
                                          rows; else of this rank's rows of the weight, and nothing is sent
    bias gradient:    dbias             = sum of dlogits, likewise

    Backward computes the logits again, once for both gradients.  Kept for it are the inputs and two numbers a row.

    Args:
        hidden: [..., d]; zero3: this rank's rows, as many as it has; vocab_parallel: the same on every rank.
        ids: [..., K], integers below V, or ``ignore_index``; K may be 0.
        weight: whole: [V, d]; else [V/N, d], this rank's rows of the vocabulary.
        bias: [V] or [V/N], or None.
        group: the ranks; None is the default group. Not used with whole weights.
        placement: ``"whole"``, ``"zero3"`` or ``"vocab_parallel"``.
        temperature: that logits are divided by, above 0.
        entropy: whether it is wanted, which costs one pass over the logits more.
        top_k: how many of the likeliest ids are wanted, up to V.
        ignore_index: an id that stands for none.
        chunk_rows: rows whose logits are held at a time.
        config: mode, transport, pieces, time limit; mode ``"tiles"`` means ``"fused"`` here.
        prefetch_backward: as in :func:`zero3_linear_cross_entropy`, with zero3.

    Raises:
        ValueError: bad input, before anything is sent; ids outside of the vocabulary are found on the CPU and make
            log-probabilities minus infinity elsewhere.
        CommunicationError: ranks differ in what they call, or a peer is lost or silent.
    """
    check_tensors(_NAME, hidden=hidden, ids=ids, weight=weight, bias=bias)
    key = check_config(config).key()
    ahead = tell_ahead(_NAME, weight, None, prefetch_backward)
    hidden, weight, bias = under_autocast(hidden.device, hidden, weight, bias)
    if placement not in get_args(Placement):
        raise ValueError(f"{_NAME}: expected placement to be one of {get_args(Placement)}, got {placement!r}")
    resolved = None if placement == "whole" else resolve_group(group)
    vocabulary = weight.shape[0] * (1 if resolved is None else resolved.size()) if weight.ndim else 0
    check_row_input(_NAME, hidden, ids, weight, bias, vocabulary, temperature, top_k, chunk_rows)
    shape, count = ids.shape[:-1], ids.shape[-1]
    log_probs, entropies, is_top, top_ids, top, _ = torch.ops.odysseus.linear_log_probs(
        hidden.reshape(math.prod(shape), hidden.shape[-1]),
        ids.reshape(math.prod(shape), count).long(),
        weight,
        bias,
        placement,
        "" if resolved is None else resolved.group_name,
        key,
        float(temperature),
        entropy,
        top_k,
        ignore_index,
        chunk_rows,
        *ahead,
    )
    return LogProbs(
        log_probs.view(ids.shape),
        entropies.view(shape) if entropy else None,
        is_top.view(ids.shape),
        top_ids.view(*shape, top_k),
        top.detach().view(*shape, top_k),
    )


def _settings(temperature: float, entropy: bool, top_k: int, ids: Tensor, ignore_index: int) -> str:
    """What every rank assumes that the others compute."""
    return f"{ids.shape[1]} ids, ignore_index {ignore_index}, temperature {temperature}, entropy {entropy}, top {top_k}"


@torch.library.custom_op("odysseus::linear_log_probs", mutates_args=())
def _forward(
    hidden: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    placement: str,
    group_name: str,
    config_key: str,
    temperature: float,
    entropy: bool,
    top_k: int,
    ignore_index: int,
    chunk_rows: int,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(log_probs [R, K], entropy [R] or [0], is_top [R, K], top_ids and top_log_probs [R, k], logsumexp [R])."""
    config, count, scale = loss_config(config_key), weight.shape[0], 1.0 / temperature
    group = None if placement == "whole" else group_by_name(group_name)
    check_targets(_NAME, ids, count * (1 if group is None else group.size()), ignore_index, name="ids")
    # The largest logit, by which is_top is judged, is always wanted.
    statistics = RowStatistics.empty(hidden, ids, entropy=entropy, top_k=max(1, top_k))
    shapes = _settings(temperature, entropy, top_k, ids, ignore_index)

    if group is None or placement == "vocab_parallel":
        first = 0 if group is None else group.rank() * count
        with torch.autocast(hidden.device.type, enabled=False):
            statistics.add_part(hidden, ids, weight, bias, first, scale, chunk_rows)
        if group is not None:
            statistics = _over_ranks(statistics, ids, group, config, shapes)
    else:

        def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            statistics.add_part(hidden, ids, *_weight_and_bias(given), rank * count, scale, chunk_rows)

        def run(transport: Transport, settled: OverlapConfig) -> None:
            statistics.reset()
            exchange = Exchange(visit, shared=_shared(weight, bias))
            execute_exchange(transport, Call(_NAME, "forward", settled, shapes=shapes, exchange=exchange))

        phase = loss_phase(_NAME, "forward", hidden.shape[0] * group.size(), weight, weight.nbytes, 0)
        dispatch(group, config, hidden.device, run, phase)
    top = statistics.top[:, :top_k] - statistics.log_sums[:, None]
    is_top = statistics.is_top().logical_and_(ids != ignore_index)
    top_ids = statistics.top_ids[:, :top_k].clone()
    return statistics.log_probs(ids, ignore_index), statistics.entropy, is_top, top_ids, top, statistics.log_sums


def _over_ranks(
    own: RowStatistics, ids: Tensor, group: dist.ProcessGroup, config: OverlapConfig, shapes: str
) -> RowStatistics:
    """The statistics of all ranks' parts, merged in the order of ranks: the same bits on every rank."""
    entropy = own.entropy[:, None] if own.entropy.numel() else own.found.new_empty((own.found.shape[0], 0))
    packed = torch.cat((own.log_sums[:, None], entropy, own.found, own.top), 1)
    numbers = functional.all_gather(packed[None], group, operator=_NAME, config=config, shapes=shapes)
    top_ids = functional.all_gather(own.top_ids[None], group, operator=_NAME, config=config, shapes=shapes)
    sizes = (1, entropy.shape[1], own.found.shape[1], own.top.shape[1])
    total = RowStatistics.empty(own.found, ids, entropy=bool(entropy.shape[1]), top_k=own.top.shape[1])
    for part, part_ids in zip(numbers, top_ids, strict=True):
        log_sums, entropies, found, top = part.split(sizes, 1)
        total.merge(RowStatistics(log_sums[:, 0], entropies.reshape(-1), found, top, part_ids))
    return total


def _shared(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(part.contiguous() for part in ((weight,) if bias is None else (weight, bias)))


def _weight_and_bias(given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    return given[0], given[1] if len(given) > 1 else None


@_forward.register_fake
def _(
    hidden: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    placement: str,
    group_name: str,
    config_key: str,
    temperature: float,
    entropy: bool,
    top_k: int,
    ignore_index: int,
    chunk_rows: int,
    ahead: Sequence[Tensor],
    ahead_text: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, wide = hidden.shape[0], accumulator_dtype(hidden.dtype)
    return (
        hidden.new_empty(ids.shape, dtype=wide),
        hidden.new_empty(rows if entropy else 0, dtype=wide),
        ids.new_empty(ids.shape, dtype=torch.bool),
        ids.new_empty((rows, top_k)),
        hidden.new_empty((rows, top_k), dtype=wide),
        hidden.new_empty(rows, dtype=wide),
    )


@torch.library.custom_op("odysseus::linear_log_probs_backward", mutates_args=())
def _backward(
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    ids: Tensor,
    log_sums: Tensor,
    entropies: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    placement: str,
    group_name: str,
    config_key: str,
    temperature: float,
    entropy: bool,
    top_k: int,
    ignore_index: int,
    chunk_rows: int,
    ahead: Sequence[Tensor],
    ahead_text: str,
    hidden_needed: bool,
    weight_needed: bool,
    bias_needed: bool,
) -> list[Tensor]:
    """[dhidden, dweight, dbias]; an empty tensor stands for a gradient that is not needed."""
    config, count, scale = loss_config(config_key), weight.shape[0], 1.0 / temperature
    group = None if placement == "whole" else group_by_name(group_name)
    wide, travels = accumulator_dtype(hidden.dtype), placement == "zero3"
    shapes = _settings(temperature, entropy, top_k, ids, ignore_index)
    if grad_log_probs is None:
        grad_log_probs = log_sums.new_zeros(ids.shape)
    grads = grad_log_probs.masked_fill(ids == ignore_index, 0.0)
    dhidden = hidden.new_zeros(hidden.shape if hidden_needed else (0,), dtype=wide)
    # Gradients that travel do so in the weight's type; what each rank makes is added over chunks of rows in fp32.
    made_as = weight.dtype if travels else wide
    dweight = weight.new_zeros(weight.shape if weight_needed else (0,), dtype=made_as)
    dbias = weight.new_zeros((count,) if bias_needed else (0,), dtype=made_as)
    sums = (*((dweight,) if weight_needed else ()), *((dbias,) if bias_needed else ()))

    def add(weight: Tensor, bias: Tensor | None, first: int, totals: Sequence[Tensor]) -> None:
        def dlogits_of(rows: slice) -> Tensor:
            return logits_gradient(
                hidden[rows],
                ids[rows],
                weight,
                bias,
                first,
                scale,
                log_sums=log_sums[rows],
                entropy=entropies[rows],
                grad_log_probs=grads[rows],
                grad_entropy=None if grad_entropy is None or not entropy else grad_entropy[rows],
            )

        add_gradients(
            dlogits_of,
            hidden,
            weight,
            chunk_rows,
            dhidden=dhidden if hidden_needed else None,
            dweight=totals[0] if weight_needed else None,
            dbias=totals[-1] if bias_needed else None,
        )

    if group is None or not travels:
        with torch.autocast(hidden.device.type, enabled=False):
            add(weight, bias, 0 if group is None else group.rank() * count, sums)
        dhidden = dhidden.to(hidden.dtype)
        if group is not None and hidden_needed:
            dhidden = functional.all_reduce(
                dhidden, group, operator=_NAME, phase="backward", config=config, shapes=shapes
            )
        return [dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)]
    held = None if wide == made_as else [torch.empty_like(part, dtype=wide) for part in sums]
    prefetch = take_ahead(ahead, ahead_text, "backward") if hidden_needed else None

    def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        totals = [part.zero_() for part in (made if held is None else held)]
        add(*_weight_and_bias(given), rank * count, totals)
        if held is not None:
            for part, total in zip(made, totals, strict=True):
                part.copy_(total)

    def run(transport: Transport, settled: OverlapConfig) -> None:
        dhidden.zero_()
        exchange = Exchange(visit, shared=_shared(weight, bias), sums=sums)
        call = Call(_NAME, "backward", settled, shapes=shapes, exchange=exchange, prefetch=prefetch)
        execute_exchange(transport, call)

    nbytes = sum(part.nbytes for part in sums)
    phase = loss_phase(_NAME, "backward", hidden.shape[0] * group.size(), weight, weight.nbytes, nbytes)
    dispatch(group, config, hidden.device, run, phase)
    return [dhidden.to(hidden.dtype), dweight, dbias]


@_backward.register_fake
def _(
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    ids: Tensor,
    log_sums: Tensor,
    entropies: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    placement: str,
    group_name: str,
    config_key: str,
    temperature: float,
    entropy: bool,
    top_k: int,
    ignore_index: int,
    chunk_rows: int,
    ahead: Sequence[Tensor],
    ahead_text: str,
    hidden_needed: bool,
    weight_needed: bool,
    bias_needed: bool,
) -> list[Tensor]:
    return [
        hidden.new_empty(hidden.shape if hidden_needed else (0,)),
        weight.new_empty(weight.shape if weight_needed else (0,)),
        weight.new_empty(weight.shape[:1] if bias_needed else (0,)),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, ids, weight, bias, *ctx.settings = inputs
    ctx.save_for_backward(hidden, ids, output[5], output[1], weight, bias)


def _autograd_backward(
    ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    needed = [ctx.needs_input_grad[index] for index in (0, 2, 3)]
    results = torch.ops.odysseus.linear_log_probs_backward(
        grad_log_probs, grad_entropy, *ctx.saved_tensors, *ctx.settings, *needed
    )
    dhidden, dweight, dbias = (result if wanted else None for result, wanted in zip(results, needed, strict=True))
    nothing = [None] * (len(ctx.settings) - 2)
    return dhidden, None, dweight, dbias, *nothing, [None] * len(ctx.settings[-2]), None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, _NAME)
