"""Masks of whole sequences, for attention functions that take all keys at once.

They are transformers' own.  In rows of several completions that share their prompt (``data/shared_prefix.py``) tokens
see the prompt and their own completion.  That is no causal mask of documents, and needs a function that takes any mask.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from odysseus_kernels.nn.cut import SequenceCut
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.sequence import SHARED_PREFIX

__all__ = ["check_shared_prefix", "sees_prefix_and_own", "whole_masks"]

_MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)
_TAKE_MASKS = ("sdpa", "eager", "flex_attention")


def whole_masks(
    config: Any,
    kinds: list[str],
    outline: torch.Tensor,
    positions: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    real: int | None,
    visible: Callable[..., Any] | None,
) -> dict[str, Any]:
    """Masks by kind of layer, for whatever attention function is configured.

    Args:
        config: the model's.
        kinds: of layers that there are.
        outline: stands for the embeddings of the whole sequences.
        positions: [B or 1, L], which show documents.
        attention_mask: [B, L] of padding, or None.
        real: tokens before padding at the end, or None where there is none.
        visible: what else decides whether a query sees a key, or None.
    """
    arguments = {
        "config": config,
        "inputs_embeds": outline,
        "attention_mask": attention_mask,
        "past_key_values": None,
        "position_ids": positions,
        # Earlier versions of transformers 5 ask for it.
        "cache_position": torch.arange(outline.shape[1], device=outline.device),
    }
    arguments = {name: value for name, value in arguments.items() if name in _MASK_ARGUMENTS}
    if visible is not None:
        arguments["and_mask_function"] = visible
    makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    masks = {kind: makers[kind](**arguments) for kind in kinds}
    if real is not None:
        # An additive mask hides keys with the lowest number; a query from which all are hidden attends to all
        # equally: to those that there are without padding.
        padding = torch.arange(outline.shape[1], device=outline.device) >= real
        for mask in masks.values():
            if isinstance(mask, torch.Tensor) and mask.is_floating_point():
                mask.masked_fill_(padding, -math.inf)
    return masks


def sees_prefix_and_own(numbers: torch.Tensor) -> Callable[..., Any]:
    """For ``numbers`` [B, L] whether a query sees a key that is no later, as transformers asks it."""

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = numbers[batch, key]
        return (seen == 0) | (seen == numbers[batch, query])

    return visible


def check_shared_prefix(
    kernel: str,
    group: SequenceGroup,
    cut: SequenceCut,
    kinds: list[str],
    attention_mask: torch.Tensor | None,
    head_groups: int = 1,
) -> None:
    """Raises ValueError where a row's prompt cannot be shared.

    Args:
        kernel: transformers' name of the attention function.
        group: the ranks.
        cut: how the batch is cut.
        kinds: of the model's layers.
        attention_mask: of the batch, or None.
        head_groups: in which attention is pipelined.
    """
    if attention_mask is not None:
        raise ValueError(
            f"{SHARED_PREFIX}: expected no attention_mask beside it, which says who sees whom, got one: rows are "
            f"filled up at their end, where nobody sees it"
        )
    if "sliding_attention" in kinds:
        raise ValueError(
            f"{SHARED_PREFIX}: expected layers that see all of the sequence, got a sliding window, which counts tokens "
            f"of other completions: repeat the prompt in a row for each completion"
        )
    if max(cut.pieces, head_groups) > 1:
        got = f"{cut.pieces} pieces" if cut.pieces > 1 else f"{head_groups} groups of heads"
        raise ValueError(
            f"{SHARED_PREFIX}: expected attention that is not pipelined, got {got}: cut the batch with "
            f"pieces=1, and parallelize with pipeline=None or 'auto'"
        )
    if group.zigzag_size > 1 and not (group.folded and kernel == "eager"):
        more = 'use attn_implementation="eager", which takes all keys at once' if group.folded else (
            "repeat the prompt in a row for each completion"
        )  # fmt: skip
        raise ValueError(
            f"{SHARED_PREFIX}: expected ranks that see whole sequences, got Ring attention, which knows documents of "
            f"their own only: {more}"
        )
    if kernel not in _TAKE_MASKS:
        raise ValueError(
            f"{SHARED_PREFIX}: expected an attention function that takes any mask, one of {', '.join(_TAKE_MASKS)}, "
            f"got {kernel!r}"
        )
