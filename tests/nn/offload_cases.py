"""What the tests of offloaded layer inputs run, in this process and on ranks."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import odysseus_kernels as ody
from benchmarks.common.memory import peak_of_others, record_allocations

LAYERS, BATCH, LENGTH, WIDTH = 5, 2, 32, 96
INPUT = BATCH * LENGTH * WIDTH * 4  # bytes of one layer's input in one process


def make_model(length: int = LENGTH) -> LlamaForCausalLM:
    """The same in every process, checkpointed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=WIDTH,
        intermediate_size=144,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=length,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def make_batch(length: int = LENGTH) -> dict[str, torch.Tensor]:
    ids = torch.randint(120, (BATCH, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def step(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Loss and gradients of this rank."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *(g.to_local() if hasattr(g, "to_local") else g for g in gradients)]


def assert_same_bits(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 10
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def peak_of_step(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Most bytes that torch holds in a step beside gradients, which are there before."""
    step(model, batch)

    def again() -> list[torch.Tensor]:
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach()]

    again()
    _, events = record_allocations(again)
    return peak_of_others(events, set())[0]


@contextmanager
def small_files(nbytes: int) -> Iterator[None]:
    """Within it this process cannot make files larger than ``nbytes``, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def parallelized(rank: int, world: int, folder: str) -> None:
    """Same bits, with tiles and selective checkpoints, too; a whole step's peak falls by what the formula says."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("seq",))
    for strategy, settings in (
        ("odysseus", {}),
        ("odysseus", {"tile_rows": 8}),
        ("tp", {}),
        ("tp_sp", {"tile_rows": 8}),
    ):
        model = ody.parallelize(make_model(), mesh, strategy, ody.OverlapConfig(timeout_s=60, **settings))  # type: ignore[arg-type]
        batch = ody.shard_sequence(make_batch(), mesh, strategy)
        expected = [tensor.clone() for tensor in step(model, batch)]
        offload = ody.offload_activations(model, folder=folder, min_bytes=0)
        for _ in range(2):
            assert_same_bits(step(model, batch), expected)
        rows = BATCH * LENGTH // (1 if strategy == "tp" else world)
        assert offload.bytes_out == offload.bytes_in == 2 * (LAYERS - 1) * rows * WIDTH * 4
        offload.remove()
        assert_same_bits(step(model, batch), expected)
        assert offload.bytes_out == 2 * (LAYERS - 1) * rows * WIDTH * 4


def sharded_by_fsdp(rank: int, world: int, folder: str) -> None:
    """FSDP2 around the layers, before and after."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    steps = []
    for when in (None, "before", "after"):
        model = make_model()
        if when == "before":
            ody.offload_activations(model, folder=folder, min_bytes=0)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if when == "after":
            ody.offload_activations(model, folder=folder, min_bytes=0)
        steps.append([tensor.clone() for tensor in step(model, make_batch())])
    assert_same_bits(steps[1], steps[0])
    assert_same_bits(steps[2], steps[0])


def full_disk_on_one_rank(rank: int, world: int, folder: str) -> str:
    """What each rank raises when the disk of rank 0 is full."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("seq",))
    model = ody.parallelize(make_model(), mesh, config=ody.OverlapConfig(timeout_s=30))
    batch = ody.shard_sequence(make_batch(), mesh)
    step(model, batch)
    ody.offload_activations(model, folder=folder, min_bytes=0)
    try:
        with small_files(INPUT // world if rank == 0 else 1 << 30):
            step(model, batch)
    except (OSError, ody.CommunicationError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]
