"""A program of a user who checks types strictly: every public name, used as its documentation says.

It is read by mypy and never run (``tests/test_distribution.py``); ``assert_type`` fails where a name lost its type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import odysseus_kernels as ody

Batch = Mapping[str, Tensor]


def operators(x: Tensor, weight: Tensor, mesh: DeviceMesh) -> None:
    config = ody.OverlapConfig(mode="fused", transport="collective", chunks_per_rank=4, timeout_s=60.0)
    assert_type(ody.all_gather_linear(x, weight, group=mesh, config=config), Tensor)
    switched = ody.OverlapConfig(reduce="nvls", gather="nvls")
    assert_type(ody.linear_reduce_scatter(x, weight, group=mesh, config=switched), Tensor)
    assert_type(ody.all_gather_linear(x, (weight, weight), group=None), tuple[Tensor, ...])
    assert_type(ody.column_parallel_linear(x, weight, group=mesh), Tensor)
    assert_type(ody.linear_reduce_scatter(x, weight, None, group=mesh, dim=-2), Tensor)
    assert_type(ody.linear_all_reduce(x, weight, group=mesh), Tensor)
    assert_type(ody.zero3_linear(x, weight, group=mesh), Tensor)
    assert_type(ody.linear_all_to_all(x, weight, group=mesh, heads=4), Tensor)
    assert_type(ody.linear_all_to_all(x, (weight, weight), group=mesh), tuple[Tensor, ...])
    assert_type(ody.all_to_all_linear(x, weight, group=mesh), Tensor)
    assert_type(ody.ulysses_attention(x, x, x, group=mesh), Tensor)
    assert_type(ody.ring_attention(x, x, x, group=mesh, causal=True, layout="zigzag"), Tensor)
    assert_type(ody.pipelined_attention(x, (weight,) * 3, weight, group=mesh, head_dim=64), Tensor)
    assert_type(ody.pipelined_ulysses(x, (weight,) * 3, weight, group=mesh, head_dim=64, head_groups=2), Tensor)
    assert_type(ody.synchronize(mesh), None)


def model(stock: Any, mesh: DeviceMesh, batch: Batch, batches: Iterable[Batch], folder: Path) -> float:
    parallel: nn.Module = ody.parallelize(stock, mesh, strategy="odysseus")
    assert_type(ody.explain(parallel), str)
    cut = assert_type(ody.shard_sequence(batch, parallel), dict[str, Tensor])
    assert_type(ody.declare_cut(batch, mesh, length=8), dict[str, Tensor])
    assert_type(ody.gather_sequence(cut["input_ids"], cut, parallel), Tensor)
    assert_type(ody.num_items_in_batch(batches, mesh), float)
    loss = assert_type(ody.sequence_loss(cut["logits"], cut["labels"], mesh), Tensor)
    assert_type(ody.sequence_logprobs(parallel, cut), Tensor)
    entropy = ody.sequence_logprobs(parallel, cut, entropy=True).entropy
    assert_type(entropy, Tensor | None)
    checkpoint(parallel, cut, use_reentrant=False, context_fn=ody.selective_checkpoint)

    optimizer = ody.MasterWeights(torch.optim.AdamW, parallel.parameters(), lr=1e-4)
    with ody.step(parallel), ody.trace(folder / "step.json") as traced, ody.CommRecorder() as record:
        torch.autograd.backward(loss)  # torch has no types for loss.backward()
        assert_type(ody.clip_grad_norm_(parallel.parameters(), 1.0), Tensor)
        optimizer.step()
    assert_type(traced.path, Path)
    assert_type(record.bytes(operator="zero3_linear"), int)
    assert_type(record.table(), str)

    assert_type(ody.set_strategy(parallel, "ulysses", optimizer=optimizer), int)
    ody.save_checkpoint(folder, parallel, optimizer, extra={"step": 1})
    assert_type(ody.load_checkpoint(folder, parallel, optimizer), dict[str, Any])
    ody.save_pretrained(stock, folder)
    ody.load_pretrained(stock, folder)
    assert_type(ody.offload_activations(stock, folder=folder).bytes_out, int)
    assert_type(ody.verify(stock, batch, mesh).passed, bool)
    return loss.item()


def data(dataset: list[dict[str, list[int]]], mesh: DeviceMesh) -> None:
    loader = ody.SequenceDataLoader(dataset, mesh, length=4096, packing="best_fit")
    for batch in loader:
        assert_type(batch, dict[str, Tensor])
    loader.load_state_dict(assert_type(loader.state_dict(), dict[str, Any]))


def shared_prompt(prompt: Tensor, completions: list[Tensor], values: Tensor) -> None:
    batch = assert_type(ody.pack_shared_prefix([prompt], [completions]), dict[str, Tensor])
    assert_type(ody.unpack_shared_prefix(values, batch), list[list[Tensor]])


def planning() -> str:
    found = ody.plan("llama-3.1-8b", 8, 131072)
    return "nothing fits" if found.best is None else found.why


def errors(mesh: DeviceMesh) -> str:
    try:
        ody.synchronize(mesh)
    except (ody.PeerLostError, ody.SignalTimeoutError, ody.RankMismatchError) as error:
        assert_type(error.said, str)
    except ody.CommunicationError as error:
        assert_type(error.lasting, bool)
    except (ody.ExtensionNotBuiltError, ody.KernelUnavailableError) as error:
        return str(error)
    kinds: tuple[type[UserWarning], ...] = (ody.FallbackWarning, ody.CapacityWarning)
    return f"{kinds} of {assert_type(ody.__version__, str)}"
