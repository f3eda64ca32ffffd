"""What a parallelized transformers model does around its layers: positions and masks of the whole sequence, loss."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.utils import can_return_tuple

from odysseus_kernels.attention import layout
from odysseus_kernels.attention.local import RING_KERNELS
from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.integrations.inputs import (
    check_attention,
    check_labels,
    check_no_holes,
    check_part,
    each_token,
    opened,
    refuse_uses,
    targets_of,
)
from odysseus_kernels.integrations.intact import check_intact, check_loss
from odysseus_kernels.integrations.masks import check_shared_prefix, sees_prefix_and_own, whole_masks
from odysseus_kernels.integrations.outputs import (
    TokenStatisticsOutput,
    checked_logits_to_keep,
    last_logits,
    loss_of,
    router_loss,
)
from odysseus_kernels.integrations.pipelining import Pipelined, groups_of_batch, head_groups
from odysseus_kernels.integrations.pretrained import save_pretrained
from odysseus_kernels.nn.attention import SequenceMask
from odysseus_kernels.nn.cut import RING_LAYOUT, SequenceCut, natural_order
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.linear import upcoming
from odysseus_kernels.nn.loss import IGNORE_INDEX
from odysseus_kernels.nn.sequence import SHARED_PREFIX
from odysseus_kernels.nn.token_statistics import TokenRequest, token_statistics

__all__ = ["SequenceCausalLM", "SequenceModel"]

# Rotary embeddings whose frequencies depend on the last position of the sequence.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class SequenceModel(Pipelined):
    """A base model whose tokens are cut over the ranks and whose attention sees the whole sequence.

    Embedding, norms and feed-forward networks see [B, s] tokens of this rank, attention the T = L/R of its ring rank.
    Positions and masks are made for these and reach the attention as arguments, never as state of the model: a
    recomputed layer and two forwards in flight each get their own.
    """

    sequence_group: SequenceGroup
    get_input_embeddings: Callable[[], nn.Embedding]
    config: Any
    layers: Any

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: object | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        sequence_cut: torch.Tensor | SequenceCut | None = None,
        shared_prefix: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the stock base model on this rank's tokens.

        Args:
            input_ids: this rank's tokens [B, s].
            attention_mask: this rank's part [B, s] of a padding mask, or None on every rank.
            position_ids: this rank's positions [B or 1, s]; None counts from 0 over the whole sequence, which takes
                ``sequence_cut``.
            past_key_values: must be None.
            inputs_embeds: this rank's embeddings [B, s, d] instead of ``input_ids``.
            use_cache: ignored: there is no cache.
            sequence_cut: how the batch was cut, as :func:`shard_sequence` says it.
            shared_prefix: this rank's part [B, s] of the numbers of completions that share their prompt.
            **kwargs: as the stock model takes them.

        Raises:
            ValueError: for a cache, attention weights, a prepared mask, shapes that disagree, or a batch that was cut
                in another way than this model computes it, or that does not say how.
            RankMismatchError: if ranks were given different batches; names the ranks that differ.
        """
        if not isinstance(sequence_cut, SequenceCut):  # else the model around has looked
            check_intact(self, self.sequence_group)
        refuse_uses(self.config, past_key_values, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        tokens: torch.Tensor = input_ids if inputs_embeds is None else inputs_embeds  # type: ignore[assignment]
        with opened(self, sequence_cut, tokens, position_ids=position_ids, attention_mask=attention_mask) as cut:
            mask, positions = self._mask_and_positions(tokens, attention_mask, position_ids, cut, shared_prefix)
            return super().forward(
                input_ids=input_ids,
                # The stock model takes a four-dimensional mask for a finished one and makes none of its own, which
                # would be for this rank's tokens only; the attention does not use it.
                attention_mask=torch.empty(0, 0, 0, 0, dtype=torch.bool, device=tokens.device),
                position_ids=positions,
                inputs_embeds=inputs_embeds,
                use_cache=False,
                sequence_mask=mask,
                **kwargs,
            )

    def _mask_and_positions(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cut: SequenceCut,
        shared_prefix: torch.Tensor | None,
    ) -> tuple[SequenceMask, torch.Tensor]:
        """Masks of the whole sequence, and the positions [B or 1, T] to rotate with."""
        batch, local = tokens.shape[:2]
        group = self.sequence_group
        groups = head_groups(self, cut.padded)  # ahead of all that is sent: it refuses what cannot be
        whole_mask = natural = visible = None
        if attention_mask is not None:
            _, whole_mask = self._gather("attention_mask", attention_mask.ne(0), (batch, local), tokens.device, cut)
        if position_ids is None:
            whole = local * cut.slices * group.zigzag_size
            positions = layout.positions(group.zigzag_rank, group.zigzag_size, whole, RING_LAYOUT, tokens.device)[None]
        else:
            if position_ids.ndim == 1:
                position_ids = position_ids[None]
            expected = (1 if position_ids.shape[0] == 1 else batch, local)
            positions, natural = self._gather("position_ids", position_ids, expected, tokens.device, cut)
        real = cut.length if cut.padding else None
        check_attention(self.config._attn_implementation, group)
        if shared_prefix is not None:
            if not isinstance(group.config.pipeline, int):
                groups = 1
            check_shared_prefix(
                self.config._attn_implementation, group, cut, self._mask_kinds(), attention_mask, groups
            )
            numbers = self._gather(SHARED_PREFIX, shared_prefix, (batch, local), tokens.device, cut)[1]
            visible = sees_prefix_and_own(numbers)
        rotated = self._rotated(positions, natural, real)
        by_documents = cut.pieces > 1 or (group.zigzag_size > 1 and self.config._attn_implementation in RING_KERNELS)
        found = self._ring_mask(batch, natural, whole_mask) if by_documents or groups > 1 else SequenceMask({})
        if groups > 1:
            groups = groups_of_batch(self, groups, found, tokens.device)
        for attention in self._attentions():
            attention.head_groups = groups
        if by_documents or groups > 1:
            return dataclasses.replace(found, pieces=cut.pieces, head_groups=groups), rotated
        if natural is None or visible is not None:  # positions that begin again would say that nobody sees the prefix
            natural = torch.arange(self._length(positions), device=tokens.device)[None]
        dtype = self.get_input_embeddings().weight.dtype if tokens.ndim == 2 else tokens.dtype
        # Stands for the embeddings of the whole sequence: only its shape, dtype and device are read.
        outline = torch.empty(1, dtype=dtype, device=tokens.device).expand(batch, natural.shape[1], 1)
        masks = whole_masks(self.config, self._mask_kinds(), outline, natural, whole_mask, real=real, visible=visible)
        if group.zigzag_size > 1:
            masks = {kind: mask[:, :, cut.positions(tokens.device)] for kind, mask in masks.items()}
        return SequenceMask(masks), rotated

    def _attentions(self) -> list[Any]:
        """Attention modules, also those of layers that something is wrapped around."""
        return [module for module in self.layers.modules() if "attention_spec" in vars(module)]

    def _mask_kinds(self) -> list[str]:
        """Kinds of layers that there are, by the configuration as it is now."""
        kinds = sorted({attention.mask_kind for attention in self._attentions()})
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise ValueError(f"layer_types: expected full_attention and sliding_attention only, got {kind!r}")
        if "sliding_attention" in kinds and self.config.sliding_window is None:
            raise ValueError("sliding_window: expected a number of tokens for the layers that have a window, got None")
        return kinds

    def _rotated(self, positions: torch.Tensor, natural: torch.Tensor | None, real: int | None) -> torch.Tensor:
        """Positions [B or 1, T] to rotate with; padding does not count towards lengths, and parts all count alike."""
        if not self._rotates_by_length():
            return positions
        rotated, group, length = positions, self.sequence_group, self._length(positions)
        if real is not None:
            where = layout.positions(group.zigzag_rank, group.zigzag_size, length, RING_LAYOUT, positions.device)
            rotated = positions.masked_fill(where >= real, 0)
        if group.zigzag_size == 1:
            return rotated
        if natural is None:
            natural = torch.arange(length, device=positions.device)[None]
        # The last of all after the rank's own, so that every ring rank's rotation finds the same length.
        return torch.cat((rotated, natural[:, :real].max().expand(rotated.shape[0], 1)), dim=1)

    def _rotates_by_length(self) -> bool:
        rotation = getattr(self.config, "rope_parameters", None) or {}
        return rotation.get("rope_type") in _LENGTH_DEPENDENT

    def _ring_mask(self, batch: int, natural: torch.Tensor | None, attention_mask: torch.Tensor | None) -> SequenceMask:
        """Documents of the whole sequence, as transformers finds them."""
        kernel = self.config._attn_implementation
        self._mask_kinds()
        documents = keys = None
        if attention_mask is not None:
            # Masked tokens are seen by none. They see the others, and their outputs count where they have labels;
            # only flash-attention leaves them out altogether. Documents are not looked for, as in transformers.
            keys = attention_mask.ne(0)
            if bool(keys.all()):
                keys = None
            elif kernel == "flash_attention_2":
                if any(attention.window is not None for attention in self._attentions()):
                    check_no_holes(keys)
                documents = keys.logical_not().long()
        elif natural is not None:
            steps = torch.diff(natural, prepend=natural[:, :1] - 1)
            found = (steps != 1).cumsum(-1)
            documents = found.expand(batch, -1) if bool(found[:, -1].any()) else None
        return SequenceMask({}, documents, keys)

    def _length(self, positions: torch.Tensor) -> int:
        """Tokens of the whole sequence, from positions [B or 1, T] of this ring rank."""
        return positions.shape[1] * self.sequence_group.zigzag_size

    def _gather(
        self, name: str, tensor: torch.Tensor, expected: tuple[int, int], device: torch.device, cut: SequenceCut
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A tensor [B, s] of every rank: [B, T] of this ring rank, and [B, L] in the order of the sequence."""
        check_part(name, tensor, expected)
        group, local = self.sequence_group, tensor.shape[1]
        parts = tensor.to(device=device, dtype=torch.int64)
        if group.zigzag_size == 1 and group.tokens == "replicated":
            return parts, parts
        if group.tokens == "replicated":
            # Each rank of seq sends a slice of what all of them have, so that all ranks meet in one call.
            parts = nn.functional.pad(parts, (0, -local % group.size)).chunk(group.size, dim=1)[group.rank]
        parts = all_gather(parts.contiguous(), group.everyone, operator=f"sequence_{name}", dim=1, config=group.config)
        parts = natural_order(parts, cut.ring, cut.slices, cut.pieces)
        ring = group.zigzag_size
        if ring == 1:
            return parts, parts
        if group.tokens == "replicated":
            parts = parts.unflatten(1, (ring, -1))[..., :local].flatten(1)
        order = layout.inverse(ring, parts.shape[1], RING_LAYOUT, parts.device)
        return parts.chunk(ring, dim=1)[group.zigzag_rank], parts[:, order]


class SequenceCausalLM(Pipelined):
    """A model with a language head on this rank's tokens: logits [B, s, V], or the loss over all ranks' tokens.

    With labels the output has no logits, which are never made whole then.
    """

    sequence_group: SequenceGroup
    get_output_embeddings: Callable[[], Any]
    base_model: Any
    config: Any
    router_aux_loss_coef: float
    num_experts_per_tok: int

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: object | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Runs the stock model on what :func:`shard_sequence` returned; the arguments are those of the stock model.

        ``reduction="none"`` asks for the loss of each token, without a router's; ``token_statistics`` for a part of
        what :func:`sequence_logprobs` returns.

        Returns:
            The stock model's output. Whole and the same on every rank are ``loss``, the mean over all ranks' tokens;
            ``aux_loss``; ``logits`` [B, k, V] with ``logits_to_keep=k``, of the sequence's last k tokens. Parts, of
            this rank's tokens with padding, are ``loss`` [B, s] with ``reduction="none"``, 0 where a token does not
            count; ``logits`` [B, s, V], None with labels; each of ``hidden_states`` [B, s, d] and of ``router_logits``
            [B * s, experts]. :func:`gather_sequence` makes what is [B, s, ...] whole, without padding.

        Raises:
            ValueError: for one of ``labels`` and ``shift_labels`` alone, ``logits_to_keep`` that is no number or beside
                labels, and as the base model does.
            RankMismatchError: if ranks were given different batches or divisors of the loss, or compute in other ways.
        """
        check_labels(labels, kwargs.get("shift_labels"))
        asked = kwargs.pop("token_statistics", None)
        keep = checked_logits_to_keep(logits_to_keep, with_logits=labels is None and asked is None)
        check_intact(self, self.sequence_group)
        if labels is not None:
            check_loss(self)
        descriptor, targets = kwargs.pop("sequence_cut", None), kwargs.pop("shift_labels", None)
        num_items, ignore_index = kwargs.pop("num_items_in_batch", None), kwargs.pop("ignore_index", IGNORE_INDEX)
        reduction = kwargs.pop("reduction", "mean")
        each = each_token("none" if asked and targets is not None else reduction, targets, num_items)
        with opened(
            self,
            descriptor,
            input_ids if inputs_embeds is None else inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            targets=targets,
            num_items=num_items,
            ignore_index=ignore_index,
            asked=asked.describe() if asked else "the loss of each token" if each else "",
            ids=asked.ids if asked else None,
        ) as cut:
            return self._outputs(
                cut,
                None if targets is None else targets_of(cut, targets, ignore_index),
                {"num_items": num_items, "ignore_index": ignore_index, "each": each},
                asked,
                keep,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )

    def _outputs(
        self,
        cut: SequenceCut,
        targets: torch.Tensor | None,
        settings: dict[str, Any],
        asked: TokenRequest | None,
        keep: int,
        **kwargs: Any,
    ) -> Any:
        counted = kwargs.pop("counted_tokens", None)
        counted = kwargs["attention_mask"] if counted is None else counted
        routed = hasattr(self, "router_aux_loss_coef")
        if routed:
            wanted = kwargs.get("output_router_logits")
            kwargs["output_router_logits"] = self.config.output_router_logits if wanted is None else wanted
        with upcoming(self.get_output_embeddings(), "loss" if asked or targets is not None else "logits"):
            outputs = self.base_model(use_cache=False, sequence_cut=cut, **kwargs)
        hidden, group, head = outputs.last_hidden_state, self.sequence_group, self.get_output_embeddings()
        statistics = loss = logits = aux_loss = None
        if asked is not None:
            statistics = token_statistics(hidden, targets, head, asked, group)
        elif targets is not None:
            loss = loss_of(hidden, targets, head, group, **settings)
        else:
            logits = last_logits(hidden, head, cut, keep, group) if keep else head(hidden)
        if routed and kwargs["output_router_logits"] and outputs.router_logits:
            aux_loss = router_loss(outputs.router_logits, hidden, self.num_experts_per_tok, counted, cut, group)
            if loss is not None and not settings["each"]:
                loss = loss + self.router_aux_loss_coef * aux_loss
        rest = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        if statistics is not None:
            return TokenStatisticsOutput(**statistics._asdict(), aux_loss=aux_loss, **rest)
        if not routed:
            return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)
        rest["router_logits"] = outputs.router_logits
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **rest)

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: generation needs a cache and one token at a time, which cannot be cut."""
        raise RuntimeError(
            "generate() does not work on a parallelized model. Export it and generate with a stock one: call "
            "odysseus_kernels.save_pretrained(model, folder) on every rank, then "
            "AutoModelForCausalLM.from_pretrained(folder).generate(...)"
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: rows of a vocabulary that is cut over the ranks cannot be added on one of them."""
        raise RuntimeError(
            "resize_token_embeddings() does not work on a parallelized model: resize the stock model, then parallelize "
            "it. A model that is parallelized already is exported by odysseus_kernels.save_pretrained(model, folder)"
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes the stock model; every rank calls it.  See :func:`odysseus_kernels.save_pretrained`.

        Raises:
            ValueError: for options of the stock method, which would write this rank's shards as if they were the model.
        """
        unknown = sorted(set(kwargs) - {"max_shard_bytes"})
        if unknown:
            raise ValueError(f"save_pretrained: expected max_shard_bytes or nothing, got {', '.join(unknown)}")
        save_pretrained(self, save_directory, **kwargs)
