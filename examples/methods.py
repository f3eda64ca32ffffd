"""What the examples of training methods share: ranks, a small byte-level Llama, log-probabilities, training steps."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from train import build_model, process_group
from transformers import LlamaForCausalLM

import odysseus_kernels as ody

__all__ = ["Batch", "logprobs", "optimize", "options_of", "parallel", "ranks", "small_model"]

Batch = dict[str, torch.Tensor]


def options_of(description: str | None, **numbers: float) -> argparse.Namespace:
    """The command line: an option for each number, and how ranks share the model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"steps": 4, **numbers}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="(default: %(default)s)")
    parser.add_argument("--strategy", default="odysseus", choices=("tp", "tp_sp", "ulysses", "odysseus", "tsp"))
    parser.add_argument("--ring", type=int, default=1, help="ring ranks outside of the strategy's")
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a rank waits for another one")
    return parser.parse_args()


@contextlib.contextmanager
def ranks(options: argparse.Namespace) -> Iterator[tuple[DeviceMesh | None, bool]]:
    """The mesh of all ranks, None in a single process, and whether this one prints."""
    with process_group(options) as mesh:
        yield mesh, mesh is None or dist.get_rank() == 0


def small_model(length: int) -> LlamaForCausalLM:
    """The same on every rank."""
    sizes = {"hidden": 96, "layers": 2, "heads": 4, "kv_heads": 4, "seed": 0}
    return build_model(argparse.Namespace(seq_len=length, **sizes))


def parallel(model: LlamaForCausalLM, mesh: DeviceMesh | None, strategy: str) -> LlamaForCausalLM:
    """``model`` on all ranks of ``mesh``, or as it is."""
    return model if mesh is None else ody.parallelize(model, mesh, strategy)


def logprobs(model: LlamaForCausalLM, batch: Batch, mesh: DeviceMesh | None) -> torch.Tensor:
    """[B, L-1] of each next token, 0 where the label is -100, the same on every rank."""
    if mesh is not None:
        return ody.sequence_logprobs(model, ody.shard_sequence(batch, model))
    logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    return -torch.nn.functional.cross_entropy(logits.mT.float(), labels, ignore_index=-100, reduction="none")


def optimize(
    model: LlamaForCausalLM, steps: int, loss_of: Callable[[], tuple[torch.Tensor, str]], lr: float, *, prints: bool
) -> None:
    """Steps on a loss, which comes with what else is to be printed beside it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(1, steps + 1):
        loss, more = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if prints:
            print(f"step {step}: loss {loss.item():.6f}, {more}")
