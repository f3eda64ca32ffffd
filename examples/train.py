"""Trains a byte-level Llama on the sources of Python's standard library, on one process or on several ranks.

    python examples/train.py                                    # stock transformers model, one process
    torchrun --nproc-per-node 2 examples/train.py               # the same program on 2 ranks, the same losses
    torchrun --nproc-per-node 4 examples/train.py --strategy ulysses --ring 2       # Ring attention outside of Ulysses

Every rank builds the same model and draws the same batches.  What differs on several ranks are two calls:
``parallelize(model, mesh)`` after the model is built, and ``shard_sequence(batch, mesh)`` before each forward.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from checkpoint import latest, load, save
from data import VOCABULARY, Text, load_text
from report import plot_runs, print_table, write_run
from rich.progress import Progress
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import odysseus_kernels as ody
from odysseus_kernels.comm.functional import all_gather

WARM_UP_STEPS = 10
VALIDATION_BATCHES = 4


NUMBERS: dict[str, tuple[int | float, str]] = {
    "steps": (50, "number of the last step"),
    "seq-len": (512, "bytes in a sequence"),
    "batch-size": (4, "sequences in a batch"),
    "hidden": (256, "width of the model"),
    "layers": (4, "decoder layers"),
    "heads": (8, "query heads"),
    "kv-heads": (4, "key/value heads"),
    "lr": (1e-3, "learning rate after warm-up"),
    "seed": (0, "of the weights and the batches"),
    "eval-every": (0, "steps between validations; 0: at the end only"),
    "text-limit": (8_000_000, "bytes of text to read"),
    "threads": (0, "threads of each rank; 0: cores divided by the ranks on this machine"),
    "timeout": (120.0, "seconds a rank waits for another one"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (value, help_text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{help_text} (default: %(default)s)")
    parser.add_argument(
        "--strategy",
        default="odysseus",
        choices=("tp", "tp_sp", "ulysses", "odysseus", "tsp"),
        help="how ranks share the model (default: %(default)s)",
    )
    parser.add_argument(
        "--ring", type=int, default=1, help="ring ranks outside of the strategy's (default: 1, no ring)"
    )
    parser.add_argument("--mode", default="auto", choices=("auto", "fused", "unfused"))
    parser.add_argument("--transport", default="auto", choices=("auto", "symmetric", "collective"))
    parser.add_argument("--checkpoint", type=Path, help="folder of checkpoints: one at the end and at each validation")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint, if there is one")
    parser.add_argument("--output", type=Path, default=Path("train-output"), help="folder (default: %(default)s)")
    parser.add_argument("--plot", action="store_true", help="draw loss.png with all runs in the output folder")
    options = parser.parse_args()
    if options.resume and options.checkpoint is None:
        parser.error("--resume: expected --checkpoint with the folder to resume from")
    return options


@contextlib.contextmanager
def process_group(options: argparse.Namespace) -> Iterator[DeviceMesh | None]:
    """The mesh of all ranks that torchrun started, or None in a single process."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks % options.ring:
        raise SystemExit(f"--ring: expected a divisor of the {ranks} ranks, got {options.ring}")
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks))
    if ranks == 1:
        yield None
        return
    if local_ranks == ranks:
        # All ranks are on this machine, whose own name containers often cannot resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=options.timeout))
    try:
        if options.ring == 1:
            yield init_device_mesh("cpu", (ranks,), mesh_dim_names=("seq",))
        else:
            yield init_device_mesh("cpu", (options.ring, ranks // options.ring), mesh_dim_names=("ring", "seq"))
    finally:
        dist.destroy_process_group()


def build_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """A stock Llama with random weights, the same on every rank."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=math.ceil(options.hidden * 8 / 3 / 96) * 96,  # 2, 3 and 4 ranks divide it
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.seq_len,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def batch_loss(model: LlamaForCausalLM, ids: torch.Tensor, mesh: DeviceMesh | None, strategy: str) -> torch.Tensor:
    """Mean over all predicted bytes of the batch, the same number on every rank."""
    batch = {"input_ids": ids, "labels": ids}
    if mesh is not None:
        batch = ody.shard_sequence(batch, mesh, strategy)
    return model(**batch).loss


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, text: Text, mesh: DeviceMesh | None, options: argparse.Namespace) -> float:
    """Validation loss on held-out files."""
    model.eval()
    total = predicted = 0.0
    for ids in text.validation_batches(options.batch_size, options.seq_len, VALIDATION_BATCHES):
        count = ids.shape[0] * (ids.shape[1] - 1)
        total += batch_loss(model, ids, mesh, options.strategy).item() * count
        predicted += count
    model.train()
    return total / predicted / math.log(2)


def peak_memory(mesh: DeviceMesh | None) -> list[int]:
    """Most bytes that each rank's process has had in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit])
    return (own if mesh is None else all_gather(own, operator="peak_memory")).tolist()


def train(options: argparse.Namespace, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Trains up to ``options.steps`` and returns what was measured."""
    rank = 0 if mesh is None else dist.get_rank()
    text, model = load_text(options.text_limit), build_model(options)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if mesh is not None:
        overlap = ody.OverlapConfig(mode=options.mode, transport=options.transport, timeout_s=options.timeout)
        ody.parallelize(model, mesh, options.strategy, overlap)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    losses: dict[str, float] = {}
    validation: dict[str, float] = {}
    seconds: list[float] = []
    found = latest(options.checkpoint) if options.resume else None
    if options.resume and found is None and rank == 0:
        print(f"--resume: no complete checkpoint in {options.checkpoint}, training begins at step 1")
    done, losses = (0, losses) if found is None else load(found, model, optimizer)
    with Progress(transient=True) as progress:
        # Only where somebody watches: log files get the table at the end.
        progress.disable = rank != 0 or not progress.console.is_terminal
        task = progress.add_task("loss", total=options.steps, completed=done)
        for step in range(done + 1, options.steps + 1):
            begin = time.perf_counter()
            for group in optimizer.param_groups:
                # Constant after warm-up: a run that goes on with more steps is the longer run.
                group["lr"] = options.lr * min(1.0, step / WARM_UP_STEPS)
            ids = text.batch(options.seed, step, options.batch_size, options.seq_len)
            loss = batch_loss(model, ids, mesh, options.strategy)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[str(step)] = loss.item()
            seconds.append(time.perf_counter() - begin)
            progress.update(task, advance=1, description=f"loss {losses[str(step)]:.4f}")
            if step == options.steps or (options.eval_every and step % options.eval_every == 0):
                validation[str(step)] = bits_per_byte(model, text, mesh, options)
                if options.checkpoint is not None:
                    save(options.checkpoint, step, losses, model, optimizer)
    if not seconds:
        raise SystemExit(f"nothing to do: the checkpoint is of step {done}, and --steps is {options.steps}")
    # The first step also pays for buffers and worker threads.
    typical = statistics.median(seconds[1:] or seconds)
    name = options.strategy + (f" x ring {options.ring}" if options.ring > 1 else "")
    return {
        "ranks": 1 if mesh is None else dist.get_world_size(),
        "how": "stock model" if mesh is None else f"{name}, {options.mode}, {options.transport} transport",
        "name": "stock" if mesh is None else name.replace(" ", "-"),
        "parameters": parameters,
        "losses": losses,
        "validation_bits_per_byte": validation,
        "tokens_per_second": options.batch_size * options.seq_len / typical,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(mesh),
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()},
        "text": {"files": text.files, "training": text.training.numel(), "validation": text.validation.numel()},
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, transformers, ody)},
    }


def main() -> None:
    """Trains, then writes, prints and plots on the first rank."""
    options = arguments()
    with process_group(options) as mesh:
        run = train(options, mesh)
        first = mesh is None or dist.get_rank() == 0
    if first:
        path = write_run(options.output, run)
        print_table(run)
        print(f"wrote {path}")
        if options.plot:
            print(f"wrote {plot_runs(options.output)}")


if __name__ == "__main__":
    main()
