"""Rows of documents into batches: which rows a batch has, and the tensors that it is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from odysseus_kernels.data.windows import Row
from odysseus_kernels.nn.loss import IGNORE_INDEX

__all__ = ["COUNTED", "packed_batch", "padded_batch", "similar_lengths"]

COUNTED = "counted_tokens"


def similar_lengths(rows: Sequence[Row], size: int, generator: torch.Generator | None) -> list[list[Row]]:
    """Batches of ``size`` rows of similar lengths, in random order; what is left over is the last one.

    Without a generator the batch with the longest rows comes first, and memory runs out at once if it does at all.
    """
    whole = len(rows) // size * size
    # What is left over is the end of the epoch, as without buckets: not the shortest rows of it.
    by_length = sorted(rows[:whole], key=lambda row: -row.tokens.numel())
    batches = [by_length[start : start + size] for start in range(0, whole, size)]
    if generator is not None:
        batches = [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
    return [*batches, list(rows[whole:])] if whole < len(rows) else batches


def packed_batch(rows: Sequence[Row | None], width: int, pad_token: int) -> dict[str, Tensor]:
    """``input_ids``, ``labels``, ``position_ids`` [B, width]; positions begin at 0 in each document and in the padding.

    So the padding is a document of its own, and no mask is needed, beside which models do not look for documents.
    Where there is any, ``counted_tokens`` is 0 for it.
    """
    batch = _filled(rows, width, pad_token)
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        own = [] if row is None else row.documents
        rest = width - sum(own)
        torch.cat([torch.arange(tokens) for tokens in (*own, rest)], out=positions[index])
    counted = batch.pop(COUNTED)
    batch["position_ids"] = positions
    return batch if bool(counted.all()) else {**batch, COUNTED: counted}


def padded_batch(rows: Sequence[Row | None], width: int, pad_token: int) -> dict[str, Tensor]:
    """``input_ids``, ``labels``, ``attention_mask`` [B, width].

    A row without a document is not masked: attention of a row that sees nothing would be nan.  It counts for nothing by
    its labels and, in losses over all tokens, by ``counted_tokens``, which is there if such a row is.
    """
    batch = _filled(rows, width, pad_token)
    counted = batch.pop(COUNTED)
    batch["attention_mask"] = counted.clone()
    empty = [index for index, row in enumerate(rows) if row is None]
    if not empty:
        return batch
    batch["attention_mask"][empty] = 1
    return {**batch, COUNTED: counted}


def _filled(rows: Sequence[Row | None], width: int, pad_token: int) -> dict[str, Tensor]:
    shape = (len(rows), width)
    tokens = torch.full(shape, pad_token, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    counted = torch.zeros(shape, dtype=torch.int64)
    for index, row in enumerate(rows):
        if row is not None:
            number = row.tokens.numel()
            tokens[index, :number], labels[index, :number], counted[index, :number] = row.tokens, row.labels, 1
    return {"input_ids": tokens, "labels": labels, COUNTED: counted}
