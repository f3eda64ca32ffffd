"""What a parallelized transformers model does around its layers: positions and masks of the whole sequence, loss."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.utils import can_return_tuple

from odysseus_kernels.attention import layout
from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.integrations.pretrained import save_pretrained
from odysseus_kernels.nn.attention import SequenceMask
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.loss import IGNORE_INDEX, DistributedHead, sequence_loss
from odysseus_kernels.nn.moe import load_balancing_loss
from odysseus_kernels.nn.parameters import token_parameter
from odysseus_kernels.nn.sequence import RING_LAYOUT
from odysseus_kernels.nn.step import Stepped

__all__ = ["SequenceCausalLM", "SequenceModel"]

# Rotary embeddings whose frequencies depend on the last position of the sequence.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class SequenceModel(Stepped):
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
        **kwargs: Any,
    ) -> Any:
        """Runs the stock base model on this rank's tokens.

        Args:
            input_ids: this rank's tokens [B, s].
            attention_mask: this rank's part [B, s] of a padding mask, or None on every rank.
            position_ids: this rank's positions [B or 1, s]; None counts from 0 over the whole sequence.
            past_key_values: must be None.
            inputs_embeds: this rank's embeddings [B, s, d] instead of ``input_ids``.
            use_cache: ignored: there is no cache.
            **kwargs: as the stock model takes them.

        Raises:
            ValueError: for a cache, a prepared mask, or shapes that disagree.
        """
        if past_key_values is not None:
            raise ValueError("past_key_values: expected None: a parallelized model keeps no cache")
        if kwargs.get("is_causal") is False:
            raise ValueError("is_causal: expected True: a parallelized model attends causally")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        tokens: torch.Tensor = input_ids if inputs_embeds is None else inputs_embeds  # type: ignore[assignment]
        batch, local = tokens.shape[:2]
        group = self.sequence_group
        length = local * (group.size if group.tokens == "sharded" else 1)
        ring_mask = (
            None
            if attention_mask is None
            else self._gather("attention_mask", attention_mask, (batch, local), tokens.device)
        )
        if position_ids is None:
            whole = length * group.ring_size
            positions = layout.positions(group.ring_rank, group.ring_size, whole, RING_LAYOUT, tokens.device)[None]
        else:
            if position_ids.ndim == 1:
                position_ids = position_ids[None]
            expected = (1 if position_ids.shape[0] == 1 else batch, local)
            positions = self._gather("position_ids", position_ids, expected, tokens.device)
        if group.ring_size > 1:
            mask, positions = self._ring_mask(batch, positions, ring_mask, given=position_ids is not None)
        else:
            dtype = self.get_input_embeddings().weight.dtype if inputs_embeds is None else inputs_embeds.dtype
            # Stands for the embeddings of the whole sequence: only its shape, dtype and device are read.
            outline = torch.empty(1, dtype=dtype, device=tokens.device).expand(batch, length, 1)
            mask = self._whole_mask(outline, positions, ring_mask)
        return super().forward(
            input_ids=input_ids,
            # The stock model takes a four-dimensional mask for a finished one and makes none of its own, which would
            # be for this rank's tokens only; the attention does not use it.
            attention_mask=torch.empty(0, 0, 0, 0, dtype=torch.bool, device=tokens.device),
            position_ids=positions,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            sequence_mask=mask,
            **kwargs,
        )

    def _whole_mask(
        self, outline: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> SequenceMask:
        """Masks of the kinds of layers that there are, for whatever attention function is configured."""
        arguments = {
            "config": self.config,
            "inputs_embeds": outline,
            "attention_mask": attention_mask,
            "past_key_values": None,
            "position_ids": positions,
        }
        kinds = {layer.self_attn.mask_kind for layer in self.layers}
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return SequenceMask({kind: makers[kind](**arguments) for kind in sorted(kinds)})

    def _ring_mask(
        self, batch: int, positions: torch.Tensor, attention_mask: torch.Tensor | None, *, given: bool
    ) -> tuple[SequenceMask, torch.Tensor]:
        """Documents of the whole sequence, as transformers finds them, and the positions to rotate with."""
        group = self.sequence_group
        natural = self._natural("position_ids", positions) if given else None
        documents = None
        if attention_mask is not None:
            # Tokens see tokens, padding sees padding: what padding computes counts nowhere.
            documents = 1 - self._natural("attention_mask", attention_mask).clamp(max=1)
        elif natural is not None:
            steps = torch.diff(natural, prepend=natural[:, :1] - 1)
            documents = (steps != 1).cumsum(-1)
        rotation = getattr(self.config, "rope_parameters", None) or {}
        if rotation.get("rope_type") in _LENGTH_DEPENDENT:
            last = positions.shape[1] * group.ring_size - 1 if natural is None else int(natural.max())
            positions = torch.cat((positions, torch.full_like(positions[:, :1], last)), dim=1)
        if documents is None or not bool(documents.ne(documents[:, :1]).any()):
            return SequenceMask({}), positions
        return SequenceMask({}, documents.expand(batch, -1)), positions

    def _natural(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A ring rank's tensor [B, T] of all ring ranks, as [B, L] in the order of the sequence."""
        group = self.sequence_group
        assert group.ring is not None
        parts = all_gather(tensor, group.ring, operator=f"sequence_{name}", dim=1, config=group.config)
        return parts[:, layout.inverse(group.ring_size, parts.shape[1], RING_LAYOUT, parts.device)]

    def _gather(self, name: str, tensor: torch.Tensor, expected: tuple[int, int], device: torch.device) -> torch.Tensor:
        """A tensor [B, s] of every rank of seq as [B, T]."""
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: expected this rank's part, of shape {expected}, got {tuple(tensor.shape)}")
        group = self.sequence_group
        tensor = tensor.to(device=device, dtype=torch.int64).contiguous()
        if group.tokens == "replicated":
            return tensor
        return all_gather(tensor, group.group, operator=f"sequence_{name}", dim=1, config=group.config)


