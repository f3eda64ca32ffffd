"""What the formulas say that one step of a model sends."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from odysseus_kernels.attention.layout import seen_parts, with_key_mask
from odysseus_kernels.attention.local import RING_KERNELS
from odysseus_kernels.integrations.families import FAMILIES
from odysseus_kernels.integrations.pipelining import groups_of_batch
from odysseus_kernels.integrations.verify.trial import Trial
from odysseus_kernels.nn.attention import SequenceMask
from odysseus_kernels.nn.cut import KEY, RING_LAYOUT, SequenceCut
from odysseus_kernels.planner import formulas
from odysseus_kernels.planner.ring import RingPeers, ring_peers

__all__ = ["expected_traffic", "is_beside"]


def is_beside(operator: str) -> bool:
    """Whether the formulas leave an operator out: positions and masks, and what is sent to compare."""
    return operator == "verify" or (operator.startswith("sequence_") and operator != "sequence_loss")


def expected_traffic(trial: Trial) -> tuple[formulas.Traffic | None, str]:
    """Bytes of a step on each rank, or None and why there is no formula."""
    model: Any = trial.subject
    group, config = trial.group, model.config
    family = next((f for f in FAMILIES if type(model).__name__.endswith(f.causal_model)), None)
    if family is None:
        return None, f"no formula for {type(model).__name__}"
    if "nvls" in (group.config.reduce, group.config.gather):
        return None, "no formula for what a switch adds and copies"
    if family.expert_names is not None:
        return None, "no formula for mixtures of experts"
    if any(not p.requires_grad for p in model.parameters()):
        return None, "no formula for models with frozen parameters"
    recomputed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    keeps = any("context_fn" in getattr(m._gradient_checkpointing_func, "keywords", {}) for m in recomputed)
    if recomputed and keeps:
        return None, "no formula for selective checkpointing"
    first = getattr(model.base_model, family.layers)[0]
    attention, mlp = getattr(first, family.attention), getattr(first, family.mlp)
    names, spec = family.attention_names, family.mlp_names
    heads = config.num_attention_heads
    shape = formulas.LayerShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        gated=spec.gate is not None,
        qkv_bias=getattr(attention, names.query).bias is not None,
        out_bias=getattr(attention, names.output).bias is not None,
        mlp_bias=getattr(mlp, spec.up).bias is not None,
        norm_bias=getattr(getattr(first, family.norms[0]), "bias", None) is not None,
        qk_norm=names.query_norm is not None,
    )
    rows, local = trial.part["input_ids"].shape
    tokens = rows * local * (group.every_size if group.tokens == "sharded" else group.ring_size)
    sizes: dict[str, Any] = {"ring": group.ring_size, "element_size": trial.dtype.itemsize}
    layers = [
        formulas.traffic(
            shape,
            trial.strategy,
            group.size,
            tokens=tokens,
            gathered=group.config.gathered,
            checkpointing=bool(recomputed),
            pipelined=trial.pieces > 1 or _groups_of_heads(trial) > 1,
            keys_at_once=config._attn_implementation not in RING_KERNELS,
            tile_rows=group.config.tile_rows,
            ring_peers=peers,
            **sizes,
        )
        for peers in _ring_peers(trial)
    ]
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    parts = [*layers]
    parts += [formulas.replicated_traffic(hidden, trial.strategy, group.size, **sizes)] * (2 if shape.norm_bias else 1)
    parts.append(formulas.replicated_traffic(vocabulary * hidden, trial.strategy, group.size, **sizes))
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        return None, "no formula for a head that is tied to the embedding"
    parts.append(formulas.head_traffic(vocabulary, hidden, trial.strategy, group.size, tokens=tokens, **sizes))
    total: formulas.Traffic = {}
    for part in parts:
        for key, count in part.items():
            total[key] = total.get(key, 0) + count
    return total, ""


def _groups_of_heads(trial: Trial) -> int:
    if trial.strategy != "ulysses":
        return 1
    return groups_of_batch(trial.subject, *_seen(trial), trial.part["input_ids"].device)


def _ring_peers(trial: Trial) -> list[RingPeers | None]:
    """To how many ranks of the ring this one sends in each layer, by its window and the batch's documents."""
    model: Any = trial.subject
    group, attentions = trial.group, model.base_model._attentions()
    if group.zigzag_size == 1:
        return [None] * len(attentions)
    length, seen = _seen(trial)
    documents = with_key_mask(seen.documents, seen.keys)
    documents = None if documents is None else documents.cpu()
    peers = {}
    for window in {attention.window for attention in attentions}:
        parts = seen_parts(
            group.zigzag_size,
            length // group.zigzag_size,
            RING_LAYOUT,
            causal=True,
            window=window,
            documents=documents,
        )
        peers[window] = ring_peers(parts, group.zigzag_rank)
    return [peers[attention.window] for attention in attentions]


def _seen(trial: Trial) -> tuple[int, SequenceMask]:
    """Length of the sequence with its padding, and which tokens see one another."""
    model: Any = trial.subject
    mask, positions = trial.whole.get("attention_mask"), trial.whole.get("position_ids")
    rows = trial.whole["input_ids"].shape[0]
    length = SequenceCut.read(trial.part[KEY]).padded if KEY in trial.part else trial.length
    padding = length - trial.length
    if positions is not None and padding:
        further = torch.arange(1, padding + 1, device=positions.device)
        positions = torch.cat((positions, positions[:, -1:] + further), dim=1)
    return length, model.base_model._ring_mask(rows, positions, None if mask is None else F.pad(mask, (0, padding)))
