"""What a forward of a parallelized model was given: whether this rank's part is the one that the model computes.

What can be seen here is a ValueError before anything is sent.  What only a comparison shows (other sequences on another
rank, a step that one rank left out, another divisor of the loss) goes into the signature of the forward's first calls,
by which ranks are compared anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from odysseus_kernels.attention.local import check_attention_kernel
from odysseus_kernels.comm.announce import speaking_of
from odysseus_kernels.integrations.alike import adapters
from odysseus_kernels.integrations.peft import lora_linears
from odysseus_kernels.integrations.pipelining import check_pieces, exchanges_heads
from odysseus_kernels.nn.adapter_sums import summed_together
from odysseus_kernels.nn.cut import KEY, SequenceCut, checksums, digest
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.loss import IGNORE_INDEX, token_count
from odysseus_kernels.nn.step import Stepped

__all__ = [
    "check_attention",
    "check_labels",
    "check_no_holes",
    "check_part",
    "each_token",
    "opened",
    "refuse_uses",
    "targets_of",
]

_DROPOUTS = ("attention_dropout", "residual_dropout", "embedding_dropout")


@contextlib.contextmanager
def opened(
    model: Stepped,
    descriptor: torch.Tensor | SequenceCut | None,
    tokens: torch.Tensor | None,
    *,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    targets: torch.Tensor | None = None,
    num_items: object = None,
    ignore_index: int = IGNORE_INDEX,
    asked: str = "",
    ids: torch.Tensor | None = None,
) -> Iterator[SequenceCut]:
    """A forward: how its batch was cut, checked, and told to the other ranks with the first calls within.

    Args:
        model: what is called; how it is parallelized, and what it computes on this rank.
        descriptor: ``sequence_cut`` of the batch, None without; or the cut itself where a forward is open already.
        tokens: ids [B, s] or embeddings [B, s, d].
        position_ids, attention_mask, targets: of this rank's part, or None.
        num_items, ignore_index: of the loss.
        asked: what is wanted of each token, in words.
        ids: [B, s, k], of this rank's part, that it is wanted of; or None.

    Raises:
        ValueError: for a part other than the one that this rank computes, or shapes that disagree.
    """
    if isinstance(descriptor, SequenceCut):
        yield descriptor
        return
    group = model.sequence_group
    # First of all: a rank that is refused below has counted what its peers have.
    changed = _changed(model, descriptor)
    if tokens is None:
        raise ValueError("expected exactly one of input_ids and inputs_embeds")
    expected = tuple(tokens.shape[:2])
    if position_ids is not None and position_ids.ndim == 1:
        position_ids = position_ids[None]
    if position_ids is not None:
        check_part("position_ids", position_ids, (1 if position_ids.shape[0] == 1 else expected[0], expected[1]))
        if position_ids.is_floating_point():
            raise ValueError(
                f"position_ids: expected an integer dtype, got {position_ids.dtype}: positions travel as integers; "
                f"scale rotations by the configuration's rope_parameters"
            )
    for name, tensor in (("attention_mask", attention_mask), ("shift_labels", targets)):
        if tensor is not None:
            check_part(name, tensor, expected)
    if descriptor is None:
        cut = _by_positions(group, tokens, position_ids, striped=not exchanges_heads(model))
    else:
        cut = SequenceCut.read(descriptor)
        cut.check(group)
        local = cut.padded // (cut.ring * cut.slices)
        if expected != (len(cut.sums), local):
            raise ValueError(
                f"input_ids: expected shape [{len(cut.sums)}, {local}], as {KEY} beside them says, got {list(expected)}"
            )
    check_pieces(model, cut)
    known = any(cut.sums)
    batch = text = f"batch{f' {digest(cut.sums)}' if known else ''} of {expected[0]} x {cut.length} tokens"
    if targets is not None:
        text += f" with labels, ignore_index {ignore_index}"
        if num_items is not None:
            text += f", num_items_in_batch {token_count(num_items)!r}"
    text += f", {asked}" if asked else ""
    text += _way(model, tokens)
    text += "".join(f", {one}" for one in changed)
    group.withdraw()  # left over from a pass that ended with an error before any call took it
    group.announce(text)
    if not cut.sharded and group.size > 1:
        # Ranks of seq have the same tokens, and nothing of them is sent: compare what each was given.
        names = ("input_ids", "position_ids", "attention_mask", "labels", "ids")
        whole = (tokens if tokens.ndim == 2 else None, position_ids, attention_mask, targets)
        given = zip(names, (*whole, None if ids is None else ids.flatten(1)), strict=True)
        same = {name: tensor for name, tensor in given if tensor is not None}
        if same:
            sums = tuple(checksums(same, expected[0]).tolist())
            group.announce(f"{', '.join(same)} {digest(sums)}", group.group)
    try:
        with speaking_of(batch), summed_together(_adapted(model, tokens), group):
            yield cut
    finally:
        group.withdraw()


def _adapted(model: Any, tokens: torch.Tensor) -> Iterator[Any]:
    """Projections with adapters whose gradients can come at the end of a backward pass, all together.

    FSDP2 around a layer, or around all of a model whose input has a gradient, takes gradients when that of the input is
    there, which is before.
    """
    parts = (module for module in model.modules() if module is not model and module is not model.base_model)
    early = tokens.requires_grad or any(isinstance(module, FSDPModule) for module in parts)
    return lora_linears(() if early else model.modules())


def _changed(model: Any, descriptor: torch.Tensor | None) -> list[str]:
    """What was done to a model since it was parallelized, in words.

    A base model that is called by itself has no notes of it.
    """
    facts, weights = getattr(model, "sequence_facts", None), getattr(model, "sequence_weights", None)
    if facts is None or weights is None or torch.compiler.is_compiling():
        return []
    parameters = list(model.parameters())
    device = parameters[0].device
    # A device is waited for all the same where the batch says on it how it was cut.
    waits = device.type == "cpu" or (descriptor is not None and descriptor.device == device)
    said = [weights.said(parameters, values=waits)]
    if torch.is_grad_enabled() and any(p.grad is not None for p in parameters):
        said.append("gradients there before")
    said += [facts.changes(model), facts.resting() if model.training else "", adapters(model)]
    return [one for one in said if one]


def _way(model: nn.Module, tokens: torch.Tensor) -> str:
    """What of a rank's model and context decides which calls its passes make, where it is not the usual.

    A rank that differs would make other calls than its peers, or fewer: they would learn of it late, or when it is past
    its last call and waits elsewhere, not at all.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    config = getattr(model, "config", None)
    layers = getattr(getattr(model, "base_model", model), "layers", ())
    trained = [p.requires_grad for p in model.parameters()]
    said = []
    if not torch.is_grad_enabled():
        said.append("without gradients")
    elif not all(trained):
        frozen = tuple(number for number, one in enumerate(trained) if not one)
        said.append(f"{len(frozen)} parameters frozen ({digest(frozen)})")
    elif tokens.ndim == 3 and not tokens.requires_grad:
        said.append("embeddings without gradients")
    if torch.is_autocast_enabled(device):
        said.append(f"autocast to {torch.get_autocast_dtype(device)}")
    recomputed = sum(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers)
    if recomputed and torch.is_grad_enabled():
        said.append(f"{recomputed} layers checkpointed")
    if not model.training and any(getattr(config, name, 0) for name in _DROPOUTS):
        said.append("without dropout")
    return "".join(f", {one}" for one in said)


