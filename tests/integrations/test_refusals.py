"""What cannot be parallelized is refused before anything is sent, in words that say what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llama_cases import Case, parallel_step, sequence_mesh
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from odysseus_kernels.errors import RankMismatchError
from odysseus_kernels.integrations.huggingface import parallelize
from odysseus_kernels.nn.sequence import shard_sequence


def _llama(**changes: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 96, "intermediate_size": 144, "num_attention_heads": 12, "num_key_value_heads": 12}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **{**sizes, **changes}))


def bad_models(rank: int, world_size: int) -> None:
    mesh = sequence_mesh(world_size)  # of 4 ranks

    def refused(match: str, model: nn.Module, mesh: Any = mesh, **kwargs: Any) -> None:
        with pytest.raises(ValueError, match=match):
            parallelize(model, mesh, **kwargs)

    refused(
        r"strategy: expected one of \['odysseus', 'tp', 'tp_sp', 'tsp', 'ulysses'\], got 'ulises'",
        _llama(),
        strategy="ulises",
    )
    refused(r"heads that 4 ranks divide, got 6: use 1, 2, 3 or 6 ranks", _llama(num_attention_heads=6))
    refused(r"key/value heads that 4 ranks .* got 3: use 1, 3, 6 or 12 ranks", _llama(num_key_value_heads=3))
    refused(r"intermediate size that 4 ranks divide .* got 146: the next one is 148", _llama(intermediate_size=146))
    refused("LlamaForCausalLM.*got GPT2LMHeadModel", GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=12, n_head=4)))
    refused("supported classes", nn.Linear(2, 2))
    refused('dimension named "seq"', _llama(), init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)))
    refused("outermost first, got", _llama(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("seq", "ring")))
    refused("outermost first, got", _llama(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "seq")))
    crossed = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "seq"))
    refused("sdpa.*flash_attention_2", _llama(attn_implementation="eager"), crossed)
    refused("intermediate size that 4 ranks divide", _llama(intermediate_size=146), crossed)
    refused("DeviceMesh, got str", _llama(), "seq")
    adapted = _llama()
    adapted.model.layers[0].self_attn.q_proj = nn.Sequential(adapted.model.layers[0].self_attn.q_proj)
    refused("stock Linear, got torch.nn.modules.container.Sequential", adapted)
    extended = _llama()
    extended.extra = nn.Parameter(torch.zeros(1))
    refused("got extra as well", extended)
    hooked = _llama()
    hooked.model.norm.forward = hooked.model.norm.forward
    refused("LlamaRMSNorm: expected the class's own forward", hooked)
    with torch.device("meta"):
        empty = _llama()
    refused("on the mesh's device type 'cpu', got meta", empty)


def misused_model(rank: int, world_size: int) -> None:
    mesh = sequence_mesh(world_size)
    model = parallelize(_llama(), mesh)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    batch = shard_sequence({"input_ids": ids, "labels": ids}, mesh)
    with pytest.raises(ValueError, match="parallelized already"):
        parallelize(model, mesh)
    with pytest.raises(RuntimeError, match=r"odysseus_kernels.save_pretrained\(model, folder\) on every rank"):
        model.generate(ids)
    with pytest.raises(RuntimeError, match="resize the stock model, then parallelize it"):
        model.resize_token_embeddings(128)
    for wrap in (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel):
        for wrapped in (model, nn.Sequential(model)):
            with pytest.raises(TypeError, match=r"got a parallelized model.*Trainer.*fully_shard"):
                wrap(wrapped)
        assert sum(p.numel() for p in wrap(nn.Linear(2, 2)).parameters()) == 6, "others are none of our business"
    with pytest.raises(TypeError, match="config: expected an OverlapConfig or None, got dict"):
        parallelize(_llama(), mesh, config={"mode": "fused"})
    with pytest.raises(ValueError, match="save_pretrained: expected max_shard_bytes or nothing, got push_to_hub"):
        model.save_pretrained("/nonexistent", push_to_hub=True)
    with pytest.raises(ValueError, match="through shard_sequence"):
        model(input_ids=batch["input_ids"], labels=batch["labels"])
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**batch, logits_to_keep=1)
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(**batch, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask: expected this rank's part, of shape"):
        model(**batch, attention_mask=torch.ones(1, 8))
    with pytest.raises(ValueError, match="exactly one"):
        model(attention_mask=None)
    with pytest.raises(RuntimeError, match="call the parallelized model"):
        model.model.layers[0].self_attn(torch.zeros(1, 4, 96), position_embeddings=None)


def different_weights(rank: int, world_size: int, odd: int) -> str:
    model = Case().model(seed=0)
    if rank == odd:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    with pytest.raises(RankMismatchError) as caught:
        parallelize(model, sequence_mesh(world_size))
    assert not hasattr(model, "sequence_group"), "a refused model must stay as it was"
    return str(caught.value)


def different_models(rank: int, world_size: int) -> str:
    with pytest.raises(RankMismatchError) as caught:
        parallelize(Case(dtype=torch.float64 if rank == 0 else torch.float32).model(), sequence_mesh(world_size))
    return str(caught.value)


def recovers_from_a_failed_forward(rank: int, world_size: int) -> None:
    model = parallelize(_llama(), sequence_mesh(world_size))
    embedding, mesh = model.model.embed_tokens, sequence_mesh(world_size)
    with pytest.raises(IndexError):
        embedding(torch.tensor([[1000]]))
    assert "weight" not in embedding.__dict__
    ids = torch.zeros(1, 8, dtype=torch.int64)
    assert model(**shard_sequence({"input_ids": ids, "labels": ids}, mesh)).loss.isfinite()


def test_bad_models(ranks):
    ranks(4).run(bad_models)


def test_misused_model(ranks):
    ranks(2).run(misused_model)


def test_recovers_from_a_failed_forward(ranks):
    ranks(2).run(recovers_from_a_failed_forward)


@pytest.mark.parametrize(("world_size", "odd"), [(3, 0), (4, 2)])
def test_different_weights_name_the_rank(ranks, world_size, odd):
    for message in ranks(world_size).run(different_weights, odd):
        assert f"rank {odd} differs" in message
        assert "'model.layers.1.mlp.up_proj.weight' first" in message
        assert "1 of" in message


def test_different_models_name_the_rank(ranks):
    for message in ranks(3).run(different_models):
        assert "on rank 0 the names, shapes or dtypes" in message


def test_cases_run_on_one_rank_too(ranks):
    assert ranks(1).run(parallel_step, Case(kv_heads=1))[0]["loss"] > 0
