"""The losses of the examples of training methods and their gradients, on ranks and in one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import dpo
import grpo
import methods
from data import Text

PROMPT, LENGTH = 7, 22


def batch_of(method: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randint(256, (400,), generator=generator, dtype=torch.uint8)
    if method == "dpo":
        return dpo.pairs(Text(numbers, numbers, 1), 2, LENGTH, PROMPT)
    return grpo.rollouts(methods.small_model(LENGTH), numbers[:PROMPT].long(), 4, LENGTH - PROMPT)


def step(mesh: Any, method: str, strategy: str) -> dict[str, Any]:
    """A loss and its gradients, of a policy that is not its reference, nor what it was when it made the rollouts."""
    batch = batch_of(method)
    policy, reference = methods.small_model(LENGTH), methods.small_model(LENGTH)
    with torch.no_grad():
        for number, parameter in enumerate(reference.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    policy, reference = (methods.parallel(model, mesh, strategy) for model in (policy, reference))
    with torch.no_grad():
        fixed = methods.logprobs(reference, batch, mesh)
    new, valid = methods.logprobs(policy, batch, mesh), batch["labels"][:, 1:] != -100
    if method == "dpo":
        loss, other = dpo.dpo_loss(new, fixed)
    else:
        old = new.detach() - torch.linspace(-0.4, 0.4, new.numel()).view_as(new) * valid  # some ratios are clipped
        loss, other = grpo.grpo_loss(new, old, fixed, grpo.advantages_of(batch), valid)
    loss.backward()
    gradients = {name: p.grad for name, p in policy.named_parameters()}
    if mesh is not None:
        gradients = {name: grad.full_tensor() for name, grad in gradients.items()}
    return {"batch": batch["input_ids"], "loss": loss.item(), "other": other.detach(), "gradients": gradients}


def parallel_step(rank: int, world_size: int, method: str, strategy: str) -> dict[str, Any]:
    return step(init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",)), method, strategy)
