"""Several completions of one prompt in one row, which has the prompt once.

A row is the prompt without its last token, and then, for each completion, that last token and the completion: it is the
token that predicts a completion's first one, and can predict one only.  Positions of each completion go on where the
prompt ends, and ``shared_prefix`` says who sees whom: tokens see those of their own number, and 0, the prompt.

    prompt a b c, completions x y and z      input_ids      a b | c x y | c z
                                             position_ids   0 1 | 2 3 4 | 2 3
                                             shared_prefix  0 0 | 1 1 1 | 2 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from odysseus_kernels.nn.loss import IGNORE_INDEX
from odysseus_kernels.nn.sequence import NOBODY, SHARED_PREFIX

__all__ = ["pack_shared_prefix", "unpack_shared_prefix"]


def pack_shared_prefix(prompts: Sequence[Tensor], completions: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """A whole batch with a row for each prompt and its completions, for :func:`shard_sequence`.

    A model computes the prompt once, and log-probabilities and gradients are those of a row for each completion with
    the prompt repeated.  Labels are the tokens of completions.

    Args:
        prompts: token ids [P] of each, integers; at least one token.
        completions: for each prompt its completions, token ids [C] of each; at least one token.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` and ``shared_prefix``, int64 [B, L], filled up to the longest row;
        ``counted_tokens``, 0 for what rows are filled with, where there is any.

    Raises:
        ValueError: for other shapes or types, prompts without completions, or either without tokens.

    Example:
        >>> prompt, first, second = torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([10])
        >>> packed = ody.pack_shared_prefix([prompt], [[first, second]])
        >>> packed["input_ids"].tolist(), packed["position_ids"].tolist()
        ([[5, 6, 7, 8, 9, 7, 10]], [[0, 1, 2, 3, 4, 2, 3]])
        >>> policy = ody.parallelize(model, mesh, "ulysses")
        >>> logprobs = ody.sequence_logprobs(policy, ody.shard_sequence(packed, policy))
        >>> [one.shape for one in ody.unpack_shared_prefix(logprobs, packed)[0]]
        [torch.Size([2]), torch.Size([1])]
    """
    if len(prompts) == 0 or len(prompts) != len(completions):
        raise ValueError(
            f"completions: expected those of each prompt, got {len(completions)} groups for {len(prompts)} prompts"
        )
    rows: list[list[Tensor]] = []
    for number, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        _check(f"prompts[{number}]", prompt)
        if len(group) == 0:
            raise ValueError(f"completions[{number}]: expected at least one completion, got none")
        for index, completion in enumerate(group):
            _check(f"completions[{number}][{index}]", completion)
        rows.append(_row(prompt, group))
    fills = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0, SHARED_PREFIX: NOBODY}
    batch = {
        name: pad_sequence([row[place] for row in rows], batch_first=True, padding_value=fill)
        for place, (name, fill) in enumerate(fills.items())
    }
    filled = batch[SHARED_PREFIX] == NOBODY
    return {**batch, "counted_tokens": filled.logical_not().long()} if bool(filled.any()) else batch


def unpack_shared_prefix(values: Tensor, batch: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """What belongs to the tokens of each completion, out of what there is for each next token of a packed batch.

    Args:
        values: [B, L-1, ...], such as :func:`sequence_logprobs` returns.
        batch: what :func:`pack_shared_prefix` returned.

    Returns:
        For each prompt and each of its completions [C, ...], differentiable.

    Raises:
        ValueError: if the two do not belong together.

    Example:
        >>> packed = ody.pack_shared_prefix([torch.tensor([5, 6])], [[torch.tensor([7]), torch.tensor([8, 9])]])
        >>> places = torch.arange(1, 6)[None]  # of each next token
        >>> [one.tolist() for one in ody.unpack_shared_prefix(places, packed)[0]]
        [[2], [4, 5]]
    """
    if SHARED_PREFIX not in batch or "labels" not in batch:
        raise ValueError(f"batch: expected what pack_shared_prefix returned, got the keys {sorted(batch)}")
    numbers = batch[SHARED_PREFIX][:, 1:]
    if values.shape[:2] != numbers.shape:
        raise ValueError(f"values: expected {list(numbers.shape)}, for each next token, got {list(values.shape)}")
    wanted = numbers.masked_fill(batch["labels"][:, 1:] == IGNORE_INDEX, 0)
    return [
        [row[where == number] for number in range(1, int(where.max()) + 1)]
        for row, where in zip(values, wanted.to(values.device), strict=True)
    ]


def _check(name: str, tokens: Tensor) -> None:
    integers = isinstance(tokens, Tensor) and not (tokens.is_floating_point() or tokens.dtype == torch.bool)
    if not integers or tokens.ndim != 1 or tokens.numel() == 0:
        got = f"{list(tokens.shape)} {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{name}: expected token ids in one dimension, at least one, got {got}")


def _row(prompt: Tensor, group: Sequence[Tensor]) -> list[Tensor]:
    """Token ids, labels, positions and numbers of a row."""
    shared, last, start = prompt[:-1], prompt[-1:], prompt.numel() - 1
    ids, labels = [shared], [torch.full_like(shared, IGNORE_INDEX)]
    positions, numbers = [torch.arange(start)], [torch.zeros(start, dtype=torch.int64)]
    for number, completion in enumerate(group, 1):
        tokens = completion.to(prompt)
        ids += [last, tokens]
        labels += [torch.full_like(last, IGNORE_INDEX), tokens]
        positions.append(torch.arange(start, start + 1 + tokens.numel()))
        numbers.append(torch.full((1 + tokens.numel(),), number))
    return [torch.cat(parts).to(prompt.device, torch.int64) for parts in (ids, labels, positions, numbers)]
