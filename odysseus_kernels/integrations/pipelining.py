"""Whether a model's attention can be pipelined, and in how many pieces."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from odysseus_kernels.attention.local import check_attention_kernel
from odysseus_kernels.comm.groups import between_hosts
from odysseus_kernels.integrations.calls import changed_call
from odysseus_kernels.nn.adapters import adapters_of
from odysseus_kernels.nn.attention import AttentionSpec, SequenceMask
from odysseus_kernels.nn.cut import KEY, SequenceCut
from odysseus_kernels.nn.head_parallel_attention import HeadParallelAttention
from odysseus_kernels.nn.step import Stepped
from odysseus_kernels.nn.zero3_attention import UlyssesAttention
from odysseus_kernels.ops._rotation import HeadNorm, rotate
from odysseus_kernels.planner.pipeline import fit_head_groups, pick_head_groups, pick_pieces

__all__ = ["Pipelined", "check_pieces", "exchanges_heads", "groups_of_batch", "head_groups", "why_whole_only"]


def why_whole_only(spec: AttentionSpec, attention: nn.Module) -> str:
    """Why a stock attention cannot be pipelined, found by trying what the block computes itself; empty if it can."""
    generator = torch.Generator().manual_seed(0)
    width = spec.head_dim
    x, y = (torch.randn(1, 2, 3, width, generator=generator) for _ in range(2))
    tables = torch.randn(2, 1, 3, width, generator=generator)
    try:
        rotated = spec.rotary(x, y, *tables)
    except (RuntimeError, TypeError, ValueError):
        return "its rotation takes other arguments than cos and sin of whole heads"
    for before, after in zip((x, y), rotated, strict=True):
        if not torch.allclose(after, rotate(before.transpose(1, 2), *tables).transpose(1, 2), rtol=1e-5, atol=1e-5):
            return "its rotation is not that of halves of heads against each other"
    for name in (spec.query_norm, spec.key_norm):
        if name is None:
            continue
        norm: Any = getattr(attention, name)
        eps = getattr(norm, "variance_epsilon", None)
        if eps is None or norm.weight.shape != (width,):
            return f"{name} is no RMS norm of a head"
        with torch.no_grad():
            sample = x.to(norm.weight)
            if not torch.allclose(norm(sample), HeadNorm(norm.weight, eps).forward(sample), rtol=1e-2, atol=1e-2):
                return f"{name} is no RMS norm of a head"
    return ""


class Pipelined(Stepped):
    """A parallelized model that says in how many pieces its attention takes a sequence."""

    def pieces_for(self, length: int) -> int:
        """Pieces in which its attention gathers sequences of ``length`` tokens.

        Raises:
            ValueError: its configuration names a number, and its attention cannot be pipelined.
        """
        group = self.sequence_group
        wanted = group.config.pipeline
        if wanted is None or wanted == 1 or group.size == 1:
            return 1
        if exchanges_heads(self):
            head_groups(self, length)  # may refuse; the sequence is not cut in another way
            return 1
        reason = _why_not(self)
        if reason:
            if wanted == "auto":
                return 1
            raise ValueError(f"pipeline={wanted}: attention cannot be pipelined: {reason}; use pipeline=None")
        return pick_pieces(length // group.ring_size) if wanted == "auto" else wanted

    def explain_pieces(self) -> str:
        """Whether and why attention is pipelined or not."""
        group = self.sequence_group
        wanted = group.config.pipeline
        reason = "the group has one rank" if group.size == 1 else _why_not(self)
        if wanted is None:
            reason = "the configuration says pipeline=None"
        if reason:
            return f"attention is not pipelined: {reason}"
        if exchanges_heads(self):
            return _explain_head_groups(self)
        if wanted != "auto":
            return f"attention is pipelined in {wanted} pieces, as the configuration says"
        chosen = ", ".join(f"{self.pieces_for(length)} for {length:,} tokens" for length in (1 << 12, 1 << 13, 1 << 16))
        return (
            f"attention is pipelined in as many pieces as a batch is striped in; shard_sequence(batch, model) takes "
            f"{chosen}, shard_sequence(batch, mesh) one, which is no pipeline"
        )


def check_pieces(model: Any, cut: SequenceCut) -> None:
    """Raises ValueError if ``model`` does not run batches that are striped as ``cut`` says."""
    config = model.sequence_group.config
    wanted = config.pipeline
    if exchanges_heads(model) and model.sequence_group.size > 1:
        if cut.pieces > 1:
            raise ValueError(
                f"{KEY}: this batch was cut in {cut.pieces} pieces, and strategy 'ulysses' takes none: its attention "
                f"is pipelined by groups of heads; cut it with shard_sequence(batch, model), or with pieces=1"
            )
        return
    allowed = wanted == "auto" or cut.pieces == (1 if wanted is None else wanted)
    if not allowed and model.sequence_group.size > 1:
        raise ValueError(
            f"{KEY}: this batch was cut in {cut.pieces} pieces, and the model is parallelized with "
            f"pipeline={wanted!r}: call shard_sequence(batch, model), which cuts as the model runs"
        )
    if cut.pieces == 1:
        return
    reason = _why_not(model)
    if reason:
        raise ValueError(
            f"{KEY}: this batch was cut in {cut.pieces} pieces, but attention cannot be pipelined: {reason}; cut "
            f"it with shard_sequence(batch, model), or with pieces=1"
        )


def exchanges_heads(model: Any) -> bool:
    """Whether attention is Ulysses', which is pipelined by groups of heads instead of pieces of the sequence."""
    return any(isinstance(attention, UlyssesAttention) for attention in _attentions(model))


