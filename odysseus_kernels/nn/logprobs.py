"""Log-probabilities and distributions of the tokens of a sequence, for policies, preferences and distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import nn

from odysseus_kernels.nn.cut import KEY, SequenceCut
from odysseus_kernels.nn.gather import gather_sequence
from odysseus_kernels.nn.loss import IGNORE_INDEX
from odysseus_kernels.nn.step import sequence_group_of
from odysseus_kernels.nn.token_statistics import TokenRequest, TokenStatistics

__all__ = ["sequence_logprobs"]


@overload
def sequence_logprobs(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    gather: bool = True,
    entropy: Literal[False] = False,
    top_k: Literal[0] = 0,
    top1: Literal[False] = False,
    temperature: float = 1.0,
    ids: None = None,
    **arguments: Any,
) -> torch.Tensor: ...


@overload
def sequence_logprobs(  # type: ignore[overload-overlap]
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    gather: bool = True,
    entropy: bool = False,
    top_k: int = 0,
    top1: bool = False,
    temperature: float = 1.0,
    ids: torch.Tensor | None = None,
    **arguments: Any,
) -> TokenStatistics: ...


def sequence_logprobs(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    gather: bool = True,
    entropy: bool = False,
    top_k: int = 0,
    top1: bool = False,
    temperature: float = 1.0,
    ids: torch.Tensor | None = None,
    **arguments: Any,
) -> torch.Tensor | TokenStatistics:
    """Log-probability that the model gives each next token, with a gradient; logits never exist whole.

    forward:   logprobs [B, L-1]: at t that of token t + 1, given those up to t; 0 where the label is -100
    gradient:  as of the single process, if every rank computes the same from the result

    On request also entropies (a bonus), the likeliest tokens (a teacher's), whether the next token is the likeliest,
    and the log-probabilities of other tokens (a student's of its teacher's likeliest, for a divergence over these).
    All come from one pass over the logits, a chunk of rows at a time, and one more for gradients: weights of a head
    that is cut are gathered once in each, or not at all with ``"tp"``, where statistics of the rows travel instead.

    Args:
        model: what :func:`odysseus_kernels.parallelize` returned, or a wrapper around it, such as FSDP2's.
        batch: what :func:`~odysseus_kernels.shard_sequence` made of ``input_ids`` and ``labels``, which are the tokens
            themselves, -100 where none is wanted (in prompts, for instance). Labels may be left out where log-
            probabilities of ``ids``, entropies or the likeliest tokens are asked for.
        gather: whether the whole sequences are returned, in their order, on every rank; else this rank's part [B, s].
            What is computed from parts counts for all ranks together: their sums are added.
        entropy: whether the entropy of each token's distribution is wanted, with a gradient.
        top_k: how many of the likeliest tokens are wanted, with their log-probabilities, without a gradient.
        top1: whether it is wanted whether no token is likelier than the next one.
        temperature: that logits are divided by before everything else.
        ids: tokens whose log-probabilities are wanted, -100 for none: [B, L-1, k], the same on every rank; without
            ``gather`` this rank's part [B, s, k].
        **arguments: further ones of the model's call.

    Returns:
        [B, L-1] or [B, s], in fp32 (fp64 for fp64); or, where more than this is asked for, a named tuple of
        ``logprobs``, ``entropy``, ``top_ids``, ``top_logprobs``, ``is_top1`` and ``id_logprobs``
        (:class:`~odysseus_kernels.nn.token_statistics.TokenStatistics`), None for what is not.

    Raises:
        ValueError: if the model is not parallelized, the batch was not cut, has no labels or was cut for another
            mesh, or what is asked for is no number of tokens, no temperature, or of another shape.
        CommunicationError: ranks differ, or a peer is lost or silent.

    Example:
        >>> policy = ody.parallelize(model, mesh, "ulysses")
        >>> part = ody.shard_sequence({"input_ids": batch["input_ids"], "labels": batch["input_ids"]}, mesh, "ulysses")
        >>> logprobs = ody.sequence_logprobs(policy, part)
        >>> logprobs.shape
        torch.Size([2, 15])
        >>> (-logprobs.mean()).backward()

        A teacher's four likeliest tokens, and a student's divergence from it over these:

        >>> with torch.no_grad():
        ...     teacher = ody.sequence_logprobs(policy, part, top_k=4)
        >>> student = ody.sequence_logprobs(policy, part, ids=teacher.top_ids, entropy=True)
        >>> student.id_logprobs.shape, student.entropy.shape
        (torch.Size([2, 15, 4]), torch.Size([2, 15]))
        >>> terms = teacher.top_logprobs.exp() * (teacher.top_logprobs - student.id_logprobs)
        >>> terms.sum(-1).mean().backward()
    """
    sequence_group_of(model)
    asked = TokenRequest(entropy, top_k, top1, temperature)
    if ids is None and asked.is_plain:
        logprobs: torch.Tensor = -model(**batch, reduction="none", **arguments).loss
        return gather_sequence(logprobs, batch, model)[:, :-1] if gather else logprobs
    if ids is not None:
        asked = _with_ids(asked, ids, batch, whole=gather)
    if asked.ids is None and "shift_labels" not in batch and not (entropy or top_k):
        raise ValueError("batch: expected labels, the tokens whose log-probabilities are wanted, got none")
    outputs = model(**batch, token_statistics=asked, **arguments)
    found = TokenStatistics(*(getattr(outputs, name) for name in TokenStatistics._fields))
    if gather:
        found = TokenStatistics(*(None if x is None else gather_sequence(x, batch, model)[:, :-1] for x in found))
    if ids is None and found.logprobs is not None and not (entropy or top_k or top1):
        return found.logprobs
    return found


def _with_ids(asked: TokenRequest, ids: torch.Tensor, batch: Mapping[str, Any], *, whole: bool) -> TokenRequest:
    """The request with this rank's part of ``ids``, or with ``ids`` themselves where they are that already."""
    if not isinstance(ids, torch.Tensor) or ids.ndim != 3 or ids.dtype != torch.int64:
        got = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"ids: expected int64 of three dimensions, [batch, tokens, k], got {got}")
    own, same = ids, ""
    if whole:
        if KEY not in batch:
            raise ValueError(f"batch: expected what shard_sequence returned, with {KEY}, got the keys {sorted(batch)}")
        cut = SequenceCut.read(batch[KEY])
        if ids.shape[:2] != (len(cut.sums), cut.length - 1):
            raise ValueError(
                f"ids: expected [{len(cut.sums)}, {cut.length - 1}, k], for all tokens but the last, "
                f"got {list(ids.shape)}; a rank's part goes with gather=False"
            )
        own = F.pad(ids, (0, 0, 0, cut.padding + 1), value=IGNORE_INDEX)[:, cut.positions(ids.device)]
        same = TokenRequest.digest(ids)
    return TokenRequest(asked.entropy, asked.top_k, asked.top1, asked.temperature, own, same)
