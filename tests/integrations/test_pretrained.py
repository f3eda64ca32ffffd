"""Parallelized models write stock directories and read them, slice by slice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cases import Case
from state_cases import build, different, snapshot
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig, MixtralForCausalLM

import odysseus_kernels as ody

GQA = Case(kv_heads=4, bias=True)


def write(rank: int, world_size: int, folder: str, distribution: str, case: Case, limit: int) -> None:
    model = build(distribution, world_size, case)
    model.generation_config = GenerationConfig(max_length=33, bos_token_id=1)
    attention = model.config._attn_implementation
    if distribution == "odysseus":
        model.save_pretrained(folder, max_shard_bytes=limit)
    else:
        ody.save_pretrained(model, folder, max_shard_bytes=limit)
    assert model.config._attn_implementation == attention


def read(rank: int, world_size: int, folder: str, distribution: str, case: Case) -> dict[str, Any]:
    model = build(distribution, world_size, case, seed=4)
    ody.load_pretrained(model, folder)
    found = snapshot(model)
    wrong = build(distribution, world_size, Case(vocabulary=60), seed=4)
    before = snapshot(wrong)
    with pytest.raises(ValueError, match=r"(?s)nothing was loaded.*lm_head.weight|embed_tokens.weight: expected \[60"):
        ody.load_pretrained(wrong, folder)
    assert different(before, snapshot(wrong)) == []
    return found if rank == 0 else {}


@pytest.mark.parametrize(
    ("world_size", "distribution", "case", "limit"),
    [(2, "odysseus", GQA, 100_000), (3, "odysseus", Case(tied=True, attention="eager"), 10**9), (4, "2x2", GQA, 1)],
)
def test_round_trip_through_a_stock_directory(ranks, tmp_path: Path, world_size, distribution, case, limit):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-00001-of-00099.safetensors").write_text("of an earlier, larger model")
    ranks(world_size).run(write, str(tmp_path), distribution, case, limit)
    true = dict(case.model().named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert different(true, dict(loaded.named_parameters())) == []
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == case.tied
    assert loaded.generation_config.max_length == 33
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert "attn_implementation" not in str(config)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (tmp_path / "tokenizer.json").exists()
    if limit == 10**9:
        assert files == ["model.safetensors"]
    else:
        assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in true.values())
        assert limit == 1 or all((tmp_path / name).stat().st_size < limit + 5_000 for name in files)
    found = ranks(world_size).run(read, str(tmp_path), distribution, case)[0]
    assert different({name: p.detach() for name, p in true.items()}, found) == []


def test_what_does_not_fit_is_listed(tmp_path: Path):
    GQA.model().save_pretrained(tmp_path)
    model = Case(kv_heads=4).model(seed=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"unknown to the model: model\.layers\.0\.mlp\.down_proj\.bias, "):
        ody.load_pretrained(model, tmp_path)
    assert different(before, snapshot(model)) == []
    Case(kv_heads=4).model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing in the files, expected by the model: model\.layers\.0\.mlp\.down"):
        ody.load_pretrained(GQA.model(), tmp_path)
    with pytest.raises(ValueError, match="found neither"):
        ody.load_pretrained(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got the file"):
        ody.save_pretrained(model, tmp_path / "config.json")


def test_merged_experts_are_written_and_read_as_stock_files_have_them(tmp_path: Path):
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=12, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    ody.save_pretrained(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "stock")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", local_files_only=True)
    assert different(snapshot(model), snapshot(loaded)) == []
    other = MixtralForCausalLM(config)
    ody.load_pretrained(other, tmp_path / "stock")
    assert different(snapshot(model), snapshot(other)) == []


def failing(rank: int, world_size: int, folder: str) -> None:
    model = build("odysseus", world_size, GQA)
    Path(folder, "model.part0.safetensors").mkdir(parents=True, exist_ok=True)  # where the first file would be
    with pytest.raises(Exception, match="directory" if rank == 0 else "first rank could not write"):
        model.save_pretrained(folder)


def test_failure_of_the_first_rank_is_everyones(ranks, tmp_path: Path):
    ranks(2).run(failing, str(tmp_path))
