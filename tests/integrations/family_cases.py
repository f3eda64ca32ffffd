"""Tiny models of every family, stock in this process or parallelized on ranks, on the same batch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from typing import Any

import torch
import transformers
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.integrations.huggingface import parallelize
from odysseus_kernels.nn.master import MasterWeights
from odysseus_kernels.nn.sequence import shard_sequence
from odysseus_kernels.planner.ring import RingPeers, parts_in_sight, ring_peers

VOCABULARY = 120
_DENSE = {"intermediate_size": 144}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.05}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_DENSE}),
    "mistral": ("Mistral", {**_DENSE, "sliding_window": 7}),
    "qwen2": ("Qwen2", {**_DENSE}),
    "qwen2_sliding": ("Qwen2", {**_DENSE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**_DENSE, "head_dim": 8}),
    "starcoder2": ("Starcoder2", {**_DENSE, "use_bias": True, "sliding_window": 9}),
    "mixtral": ("Mixtral", {**_EXPERTS, "intermediate_size": 48, "num_local_experts": 12, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **_DENSE,
            **_EXPERTS,
            "head_dim": 8,
            "moe_intermediate_size": 48,
            "num_experts": 12,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a batch; 12 heads and sizes that 1, 2, 3 and 4 ranks divide."""

    family: str = "llama"
    kv_heads: int = 12
    vocabulary: int = VOCABULARY
    tied: bool = False
    batch: int = 2
    length: int = 24
    padding_mask: bool = False
    packed: bool = False
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float32
    autocast_to: torch.dtype | None = None
    changes: tuple[tuple[str, Any], ...] = ()
    changed_token: int | None = None

    def model(self, seed: int = 0) -> Any:
        """A stock model with random weights, biases and norms included."""
        name, settings = _FAMILIES[self.family]
        config = getattr(transformers, f"{name}Config")(
            vocab_size=self.vocabulary,
            hidden_size=96,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied,
            max_position_embeddings=64,
            # With the default of 0.02 a model this narrow attends so evenly that key gradients are all cancellation.
            initializer_range=0.1,
            attn_implementation=self.attention,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            **{"num_attention_heads": 12, "num_hidden_layers": 2, **settings, **dict(self.changes)},
        )
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms start at one and biases at zero, where mistakes in their use would not show.
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model.to(self.dtype).train()

    def autocast(self) -> torch.autocast:
        """What forwards run in."""
        return torch.autocast("cpu", self.autocast_to or torch.bfloat16, enabled=self.autocast_to is not None)

    def whole_batch(self) -> dict[str, torch.Tensor]:
        """The batch that every rank has."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.length)
        ids = torch.randint(self.vocabulary, shape, generator=generator)
        if self.changed_token is not None:
            ids[:, self.changed_token] = (ids[:, self.changed_token] + 1) % self.vocabulary
        labels = ids.clone()
        # Unequal numbers of valid labels on the ranks: a mean of the ranks' means would be wrong.
        labels[:, : self.length // 3] = -100
        batch = {"input_ids": ids, "labels": labels}
        if self.padding_mask:
            mask = torch.ones(shape, dtype=torch.int64)
            mask[0, -5:] = 0
            mask[-1, -2:] = 0
            batch["attention_mask"] = mask
            labels[mask == 0] = -100
        if self.packed:
            batch["position_ids"] = packed_positions(self.length).expand(shape).clone()
        return batch


def packed_positions(length: int) -> torch.Tensor:
    """Positions of two documents in one sequence."""
    cut = length // 2 - 1
    return torch.cat((torch.arange(cut), torch.arange(length - cut)))


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a forward for logits takes."""
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "shift_labels")}


@functools.lru_cache(maxsize=32)
def stock_step(case: Case) -> dict[str, Any]:
    """Loss, logits and gradients of the stock model in one process."""
    model, batch = case.model(), case.whole_batch()
    with case.autocast():
        out = model(**batch, use_cache=False)  # with a cache, stock models do not see packed documents
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.item(), "logits": out.logits.detach(), "gradients": gradients}


