"""Training from a loader: on ranks, and in one process with torch's own."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import odysseus_kernels as ody
from odysseus_kernels.comm.groups import group_transports

VOCABULARY = 120
STEPS = 3
LENGTH, BATCH = 24, 4


def documents(number: int = 60, longest: int = 20, seed: int = 3) -> list[dict[str, list[int]]]:
    """Random tokens, in documents of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (number,), generator=generator).tolist()
    return [{"input_ids": torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


def stock_model() -> Any:
    """The same on every rank."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=144,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


# ---- one process ---------------------------------------------------------------------------------------------------


def _padded(several: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(one["input_ids"]) for one in several)
    ids = [torch.tensor(one["input_ids"]) for one in several]
    return {
        "input_ids": torch.stack([F.pad(one, (0, longest - one.numel())) for one in ids]),
        "attention_mask": torch.stack([F.pad(torch.ones_like(one), (0, longest - one.numel())) for one in ids]),
        "labels": torch.stack([F.pad(one, (0, longest - one.numel()), value=-100) for one in ids]),
    }


def plain_padded() -> list[float]:
    """Losses of a stock model that is given the documents in their order, padded, by torch's DataLoader."""
    model = stock_model()
    optimizer, losses = _optimizer(model), []
    plain = DataLoader(documents(), batch_size=BATCH, collate_fn=_padded)  # type: ignore[arg-type]
    for batch in itertools.islice(plain, STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _pieces(batch: dict[str, Tensor]) -> list[dict[str, list[int]]]:
    """The documents of packed rows, without padding."""
    found = []
    for tokens, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
        starts = [place for place, position in enumerate(positions) if position == 0]
        found += [{"input_ids": tokens[a:b]} for a, b in itertools.pairwise([*starts, len(tokens)])]
    return [one for one in found if one["input_ids"][0] != 0]


def plain_packed(number: int = BATCH) -> list[float]:
    """Losses of a stock model that is given each document of each batch of ``number`` rows by itself."""
    model = stock_model()
    optimizer, losses = _optimizer(model), []
    loader = ody.SequenceDataLoader(documents(), None, length=LENGTH, batch_size=number)
    for batch in itertools.islice(loader, STEPS):
        alone = _pieces(batch)
        tokens = sum(len(one["input_ids"]) - 1 for one in alone)
        total = 0.0
        for part in DataLoader(alone, batch_size=1, collate_fn=_padded):  # type: ignore[arg-type]
            if part["input_ids"].shape[1] > 1:
                loss = model(**part, num_items_in_batch=tokens).loss
                loss.backward()
                total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


# ---- ranks ---------------------------------------------------------------------------------------------------------


def _mesh(sizes: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "ring", "seq")[3 - len(sizes) :])


def train(rank: int, world_size: int, sizes: tuple[int, ...], strategy: str, arguments: dict[str, Any]) -> list[float]:
    """Losses of a parallelized model on its parts."""
    # These ranks are daemons, which may not start processes, so that none outlives the tests; a loader's workers end
    # with the process that started them.  Ranks as torchrun starts them are none.
    vars(multiprocessing.current_process())["_config"]["daemon"] = False
    config = ody.OverlapConfig(timeout_s=60)
    model = ody.parallelize(stock_model(), _mesh(sizes), strategy, config)
    optimizer, losses = _optimizer(model), []
    loader = ody.SequenceDataLoader(documents(), model, length=LENGTH, batch_size=BATCH, **arguments)
    for part in itertools.islice(loader, STEPS):
        loss = model(**part).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_beside_data_parallelism(rank: int, world_size: int) -> list[float]:
    """The same on two replicas of two ranks each, with whole batches that are accumulated one after another."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "seq"))
    model = ody.parallelize(stock_model(), mesh, "ulysses", ody.OverlapConfig(timeout_s=60))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer, losses = _optimizer(model), []
    loader = ody.SequenceDataLoader(documents(), mesh, length=LENGTH, batch_size=1, shard=False)
    batches = iter(loader)
    for _ in range(STEPS):
        several = [next(batches) for _ in range(2)]
        items = ody.num_items_in_batch(several, mesh)
        total = torch.zeros(())
        for number, batch in enumerate(several):
            model.set_requires_gradient_sync(number == 1)
            loss = model(**ody.shard_sequence(batch, mesh, "ulysses"), num_items_in_batch=items).loss
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


def another_dataset_on_the_last_rank(rank: int, world_size: int) -> list[str]:
    """[type, text] of the error of the first step, and the loss of a step with the right documents after it."""
    model = ody.parallelize(stock_model(), _mesh((world_size,)), "odysseus", ody.OverlapConfig(timeout_s=60))
    right, wrong = documents(), documents()
    wrong[0]["input_ids"][0] += 1
    found = []
    for dataset in (wrong if rank == world_size - 1 else right, right):
        loader = ody.SequenceDataLoader(dataset, model, length=LENGTH, batch_size=BATCH, shuffle=False)
        with ody.CommRecorder() as record:
            part = next(iter(loader))
        assert record.bytes() == 0, "ranks decide alike without asking"
        try:
            model(**part).loss.backward()
            found += ["no error"]
        except (RuntimeError, ValueError) as error:
            found += [type(error).__name__, str(error)]
    return found


def reserved_bytes(rank: int, world_size: int, round_to: int, epochs: int) -> list[list[tuple[int, int]]]:
    """For each epoch, after each step: bytes of shared memory that the ranks have reserved, and open descriptors."""
    group = torch.distributed.new_group()  # of its own: memory that other tests have reserved stays
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("seq",))
    config = ody.OverlapConfig(timeout_s=60, transport="symmetric")
    model = ody.parallelize(stock_model(), mesh, "odysseus", config)
    loader = ody.SequenceDataLoader(
        documents(48, longest=60), model, length=64, batch_size=4, packing="none", round_to=round_to, drop_last=True
    )
    found = []
    for _ in range(epochs):
        steps = []
        for part in loader:
            model(**part).loss.backward()
            transport = group_transports(group).choose(config, torch.device("cpu"))
            steps.append((transport.reserved_bytes, len(os.listdir("/proc/self/fd"))))
        found.append(steps)
    return found


def counted_by_routers(rank: int, world_size: int) -> tuple[float, float]:
    """The balancing loss of a mixture on packed rows with padding: parallelized, and stock without the padding."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    def mixture() -> Any:
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=12,
            num_key_value_heads=4,
            num_local_experts=4,
            output_router_logits=True,
            sliding_window=None,
            initializer_range=0.1,
        )
        return MixtralForCausalLM(config)

    model = ody.parallelize(mixture(), _mesh((world_size,)), "odysseus", ody.OverlapConfig(timeout_s=60))
    common = {"length": LENGTH, "batch_size": 3, "shuffle": False, "shard": False}
    (whole,) = ody.SequenceDataLoader(documents(3), model, **common)
    assert not bool(whole["counted_tokens"].all())
    parallel = model(**ody.shard_sequence(whole, model)).aux_loss
    stock = mixture()(whole["input_ids"], position_ids=whole["position_ids"], use_cache=False)
    alone = load_balancing_loss_func(stock.router_logits, 4, 2, whole["counted_tokens"])
    return parallel.item(), float(alone)
