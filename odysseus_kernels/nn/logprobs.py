"""Log-probabilities of the tokens of a sequence, for policies, preferences and distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from odysseus_kernels.nn.gather import gather_sequence
from odysseus_kernels.nn.step import sequence_group_of

__all__ = ["sequence_logprobs"]


def sequence_logprobs(
    model: nn.Module, batch: Mapping[str, Any], *, gather: bool = True, **arguments: Any
) -> torch.Tensor:
    """Log-probability that the model gives each next token, with a gradient; logits never exist whole.

    forward:   logprobs [B, L-1]: at t that of token t + 1, given those up to t; 0 where the label is -100
    gradient:  as of the single process, if every rank computes the same from the result

    Args:
        model: what :func:`odysseus_kernels.parallelize` returned, or a wrapper around it, such as FSDP2's.
        batch: what :func:`~odysseus_kernels.shard_sequence` made of ``input_ids`` and ``labels``, which are the tokens
            themselves, -100 where none is wanted (in prompts, for instance).
        gather: whether the whole sequences are returned, in their order, on every rank; else this rank's part [B, s].
            What is computed from parts counts for all ranks together: their sums are added.
        **arguments: further ones of the model's call.

    Returns:
        [B, L-1] or [B, s], in fp32 (fp64 for fp64).

    Raises:
        ValueError: if the model is not parallelized, or the batch was not cut, has no labels or was cut for another
            mesh.
        CommunicationError: ranks differ, or a peer is lost or silent.

    Example:
        >>> policy = ody.parallelize(model, mesh, "ulysses")
        >>> part = ody.shard_sequence({"input_ids": batch["input_ids"], "labels": batch["input_ids"]}, mesh, "ulysses")
        >>> logprobs = ody.sequence_logprobs(policy, part)
        >>> logprobs.shape
        torch.Size([2, 15])
        >>> (-logprobs.mean()).backward()
    """
    group = sequence_group_of(model)
    logprobs: torch.Tensor = -model(**batch, reduction="none", **arguments).loss
    if not gather:
        return logprobs
    return gather_sequence(logprobs, batch, group.mesh, group.config)[:, :-1]
