"""Group-relative policy optimization of a byte-level Llama, on one process or on several ranks.

    python examples/grpo.py                                     # stock transformers model, one process
    torchrun --nproc-per-node 2 examples/grpo.py                # the same program on 2 ranks, the same numbers

A stock copy of the policy completes one prompt several times; a rule rewards each completion, and what a completion's
reward is above the group's mean is its advantage.  The policy's steps then weigh each token by its clipped ratio to
what the policy gave it before, and hold it to a reference model, which lies on the same ranks.  Prompts have no labels,
so that they count nowhere.  Each row of the batch repeats the prompt, as the stock model of one process needs it; a
parallelized one can have it once for all completions (``ody.pack_shared_prefix``).
"""

from __future__ import annotations

import torch
from data import load_text
from methods import Batch, logprobs, optimize, options_of, parallel, ranks, small_model
from transformers import LlamaForCausalLM

CLIP, KL_WEIGHT = 0.2, 0.04


def rollouts(model: LlamaForCausalLM, prompt: torch.Tensor, group: int, new_tokens: int) -> Batch:
    """``group`` sampled completions of a prompt [P], the same on every rank: they start from the same seed."""
    torch.manual_seed(1)
    rows = prompt.expand(group, -1)
    ids = model.generate(rows, attention_mask=torch.ones_like(rows), do_sample=True, max_new_tokens=new_tokens)
    labels = ids.clone()
    labels[:, : prompt.shape[0]] = -100
    return {"input_ids": ids, "labels": labels}


def advantages_of(batch: Batch) -> torch.Tensor:
    """[G, 1]: how far each completion's share of printable characters lies above the group's, in deviations."""
    completion = batch["labels"] != -100
    printable = (batch["input_ids"] >= 32) & (batch["input_ids"] < 127)
    rewards = (printable & completion).sum(1, keepdim=True) / completion.sum(1, keepdim=True)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def grpo_loss(
    new: torch.Tensor, old: torch.Tensor, reference: torch.Tensor, advantages: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective over a group's tokens, and the divergence from the reference model that is part of it.

    Args:
        new, old, reference: log-probabilities [G, L-1] under the policy, the policy of the rollouts, the reference.
        advantages: [G, 1].
        valid: bool [G, L-1], the tokens of completions.
    """
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    away = reference - new
    divergence = away.exp() - away - 1  # an estimate without bias that is never negative
    kl = (divergence * valid).sum() / valid.sum()
    return -(gain * valid).sum() / valid.sum() + KL_WEIGHT * kl, kl


def main() -> None:
    options = options_of(__doc__, prompt=24, new_tokens=40, group=4, lr=1e-3)
    length = options.prompt + options.new_tokens
    with ranks(options) as (mesh, prints):
        prompt = load_text(300_000).batch(seed=0, step=0, batch_size=1, length=options.prompt)[0]
        policy, reference = small_model(length), small_model(length)
        batch = rollouts(policy, prompt, options.group, options.new_tokens)
        advantages, valid = advantages_of(batch), batch["labels"][:, 1:] != -100
        policy, reference = (parallel(model, mesh, options.strategy) for model in (policy, reference))
        with torch.no_grad():
            old, fixed = logprobs(policy, batch, mesh), logprobs(reference, batch, mesh)

        def loss_of() -> tuple[torch.Tensor, str]:
            loss, kl = grpo_loss(logprobs(policy, batch, mesh), old, fixed, advantages, valid)
            return loss, f"divergence from the reference {kl.item():.6f}"

        optimize(policy, options.steps, loss_of, options.lr, prints=prints)


if __name__ == "__main__":
    main()
