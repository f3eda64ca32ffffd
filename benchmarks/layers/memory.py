"""What a step keeps for backward and the most that it holds at one moment, on this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.common.memory import peak_of_others, record_allocations
from benchmarks.layers.cases import LayerCase, Variant
from benchmarks.layers.runnable import Runnable
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.planner.memory import head_saved, saved

__all__ = ["expected_saved", "measure_memory_of_step", "saved_for_backward"]


def saved_for_backward(forward: Callable[[], Any], excluded: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd keeps after ``forward``, each once, without those of ``excluded``."""
    parameters = {_local(tensor).untyped_storage().data_ptr() for tensor in excluded}
    kept: dict[int, Tensor] = {}  # the tensors themselves: a storage that went back could come again as another's

    def pack(tensor: Tensor) -> Tensor:
        local = _local(tensor)
        address = local.untyped_storage().data_ptr()
        if local.numel() and address not in parameters:
            kept[address] = local.detach()
        return tensor.detach()  # itself, it would hold the graph where a node saves its own output, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def measure_memory_of_step(runnable: Runnable, variant: Variant) -> dict[str, int]:
    """Bytes on this rank: ``saved`` (0 for compute alone), ``peak``, ``reserved``.

    ``peak`` is what torch allocates in a step and holds at one moment, without outputs and gradients of parameters and
    input; ``gradients`` are these gradients; ``reserved`` are the buffers that the transports keep.
    """
    found = {"saved": 0, "reserved": 0}
    if runnable.forward is not None:
        found["saved"] = saved_for_backward(runnable.forward, runnable.parameters.values())
    output, events = record_allocations(lambda: [runnable.step()])
    results = [*output, *(t.grad for t in runnable.parameters.values() if t.grad is not None)]
    if runnable.leaf is not None and runnable.leaf.grad is not None:
        results.append(runnable.leaf.grad)
    storages = {_local(t).untyped_storage().data_ptr() for t in results}
    found["peak"], _ = peak_of_others(events, storages)
    found["gradients"] = sum(_local(t).nbytes for t in results[1:])
    if variant.kind == "ours" and runnable.mesh is not None:
        config = OverlapConfig(transport=variant.transport)  # type: ignore[arg-type]
        for name in runnable.mesh.mesh_dim_names or ():
            group = runnable.mesh.get_group(name)
            if dist.get_world_size(group) > 1:
                found["reserved"] += group_transports(group).choose(config, torch.device("cpu")).reserved_bytes
    return found


def expected_saved(case: LayerCase, variant: Variant, world: int, element_size: int) -> dict[str, int]:
    """What the formulas say is kept, by what it is, for the layers, the last norm, the rotation, and a model's head.

    ``world``: ranks of ring and seq together.
    """
    seq = world // variant.ring
    layer = saved(
        case.shape,
        variant.strategy,
        seq,
        tokens=case.tokens,
        ring=variant.ring,
        gathered=variant.gathered,  # type: ignore[arg-type]
        element_size=element_size,
    )
    ring_tokens = case.tokens // variant.ring
    rows = ring_tokens if variant.strategy == "tp" else ring_tokens // seq
    head_dim = case.hidden // case.heads
    sizes = {"tokens": case.tokens, "ring": variant.ring, "element_size": element_size}
    head = head_saved(case.hidden, variant.strategy, seq, **sizes) if case.level == "model" else 0
    return {
        **{name: case.layers * count for name, count in layer.items()},
        # Its input in fp32 and the normalised input, and one number in fp32 for each token.
        "last norm": rows * (case.hidden * (4 + element_size) + 4),
        # Cosines and sines for all tokens whose queries and keys are rotated here, shared by all layers.
        "rotation": 2 * (rows if variant.strategy == "tsp" else ring_tokens) * head_dim * element_size,
        "head": head,
    }