@functools.cache
def make_mesh(world_size: int, ring: int) -> DeviceMesh:
    """All ranks: ``ring`` ring ranks outside of the ranks of seq.  Made once: groups and their memory cost a second."""
    if ring == 1:
        return init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))
    return init_device_mesh("cpu", (ring, world_size // ring), mesh_dim_names=("ring", "seq"))


def parallel_model(case: Case, strategy: str, mesh: DeviceMesh, **settings: Any) -> Any:
    """The same model, parallelized."""
    return parallelize(case.model(), mesh, strategy, OverlapConfig(**{"timeout_s": 60, **settings}))


def whole(tensor: Any) -> torch.Tensor:
    """A DTensor's or a tensor's full value."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parallel_step(
    rank: int, world_size: int, case: Case, strategy: str, ring: int = 1, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The same of the parallelized model: logits and natural positions of this rank's tokens, gradients on rank 0."""
    mesh = make_mesh(world_size, ring)
    model = parallel_model(case, strategy, mesh, **(settings or {}))
    batch = shard_sequence(case.whole_batch(), model)
    with CommRecorder() as record:
        with case.autocast():
            loss = model(**batch).loss
        loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor), name
            assert parameter.grad.placements == parameter.placements, name
            full = parameter.grad.full_tensor()
            if rank == 0:
                gradients[name] = full
    return {
        "loss": loss.item(),
        "logits": own_logits(model, batch, case),
        "where": own_positions(case, model),
        "gradients": gradients,
        "traffic": record.rows(),
    }


@torch.no_grad()
def own_logits(model: Any, batch: dict[str, torch.Tensor], case: Case) -> torch.Tensor:
    """Logits of this rank's tokens."""
    with case.autocast():
        return model(**without_labels(batch)).logits


def own_positions(case: Case, model: Any) -> torch.Tensor:
    """Where this rank's tokens lie in the padded sequence."""
    counts = torch.arange(case.length)[None]
    return shard_sequence({"input_ids": counts, "position_ids": counts}, model)["position_ids"][0]


def logits_pair(
    rank: int,
    world_size: int,
    case: Case,
    other: Case,
    strategy: str,
    ring: int,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Logits of one model on two batches."""
    model = parallel_model(case, strategy, make_mesh(world_size, ring), **(settings or {}))
    found = [own_logits(model, shard_sequence(one.whole_batch(), model), one) for one in (case, other)]
    return {"where": own_positions(case, model), "first": found[0], "second": found[1]}


def assemble(results: list[dict[str, Any]], name: str, length: int) -> torch.Tensor:
    """[B, L, ...] from what ranks have of it."""
    first = results[0][name]
    out = first.new_full(
        (first.shape[0], int(max(r["where"].max() for r in results)) + 1, *first.shape[2:]), float("nan")
    )
    for result in results:
        out[:, result["where"]] = result[name]
    return out[:, :length]


def train_steps(rank: int, world_size: int, case: Case, strategy: str, ring: int, steps: int) -> dict[str, Any]:
    """Losses and final parameters of a few optimizer steps; whole parameters as each rank sees them."""
    mesh = make_mesh(world_size, ring)
    model = parallel_model(case, strategy, mesh)
    losses = optimize(model, [shard_sequence(case.whole_batch(), mesh, strategy)] * steps)
    return {"losses": losses, "parameters": {name: whole(p).detach().clone() for name, p in model.named_parameters()}}


def optimize(model: Any, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """AdamW with clipping."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@functools.cache
def data_mesh(sizes: tuple[int, int, int]) -> DeviceMesh:
    """All three dimensions."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "ring", "seq"))


def fully_sharded(model: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
    """FSDP2: whole weights exist for one layer at a time."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def replicated(model: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
    """What DistributedDataParallel is for plain tensors: weights stay, gradients are averaged."""
    return replicate(model, mesh=mesh["dp"])


DATA_PARALLEL = {"fully_shard": fully_sharded, "replicate": replicated}


def data_parallel_step(
    rank: int, world_size: int, case: Case, strategy: str, sizes: tuple[int, int, int], wrapper: str
) -> Any:
    """Gradients, whole on rank 0, of a step with a wrapper over ``"dp"``, whose ranks have batches of their own."""
    mesh = data_mesh(sizes)
    model = DATA_PARALLEL[wrapper](parallel_model(case, strategy, mesh), mesh)
    rows = {name: t.chunk(sizes[0])[mesh.get_local_rank("dp")] for name, t in case.whole_batch().items()}
    loss = model(**shard_sequence(rows, mesh, strategy)).loss
    loss.backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {"loss": loss.item(), "gradients": gradients if rank == 0 else None}


# Parts of a model in another type than the rest: (rest, names of the parts, their type).
MIXTURES = {
    "head": (torch.bfloat16, "lm_head", torch.float32),
    "norms in fp32": (torch.bfloat16, "norm", torch.float32),
    "norms in bf16": (torch.float32, "norm", torch.bfloat16),
    "embedding": (torch.float32, "embed", torch.bfloat16),
    "layer": (torch.float32, "layers.1", torch.bfloat16),
}


def mixed_step(case: Case, model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float] | str:
    """Loss and norm of all gradients, or the error's text."""
    try:
        with case.autocast():
            loss = model(**batch, use_cache=False).loss
        loss.backward()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return loss.item(), math.sqrt(sum(whole(p.grad).double().square().sum().item() for p in model.parameters()))


def mixed_model(case: Case, mixture: str) -> Any:
    rest, names, other = MIXTURES[mixture]
    model = case.model().to(rest)
    for name, module in model.named_modules():
        if names in name:
            module.to(other)
    return model


def mixed_types(rank: int, world_size: int, cases: list[Case]) -> list[tuple[float, float] | str]:
    """Every mixture and case under two strategies."""
    mesh, found = make_mesh(world_size, 1), []
    for mixture, case, strategy in itertools.product(MIXTURES, cases, ("tp", "odysseus")):
        model = parallelize(mixed_model(case, mixture), mesh, strategy, OverlapConfig(timeout_s=60))
        found.append(mixed_step(case, model, shard_sequence(case.whole_batch(), mesh, strategy)))
    return found


def data_parallel_masters(
    rank: int, world_size: int, case: Case, strategy: str, sizes: tuple[int, int, int], wrapper: str
) -> Any:
    """bf16 with fp32 masters beside a wrapper: sums of two batches' gradients, and masters after a step, on rank 0."""
    mesh = data_mesh(sizes)
    model = DATA_PARALLEL[wrapper](parallel_model(case, strategy, mesh), mesh)
    optimizer = MasterWeights(torch.optim.SGD, model.parameters(), lr=1.0)
    rows = {name: t.chunk(sizes[0])[mesh.get_local_rank("dp")] for name, t in case.whole_batch().items()}
    for _ in range(2):
        model(**shard_sequence(rows, mesh, strategy)).loss.backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    optimizer.step()
    masters = {name: optimizer.state[p]["master"].full_tensor() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), masters[name].bfloat16()), name
    return (gradients, masters) if rank == 0 else None


def peers_of(case: Case, strategy: str, world_size: int, ring: int, rank: int) -> RingPeers:
    """To how many others of the attention's ring ``rank`` sends under the family's window."""
    window = dict(case.changes).get("sliding_window", _FAMILIES[case.family][1].get("sliding_window"))
    size, own = (world_size, rank) if strategy == "tsp" else (ring, rank // (world_size // ring))
    parts = parts_in_sight(size, case.length // size, "zigzag", causal=True, window=window)
    return ring_peers(parts, own)


def traffic_of_a_layer(
    rank: int, world_size: int, cases: list[tuple[Case, dict[str, Any]]], strategy: str, ring: int
) -> list[dict[tuple[str, str, str], int]]:
    """Bytes that one more decoder layer sends in a step, by phase, operator and collective, for each case."""
    mesh, found = make_mesh(world_size, ring), []
    for case, settings in cases:
        counts = []
        for layers in (1, 2):
            deep = dataclasses.replace(case, changes=(*case.changes, ("num_hidden_layers", layers)))
            model = parallel_model(deep, strategy, mesh, **settings)
            with CommRecorder() as record:
                model(**shard_sequence(case.whole_batch(), model)).loss.backward()
            counts.append(Counter({(r["phase"], r["operator"], r["collective"]): r["bytes"] for r in record.rows()}))
        counts[1].subtract(counts[0])
        found.append({key: count for key, count in counts[1].items() if count})
    return found