class SequenceCausalLM(Stepped):
    """A model with a language head on this rank's tokens: logits [B, s, V], or the loss over the tokens of all ranks.

    With labels the logits are never made whole, and the output has none: call without labels for logits.
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

        Returns:
            The stock model's output. ``loss`` is the mean over all tokens of all ranks, the same on every rank;
            ``logits`` [B, s, V] are those of this rank's tokens, and None where there are labels.

        Raises:
            ValueError: if ``labels`` come without ``shift_labels``, or ``logits_to_keep`` is given.
        """
        if labels is not None and kwargs.get("shift_labels") is None:
            raise ValueError(
                "labels: expected shift_labels beside them: labels must be shifted before the sequence is cut; pass "
                "the whole batch through shard_sequence on every rank"
            )
        if not isinstance(logits_to_keep, int) or logits_to_keep != 0:
            raise ValueError("logits_to_keep: expected 0: the last tokens of the sequence are on the last rank only")
        shift_labels = kwargs.pop("shift_labels", None)
        num_items, ignore_index = kwargs.pop("num_items_in_batch", None), kwargs.pop("ignore_index", IGNORE_INDEX)
        counted = kwargs.pop("counted_tokens", attention_mask)
        routed = hasattr(self, "router_aux_loss_coef")
        if routed:
            wanted = kwargs.get("output_router_logits")
            kwargs["output_router_logits"] = self.config.output_router_logits if wanted is None else wanted
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        hidden, group = outputs.last_hidden_state, self.sequence_group
        loss = logits = None
        if labels is None:
            logits = self.get_output_embeddings()(hidden)
        else:
            loss = self._loss(hidden, shift_labels, num_items=num_items, ignore_index=ignore_index)
        rest = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        if not routed:
            return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)
        aux_loss = None
        if kwargs["output_router_logits"] and outputs.router_logits:
            aux_loss = load_balancing_loss(
                outputs.router_logits,
                self.num_experts_per_tok,
                group=group.token_group,
                attention_mask=counted,
                config=group.config,
            )
            if loss is not None:
                loss = loss + self.router_aux_loss_coef * aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=aux_loss, logits=logits, router_logits=outputs.router_logits, **rest
        )

    def _loss(self, hidden: torch.Tensor, targets: torch.Tensor, **settings: Any) -> torch.Tensor:
        """Mean over all ranks' tokens, without their logits."""
        group, head = self.sequence_group, self.get_output_embeddings()
        if not isinstance(head, DistributedHead):
            # Once for all chunks: the gradient is added over the ranks once, too.
            weight: Any = token_parameter(head.weight, group)
            bias = token_parameter(head.bias, group)
            head = functools.partial(nn.functional.linear, weight=weight, bias=bias)
        return sequence_loss(
            hidden, targets, group.mesh, head=head, tokens=group.tokens, config=group.config, **settings
        )

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: generation needs a cache and one token at a time, which cannot be cut."""
        raise RuntimeError(
            "generate() does not work on a parallelized model. Export it and generate with a stock one: call "
            "odysseus_kernels.save_pretrained(model, folder) on every rank, then "
            "AutoModelForCausalLM.from_pretrained(folder).generate(...)"
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