def check_attention(kernel: str, group: SequenceGroup) -> None:
    """Raises ValueError unless the attention function ``kernel`` (transformers' name) serves on these ranks."""
    if group.zigzag_size == 1 or (group.folded and kernel == "eager"):
        return
    try:
        check_attention_kernel(kernel)
    except ValueError as error:
        more = '; "tsp" also takes "eager", for which keys and values are gathered' if group.folded else ""
        raise ValueError(f"{error}{more}") from None


def check_labels(labels: torch.Tensor | None, shifted: torch.Tensor | None) -> None:
    """Raises ValueError for labels that are not shifted, or that somebody has taken out of a batch that is cut."""
    if labels is not None and shifted is None:
        raise ValueError(
            "labels: expected shift_labels beside them: labels must be shifted before the sequence is cut; pass "
            "the whole batch through shard_sequence on every rank"
        )
    if labels is None and shifted is not None:
        raise ValueError(
            "labels: expected them beside shift_labels, got shift_labels alone: code that takes labels out of a "
            "cut batch (Trainer with label_smoothing_factor or compute_loss_func does) would shift labels "
            "again and take the mean of this rank's tokens only. For your own loss take out shift_labels, too, "
            "and give the logits to sequence_loss, or make them whole with gather_sequence"
        )


def each_token(reduction: str, targets: torch.Tensor | None, num_items: object) -> bool:
    """Whether the loss of each token is wanted instead of the mean.

    Raises:
        ValueError: if ``reduction`` is neither ``"mean"`` nor ``"none"``, or does not go with the other arguments.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction: expected "mean" or "none", got {reduction!r}')
    if reduction == "none" and (targets is None or num_items is not None):
        got = "no labels" if targets is None else "num_items_in_batch"
        raise ValueError(
            f'reduction: expected labels and nothing to divide by beside "none", the loss of each token, got {got}'
        )
    return reduction == "none"


def refuse_uses(config: Any, past_key_values: object, given: Mapping[str, Any]) -> None:
    """Raises ValueError for what a stock model does with its arguments and a parallelized one cannot.

    Args:
        config: the model's.
        past_key_values: of its call.
        given: further arguments by name.
    """
    if past_key_values is not None:
        raise ValueError("past_key_values: expected None: a parallelized model keeps no cache")
    if given.get("is_causal") is False or not getattr(config, "is_causal", True):
        raise ValueError("is_causal: expected True: a parallelized model attends causally")
    wanted = given.get("output_attentions")
    if config.output_attentions if wanted is None else wanted:
        raise ValueError(
            "output_attentions: expected False: a rank has the attention weights of its own heads at most, and they "
            "would be returned as those of all; take them from the stock model"
        )


def check_part(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raises ValueError unless ``tensor`` has the shape of this rank's part."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected this rank's part, of shape {expected}, got {tuple(tensor.shape)}")


def check_no_holes(keys: torch.Tensor) -> None:
    """Raises ValueError for a mask [B, L] with holes: flash-attention counts a window in tokens that are not masked.

    Ring attention counts positions.
    """
    starts = torch.diff(torch.nn.functional.pad(keys.int(), (1, 0))) == 1
    if bool((starts.sum(-1) > 1).any()):
        raise ValueError(
            'attention_mask: expected one run of unmasked tokens in each sequence with "flash_attention_2", a '
            'sliding window and a ring: use attn_implementation="sdpa", or remove what is masked within'
        )


def targets_of(cut: SequenceCut, shift_labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Labels, with ``ignore_index`` where there is no token to predict: after the last one, and in the padding."""
    if cut.declared and not cut.padding:
        return shift_labels
    last = cut.length - (0 if cut.declared else 1)  # callers that cut by hand may know what follows the last token
    return shift_labels.masked_fill(cut.positions(shift_labels.device) >= last, ignore_index)


def _by_positions(
    group: SequenceGroup, tokens: torch.Tensor, position_ids: torch.Tensor | None, *, striped: bool
) -> SequenceCut:
    """The cut of a batch that does not say how it was cut, which its positions must show."""
    parts = group.slices * group.zigzag_size
    padded = tokens.shape[1] * parts
    pipeline = group.config.pipeline
    pieces = pipeline if striped and isinstance(pipeline, int) and tokens.shape[1] % pipeline == 0 else 1
    cut = SequenceCut.of(group, padded, padded, pieces=pieces, declared=True)
    if parts == 1:
        return cut
    if position_ids is None:
        got = f"nothing that tells which tokens these {tokens.shape[1]} are"
    elif bool((position_ids == cut.positions(position_ids.device)).all()):
        return cut
    else:
        row = position_ids[0].tolist()
        got = f"position_ids that are not those of this part ({row[0]} to {row[-1]} in the first row)"
    raise ValueError(
        f"input_ids: expected a batch cut {cut.describe()}, and that it says so ({KEY}, which shard_sequence adds), "
        f"got {got}. Pass the whole batch through shard_sequence(batch, mesh, strategy) on every rank; for inputs "
        f"that were cut by hand, say so with declare_cut(batch, mesh, strategy)"
    )