def head_groups(model: Any, length: int) -> int:
    """Most groups of each rank's heads in which ``model``'s attention takes ``length`` tokens; 1: it takes all at once.

    Raises:
        ValueError: its configuration names a number, and its attention cannot be pipelined.
    """
    group = model.sequence_group
    wanted = group.config.pipeline
    if wanted is None or wanted == 1 or group.size == 1 or not exchanges_heads(model):
        return 1
    reason = _why_not(model)
    heads = _attentions(model)[0].attention_spec.kv_heads // group.size
    if wanted == "auto":
        return 1 if reason or _why_not_by_itself(model) else pick_head_groups(length, heads)
    found = fit_head_groups(wanted, heads)
    if not reason and found == 1:
        least = next(count for count in range(2, heads + 1) if heads % count == 0)
        reason = f"no number from 2 to {wanted} divides the {heads} key/value heads of a rank; {least} does"
    if reason:
        raise ValueError(f"pipeline={wanted}: attention cannot be pipelined: {reason}; use pipeline=None")
    return found


def groups_of_batch(model: Any, groups: int, seen: SequenceMask, device: torch.device) -> int:
    """Of the ``groups`` that :func:`head_groups` found, those for sequences whose tokens see what ``seen`` says.

    Every rank calls this together.  On one host, where memory is shared, there is next to nothing to hide, and more
    exchanges take longer than fewer.
    """
    group = model.sequence_group
    if groups == 1 or group.config.pipeline != "auto":
        return groups
    plain = seen.documents is None and seen.keys is None
    return groups if plain and between_hosts(group.group, group.config, device) else 1


def _why_not_by_itself(model: Any) -> str:
    """Why ``"auto"`` leaves an attention whole that could be taken in groups of heads; empty if it does not.

    A batch is cut alike either way, so that nobody asks for groups: results must be those of the attention function,
    dropout included, and no kernel slower than its own.
    """
    attentions = _attentions(model)
    if any(adapters_of(layer) for attention in attentions for layer in _all_projections(attention)):
        # In a weight its gradient would travel, which beside it does not.
        return "it has adapters; pipeline=4 takes them into its weights"
    if any(attention.training and attention.attention_dropout for attention in attentions):
        return "it has dropout, which its function draws in another way; pipeline=4 draws it by head and token"
    if any(attention.window is not None for attention in attentions):
        return "it has a sliding window, whose parts may be slower than the whole; pipeline=4 pipelines it all the same"
    parameter = next(attentions[0].parameters())
    kind = parameter.device.type
    if kind != "cpu":
        return f"what that gains on {kind} devices has not been measured; pipeline=4 pipelines it all the same"
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    if dtype.itemsize < 4:
        narrow = str(dtype).removeprefix("torch.")
        return f"its parts in {narrow} are added up in fp32; pipeline=4 pipelines it all the same"
    return ""


def _explain_head_groups(model: Any) -> str:
    if model.sequence_group.config.pipeline != "auto":
        try:
            count = head_groups(model, 1)
        except ValueError as error:
            return str(error)
        return f"attention is pipelined in {count} groups of heads, as the configuration says"
    if reason := _why_not_by_itself(model):
        return f"attention is not pipelined: {reason}"
    chosen = ", ".join(f"{head_groups(model, length)} for {length:,} tokens" for length in (1 << 12, 1 << 13))
    return (
        f"attention is pipelined in groups of heads, {chosen}, between hosts and where a row is one document without "
        f"masked tokens; one is no pipeline"
    )


def _all_projections(attention: Any) -> tuple[Any, ...]:
    spec = attention.attention_spec
    return tuple(getattr(attention, name) for name in (spec.query, spec.key, spec.value, spec.output))


def _why_no_groups(attention: UlyssesAttention) -> str:
    """Why Ulysses' attention has no groups of heads to be pipelined by; empty if it has."""
    spec, group = attention.attention_spec, attention.sequence_group
    if group.ring_size > 1:
        return "its ranks are in a ring, whose keys come between the exchanges; a mesh of 'seq' alone would do"
    if spec.kv_heads < 2 * group.size:
        return (
            f"a rank has one of the {spec.kv_heads} key/value heads, which make no groups on {group.size} ranks; "
            f"{max(1, spec.kv_heads // 2)} or fewer ranks would do"
        )
    dropped = [one for layer in _all_projections(attention) for one in adapters_of(layer) if one.drops]
    if dropped:
        return (
            f"its weights have adapters in them, and lora_dropout is {getattr(dropped[0].dropout, 'p', 0)}; 0 would do"
        )
    return ""


def _attentions(model: Any) -> list[Any]:
    return [module for module in model.modules() if "attention_spec" in vars(module)]


def _why_not(model: Any) -> str:
    """Why attention cannot be pipelined as the model is now; empty if it can."""
    for attention in _attentions(model):
        if isinstance(attention, UlyssesAttention):
            if reason := _why_no_groups(attention):
                return reason
        elif not isinstance(attention, HeadParallelAttention):
            return "only strategies 'odysseus', 'tp_sp' and 'ulysses' have a block of it"
        spec = attention.attention_spec
        if spec.whole_only:
            return spec.whole_only
        for name in (spec.query_norm, spec.key_norm):
            what = "" if name is None else changed_call(getattr(attention, name))
            if what:
                return f"{name} has {what}, and would not be called"
    try:
        check_attention_kernel(model.config._attn_implementation)
    except ValueError as error:
        return str(error)
    return ""
