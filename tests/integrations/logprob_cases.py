"""Log-probabilities and what is made of them: a policy's step, a preference's step, on ranks and in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cut_cases import gradients_of
from family_cases import Case, data_mesh, fully_sharded, make_mesh, packed_positions, parallel_model

import odysseus_kernels as ody

# Not their router's loss, which is no part of these objectives.
CHANGES = (("num_hidden_layers", 1),)
PROMPT = 5


def rollouts(length: int = 21, *, packed: bool = False) -> dict[str, torch.Tensor]:
    """Prompts, whose tokens have no label, and completions; in the second row shorter, padded at the right."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, 120, (2, length), generator=generator)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    batch = {"input_ids": ids, "labels": labels}
    if packed:
        batch["position_ids"] = packed_positions(length).expand(2, -1).clone()
    else:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][1, -4:] = 0
        labels[1, -4:] = -100
    return batch


def stock_logprobs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits, labels = model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return -losses


def policy_objective(logprobs: torch.Tensor, old: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Group-relative policy optimization: clipped ratios times advantages, over the tokens of completions."""
    advantages = torch.tensor([[0.7], [-1.3]])
    ratio = (logprobs - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(gain * valid).sum() / valid.sum()


def preference_objective(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Direct preference optimization: the first row is the one that was chosen."""
    gained = (logprobs - reference).sum(1)
    return -F.logsigmoid(0.5 * (gained[0] - gained[1]))


def objectives(batch: dict[str, torch.Tensor], policy: Any, reference: Any, logprobs: Any) -> dict[str, Any]:
    """Both steps; ``logprobs(model)`` [B, L-1] of either model."""
    valid = (batch["labels"][:, 1:] != -100).float()
    with torch.no_grad():
        old, fixed = logprobs(policy) - 0.1 * valid, logprobs(reference)
    found: dict[str, Any] = {"reference": fixed}
    for name in ("policy", "preference"):
        mine = logprobs(policy)
        loss = policy_objective(mine, old, valid) if name == "policy" else preference_objective(mine, fixed)
        loss.backward()
        found[name] = {"logprobs": mine.detach(), "loss": loss.item(), "gradients": gradients_of(policy)}
    return found


def stock_steps(case: Case, *, packed: bool) -> dict[str, Any]:
    policy, reference = case.model(), case.model(seed=1)
    batch = rollouts(packed=packed)
    return objectives(batch, policy, reference, lambda model: stock_logprobs(model, batch))


def parallel_steps(rank: int, world_size: int, case: Case, strategy: str, ring: int, packed: bool) -> dict[str, Any]:
    mesh = make_mesh(world_size, ring)
    policy, reference = parallel_model(case, strategy, mesh), ody.parallelize(case.model(seed=1), mesh, strategy)
    batch = rollouts(packed=packed)
    part = ody.shard_sequence(batch, mesh, strategy)
    return objectives(batch, policy, reference, lambda model: ody.sequence_logprobs(model, part))


def beside_fsdp(rank: int, world_size: int) -> torch.Tensor:
    """The log-probabilities of this replica's row."""
    mesh = data_mesh((2, 1, 2))
    model = fully_sharded(ody.parallelize(Case(changes=CHANGES).model(), mesh, "ulysses"), mesh)
    replica = mesh.get_local_rank("dp")
    row = {name: tensor[replica : replica + 1] for name, tensor in rollouts().items()}
    return ody.sequence_logprobs(model, ody.shard_sequence(row, mesh, "ulysses")).detach()


def parts(rank: int, world_size: int, strategy: str) -> torch.Tensor:
    """Parts by themselves: a sum over this rank's tokens counts with those of the others."""
    mesh = make_mesh(world_size, 1)
    case = Case(changes=CHANGES)
    model = parallel_model(case, strategy, mesh)
    logprobs = ody.sequence_logprobs(model, ody.shard_sequence(rollouts(), mesh, strategy), gather=False)
    logprobs.sum().backward()
    return gradients_of(model)["model.embed_tokens.weight"]


def refusals(rank: int, world_size: int) -> None:
    mesh = make_mesh(world_size, 1)
    model = parallel_model(Case(changes=CHANGES), "odysseus", mesh)
    batch = rollouts()
    part = ody.shard_sequence(batch, mesh)
    with pytest.raises(ValueError, match="model: expected one that parallelize returned, got LlamaForCausalLM"):
        ody.sequence_logprobs(Case(changes=CHANGES).model(), part)
    with pytest.raises(ValueError, match='expected labels and nothing to divide by beside "none".*got no labels'):
        ody.sequence_logprobs(model, ody.shard_sequence({"input_ids": batch["input_ids"]}, mesh))
    with pytest.raises(ValueError, match="got num_items_in_batch"):
        ody.sequence_logprobs(model, part, num_items_in_batch=3)
    with pytest.raises(ValueError, match='reduction: expected "mean" or "none", got \'sum\''):
        model(**part, reduction="sum")
    with pytest.raises(ValueError, match="through shard_sequence"):
        ody.sequence_logprobs(model, batch)
