"""Log-probabilities of completions that share their prompt, beside those of a row for each in one process."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from family_cases import Case, make_mesh, parallel_model, whole

import odysseus_kernels as ody

CASE = Case(kv_heads=4, dtype=torch.float64)
LENGTHS = [(9, [5, 8, 1]), (1, [4, 7])]
"""Of each prompt, and of its completions; the second prompt has nothing to share but its last token."""

Found = tuple[list[list[torch.Tensor]], dict[str, torch.Tensor]]


def tokens() -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Prompts and completions."""
    generator = torch.Generator().manual_seed(4)

    def some(length: int) -> torch.Tensor:
        return torch.randint(CASE.vocabulary, (length,), generator=generator)

    return [some(length) for length, _ in LENGTHS], [[some(one) for one in group] for _, group in LENGTHS]


def weigh(logprobs: list[list[torch.Tensor]]) -> torch.Tensor:
    """A loss in which every token of every completion has a weight of its own, as advantages and ratios give them."""
    flat = torch.cat([one for group in logprobs for one in group])
    return (flat * torch.linspace(-1, 2, flat.numel(), dtype=flat.dtype)).sum()


@functools.cache
def repeated(case: Case) -> Found:
    """A stock model, a row of its own for each completion, with nothing in it but the prompt and the completion."""
    model, found = case.model(), []
    for prompt, group in zip(*tokens(), strict=True):
        rows = []
        for completion in group:
            ids = torch.cat((prompt, completion))[None]
            logprobs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, :-1]
            rows.append(logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0])
        found.append(rows)
    weigh(found).backward()
    return _detached(found), {name: p.grad for name, p in model.named_parameters()}


def shared(rank: int, world: int, case: Case, strategy: str, settings: dict[str, Any]) -> Found:
    """The same of a parallelized model, a row for each prompt."""
    model = parallel_model(case, strategy, make_mesh(world, 1), **settings)
    packed = ody.pack_shared_prefix(*tokens())
    found = ody.unpack_shared_prefix(ody.sequence_logprobs(model, ody.shard_sequence(packed, model)), packed)
    weigh(found).backward()
    return _detached(found), {name: whole(p.grad) for name, p in model.named_parameters()}


def with_statistics(rank: int, world: int, case: Case) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Entropies of completions, packed and repeated, and the loss of the packed batch."""
    model, packed = parallel_model(case, "ulysses", make_mesh(world, 1)), ody.pack_shared_prefix(*tokens())
    part = ody.shard_sequence(packed, model)
    entropies = ody.unpack_shared_prefix(ody.sequence_logprobs(model, part, entropy=True).entropy, packed)
    return (
        torch.cat([one for group in entropies for one in group]).detach(),
        part["shared_prefix"],
        model(**part).loss.item(),
    )


def stock_entropies(case: Case) -> torch.Tensor:
    model, found = case.model(), []
    for prompt, group in zip(*tokens(), strict=True):
        for completion in group:
            logprobs = model(input_ids=torch.cat((prompt, completion))[None]).logits[0, len(prompt) - 1 : -1]
            found.append(torch.distributions.Categorical(logits=logprobs).entropy())
    return torch.cat(found).detach()


def refused(rank: int, world: int) -> dict[str, str]:
    """What is said where a prompt cannot be shared."""
    packed, said = ody.pack_shared_prefix(*tokens()), {}
    padded = {**packed, "attention_mask": torch.ones_like(packed["input_ids"])}
    for name, case, strategy, ring, settings, batch in (
        ("tsp", CASE, "tsp", 1, {}, packed),
        ("ring", CASE, "odysseus", world, {}, packed),
        ("window", dataclasses.replace(CASE, family="mistral"), "odysseus", 1, {}, packed),
        ("pieces", CASE, "odysseus", 1, {"pipeline": 2}, packed),
        ("groups", CASE, "ulysses", 1, {"pipeline": 2}, packed),
        ("mask", CASE, "odysseus", 1, {}, padded),
    ):
        model = parallel_model(case, strategy, make_mesh(world, ring), **settings)
        try:
            striped = settings.get("pipeline") if strategy == "odysseus" else 1
            model(**ody.shard_sequence(batch, model, pieces=striped))
        except ValueError as error:
            said[name] = str(error)
    return said


def _detached(found: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    return [[one.detach() for one in group] for group in found]
