"""Direct preference optimization of a byte-level Llama, on one process or on several ranks.

    python examples/dpo.py                                      # stock transformers model, one process
    torchrun --nproc-per-node 2 examples/dpo.py                 # the same program on 2 ranks, the same numbers

Of each pair the chosen row goes on with the text itself, the rejected one with the same bytes in a random order; both
repeat what comes before, which has no labels and counts nowhere.  The reference model lies on the same ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import Text, load_text
from methods import Batch, logprobs, optimize, options_of, parallel, ranks, small_model

BETA = 0.5


def pairs(text: Text, count: int, length: int, prompt: int) -> Batch:
    """[2 * count, length]: the chosen rows, then the rejected ones in the same order."""
    chosen = text.batch(seed=0, step=0, batch_size=count, length=length)
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(count, length - prompt, generator=generator).argsort(1)
    rejected = torch.cat((chosen[:, :prompt], chosen[:, prompt:].gather(1, order)), 1)
    ids = torch.cat((chosen, rejected))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


def dpo_loss(policy: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective, and by how much each chosen row is preferred [pairs]: log-probabilities [2 * pairs, L-1]."""
    gained = (policy - reference).sum(1)
    chosen, rejected = gained.chunk(2)
    margins = BETA * (chosen - rejected)
    return -F.logsigmoid(margins).mean(), margins


def main() -> None:
    options = options_of(__doc__, length=62, prompt=20, pairs=2, lr=2e-4)
    with ranks(options) as (mesh, prints):
        batch = pairs(load_text(300_000), options.pairs, options.length, options.prompt)
        policy, reference = (parallel(small_model(options.length), mesh, options.strategy) for _ in range(2))
        with torch.no_grad():
            fixed = logprobs(reference, batch, mesh)

        def loss_of() -> tuple[torch.Tensor, str]:
            loss, margins = dpo_loss(logprobs(policy, batch, mesh), fixed)
            return loss, f"mean margin {margins.mean().item():.6f}"

        optimize(policy, options.steps, loss_of, options.lr, prints=prints)


if __name__ == "__main__":
    main()
