"""A parallelized model seen as the stock one: whole batches go in, whole outputs come out, on every rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils import ModelOutput

from odysseus_kernels.nn.gather import gather_sequence
from odysseus_kernels.nn.logprobs import sequence_logprobs
from odysseus_kernels.nn.loss import IGNORE_INDEX
from odysseus_kernels.nn.sequence import shard_sequence
from odysseus_kernels.nn.step import stepped

__all__ = ["WholeBatches"]

_PARTS = ("input_ids", "labels", "attention_mask", "position_ids")
# What collators without padding add for flash-attention: positions that begin again say the same.
_REPEATED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclasses.dataclass
class _TokenOutput(ModelOutput):
    """What is known of each next token; 0 where its label is -100."""

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


class WholeBatches:
    """Calls a parallelized model with whole batches, as code that was written for the stock model does.

    A batch, the same on all ranks that share the sequence, is cut by :func:`odysseus_kernels.shard_sequence`. Outputs
    are those of the whole batch: the loss always, logits and hidden states as far as they are asked for. Whole logits
    are [B, L, V] on every rank; with labels they are made only for ``logits=True``. Everything else is the model's.

    Args:
        model: what :func:`odysseus_kernels.parallelize` returned, or a wrapper around it.
        logits: whether a call with labels returns logits, too.

    Raises:
        ValueError: by a call, for arguments that a parallelized model does not take.
    """

    def __init__(self, model: nn.Module, *, logits: bool = False) -> None:
        self._model, self._logits = model, logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _get_name(self) -> str:
        # transformers' Trainer asks so whether labels are to be shifted.  FSDP2 puts a class of another name before.
        return next(cls.__name__ for cls in type(stepped(self._model)).__mro__ if not issubclass(cls, FSDPModule))

    def __call__(self, **given: Any) -> Any:
        """The stock model's outputs; ``loss`` and ``logits`` are of the whole batch."""
        batch = {name: given.pop(name) for name in _PARTS if given.get(name) is not None}
        if "position_ids" in batch:
            for name in _REPEATED:
                given.pop(name, None)
        labels = batch.get("labels")
        _check_rest(given)
        if given.pop("fused_lm_head", False):
            return self._of_each_token(batch, given)
        if labels is None or self._logits:
            return self._with_logits(batch, labels, given)
        part = shard_sequence(batch, self._model)
        outputs = self._model(**part, **given)
        return self._made_whole(outputs, part)

    def _with_logits(self, batch: dict[str, torch.Tensor], labels: torch.Tensor | None, given: dict[str, Any]) -> Any:
        items = given.pop("num_items_in_batch", None)
        model: Any = stepped(self._model)
        part = shard_sequence({name: tensor for name, tensor in batch.items() if name != "labels"}, self._model)
        outputs = self._made_whole(self._model(**part, **given), part)
        if labels is None or not isinstance(outputs, ModelOutput):
            return outputs
        arguments = {} if items is None else {"num_items_in_batch": items}
        loss = model.loss_function(
            logits=outputs.logits, labels=labels, vocab_size=model.config.vocab_size, **arguments
        )
        aux = getattr(outputs, "aux_loss", None)
        if aux is not None:
            loss = loss + model.router_aux_loss_coef * aux
        # A loss goes before everything else, where tuples made of outputs have it.
        return type(outputs)(loss=loss, **{name: value for name, value in outputs.items() if name != "loss"})

    def _of_each_token(self, batch: dict[str, torch.Tensor], given: dict[str, Any]) -> _TokenOutput:
        """What TRL's trainers ask a model for instead of logits, [B, L-1] each."""
        if "labels" not in batch:
            raise ValueError("fused_lm_head: expected labels beside it, whose log-probabilities it is about")
        if given.get("output_router_logits"):
            raise ValueError(
                "router_aux_loss_coef: expected 0 with a trainer that asks for log-probabilities, which come without "
                "a router's loss; transformers' own trainer has it"
            )
        for name in ("num_items_in_batch", "use_cache", "output_router_logits"):
            given.pop(name, None)
        part = shard_sequence(batch, self._model)
        found: Any = sequence_logprobs(self._model, part, entropy=True, top1=True, **given)
        mask = batch["labels"][:, 1:] != IGNORE_INDEX
        return _TokenOutput(
            loss=-found.logprobs.sum() / mask.sum().clamp(min=1),
            log_probs=found.logprobs,
            entropy=found.entropy.masked_fill(~mask, 0.0),
            is_top1=found.is_top1 & mask,
            label_mask=mask,
        )

    def _made_whole(self, outputs: Any, part: Mapping[str, torch.Tensor]) -> Any:
        """Logits and hidden states of the whole sequences; a router's logits stay those of this rank's tokens."""
        if not isinstance(outputs, ModelOutput):
            raise ValueError("return_dict: expected True or nothing, got a tuple: outputs are made whole by name")
        group = stepped(self._model).sequence_group
        if outputs.get("logits") is not None:
            outputs["logits"] = gather_sequence(outputs["logits"], part, group.mesh, group.config)
        if outputs.get("hidden_states") is not None:
            outputs["hidden_states"] = tuple(
                gather_sequence(hidden, part, group.mesh, group.config) for hidden in outputs["hidden_states"]
            )
        return outputs


def _check_rest(given: Mapping[str, Any]) -> None:
    unknown = sorted(name for name, value in given.items() if isinstance(value, torch.Tensor) and value.ndim > 0)
    if unknown:
        raise ValueError(
            f"expected {', '.join(_PARTS)} as tensors of the batch, got {', '.join(unknown)} as well, of which a "
            f"parallelized model does not know how they are cut: leave them out in the collator"
        )
