"""What a parallelized transformers model does around its layers: positions and masks of the whole sequence, loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.integrations.pretrained import save_pretrained
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.loss import sequence_loss

__all__ = ["SequenceCausalLM", "SequenceLoss", "SequenceModel"]


class SequenceModel(nn.Module):
    """A base model whose tokens are cut over the ranks and whose attention sees the whole sequence.

    Embedding, norms and feed-forward networks see [B, s] tokens of this rank. Positions and masks are made for all L
    of them and reach the attention as arguments, never as state of the model: a recomputed layer and two forwards in
    flight each get their own.
    """

    sequence_group: SequenceGroup
    get_input_embeddings: Callable[[], nn.Embedding]

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
        whole_mask = (
            None
            if attention_mask is None
            else self._gather("attention_mask", attention_mask, (batch, local), tokens.device)
        )
        if position_ids is None:
            positions = torch.arange(local * group.size, device=tokens.device)[None]
        else:
            if position_ids.ndim == 1:
                position_ids = position_ids[None]
            expected = (1 if position_ids.shape[0] == 1 else batch, local)
            positions = self._gather("position_ids", position_ids, expected, tokens.device)
        embedding = self.get_input_embeddings().weight
        dtype = embedding.dtype if inputs_embeds is None else inputs_embeds.dtype
        # Stands for the embeddings of the whole sequence: only its shape, dtype and device are read.
        outline = torch.empty(1, dtype=dtype, device=tokens.device).expand(batch, local * group.size, 1)
        sequence_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=outline,
            attention_mask=whole_mask,
            past_key_values=None,
            position_ids=positions,
        )
        return super().forward(
            input_ids=input_ids,
            # The stock model takes a four-dimensional mask for a finished one and makes none of its own, which would
            # be for this rank's tokens only; the attention does not use it.
            attention_mask=torch.empty(0, 0, 0, 0, dtype=torch.bool, device=tokens.device),
            position_ids=positions,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            sequence_mask=sequence_mask,
            **kwargs,
        )

    def _gather(self, name: str, tensor: torch.Tensor, expected: tuple[int, int], device: torch.device) -> torch.Tensor:
        """A tensor [B, s] of every rank as [B, L]."""
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: expected this rank's part, of shape {expected}, got {tuple(tensor.shape)}")
        group = self.sequence_group
        tensor = tensor.to(device=device, dtype=torch.int64).contiguous()
        return all_gather(tensor, group.group, operator=f"sequence_{name}", dim=1, config=group.config)


class SequenceCausalLM(nn.Module):
    """A model with a language head on this rank's tokens: logits [B, s, V], loss over the tokens of all ranks."""

    sequence_group: SequenceGroup

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
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=False,
            **kwargs,
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


class SequenceLoss:
    """The model's loss function, called by transformers as ``loss_function(logits=, labels=, vocab_size=, ...)``."""

    def __init__(self, group: SequenceGroup) -> None:
        self.group = group

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: int | torch.Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Global token mean of ``shift_labels`` [B, s]; ``num_items_in_batch`` counts the tokens of all ranks."""
        assert shift_labels is not None, "checked by the model's forward"
        return sequence_loss(
            logits,
            shift_labels,
            self.group.mesh,
            num_items=num_items_in_batch,
            ignore_index=ignore_index,
            config=self.group.config,
        )
