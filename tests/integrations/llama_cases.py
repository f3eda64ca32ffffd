"""A tiny Llama, stock in this process or parallelized on ranks, on the same batch: what the tests here compare."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.integrations.huggingface import parallelize
from odysseus_kernels.nn.sequence import shard_sequence

VOCABULARY = 120


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch and how to run them; 12 heads and sizes that 1, 2, 3 and 4 ranks divide."""

    kv_heads: int = 12
    layers: int = 2
    vocabulary: int = VOCABULARY
    tied: bool = False
    bias: bool = False
    batch: int = 2
    length: int = 24
    padding_mask: bool = False
    packed: bool = False
    inputs_embeds: bool = False
    attention: str = "sdpa"
    checkpointing: bool = False
    reentrant: bool = False
    rope: dict[str, Any] | None = None
    head_dim: int | None = None
    frozen: tuple[str, ...] = ()
    gathered: str = "regather"
    dtype: torch.dtype = torch.float32

    def model(self, seed: int = 0) -> LlamaForCausalLM:
        """A stock model with random weights, biases and norms included."""
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=96,
            intermediate_size=144,
            num_hidden_layers=self.layers,
            num_attention_heads=12,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
            attention_bias=self.bias,
            mlp_bias=self.bias,
            max_position_embeddings=64,
            # With the default of 0.02 a model this narrow attends so evenly that key gradients are all cancellation.
            initializer_range=0.1,
            attn_implementation=self.attention,
            **({"rope_parameters": self.rope} if self.rope else {}),
        )
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norms start at one and biases at zero, where mistakes in their use would not show.
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                parameter.requires_grad_(not any(part in name for part in self.frozen))
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": self.reentrant})
        return model.to(self.dtype).train()

    def whole_batch(self) -> dict[str, torch.Tensor]:
        """The batch that every rank has."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.length)
        ids = torch.randint(self.vocabulary, shape, generator=generator)
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
            cut = self.length // 2 - 1
            positions = torch.cat((torch.arange(cut), torch.arange(self.length - cut)))
            batch["position_ids"] = positions.expand(shape).clone()
        return batch


def as_embeddings(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, Any]:
    """The batch with embeddings, looked up in plain ``rows``, instead of token ids."""
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    return {**rest, "inputs_embeds": rows[batch["input_ids"]]}


def stock_step(case: Case) -> dict[str, Any]:
    """Loss, logits and gradients of the stock model in one process."""
    model, batch = case.model(), case.whole_batch()
    rows = model.get_input_embeddings().weight.detach().clone()
    inputs = as_embeddings(model, batch, rows) if case.inputs_embeds else batch
    out = model(**inputs, use_cache=False)  # with a cache, stock models do not see packed documents
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.item(), "logits": out.logits.detach(), "gradients": gradients}


@functools.cache
def sequence_mesh(world_size: int) -> DeviceMesh:
    """The mesh of all ranks."""
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))


def parallel_step(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """The same of the parallelized model on one rank; logits of this rank's tokens, gradients whole on rank 0."""
    mesh, model = sequence_mesh(world_size), case.model()
    rows = model.get_input_embeddings().weight.detach().clone()
    parallelize(model, mesh, config=OverlapConfig(gathered=case.gathered, timeout_s=60))
    batch = shard_sequence(case.whole_batch(), mesh)
    inputs = as_embeddings(model, batch, rows) if case.inputs_embeds else batch
    out = model(**inputs)
    assert out.logits is None, "with labels, logits are never made whole"
    out.loss.backward()
    with torch.no_grad():
        logits = model(**{name: value for name, value in inputs.items() if "labels" not in name}).logits
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor), name
            assert parameter.grad.placements == parameter.placements, name
            whole = parameter.grad.full_tensor()
            if rank == 0:
                gradients[name] = whole
    return {"loss": out.loss.item(), "logits": logits, "gradients": gradients}


def printed_loss(rank: int, world_size: int, case: Case) -> tuple[str, str, float]:
    """The loss as f-strings print it, and its number."""
    mesh = sequence_mesh(world_size)
    model = parallelize(case.model(), mesh)
    loss = model(**shard_sequence(case.whole_batch(), mesh)).loss
    return f"{loss:.3f}", f"{loss}", loss.item()
