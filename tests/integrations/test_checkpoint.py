"""State goes from any distribution to any other to the bit, or is refused whole."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cases import Case
from state_cases import (
    build,
    different,
    give_gradients,
    load,
    load_masters,
    optimizer_of,
    save,
    save_masters,
    save_trained,
    snapshot,
)

import odysseus_kernels as ody

GQA = Case(kv_heads=4, bias=True)


def test_from_four_ranks_to_two_to_one(ranks, tmp_path: Path):
    first, second = str(tmp_path / "four"), str(tmp_path / "two")
    saved = ranks(4).run(save, first, "odysseus", GQA, 2)[0]
    assert saved["model.norm.weight/step"] == 2
    on_two = ranks(2).run(load, first, "odysseus", GQA, second)[0]
    assert different(saved, on_two) == []
    # DCP writes 4 ranks' parts; what 2 ranks wrote again is the same for a stock model without any process group.
    assert different(saved, load(0, 1, second, "stock", GQA)) == []


@pytest.mark.parametrize(
    ("on_four", "on_two"),
    [
        ("odysseus", "ulysses"),
        ("ring+tp_sp", "ring+odysseus"),
        ("ring+tsp", "tp_sp"),
        # Every way to cut a weight is saved and loaded above: "tp" cuts as "tp_sp" does, "tsp" as "ulysses".
        pytest.param("ring+ulysses", "tp_sp", marks=pytest.mark.complete),
        pytest.param("tp", "odysseus", marks=pytest.mark.complete),
        pytest.param("odysseus", "tsp", marks=pytest.mark.complete),
    ],
)
def test_between_strategies(ranks, tmp_path: Path, on_four, on_two):
    """Trained on four ranks under one strategy, loaded and saved on two under another, loaded by one stock process."""
    first, second = str(tmp_path / "four"), str(tmp_path / "two")
    saved = ranks(4).run(save_trained, first, on_four, GQA)[0]
    assert saved["model.layers.1.mlp.down_proj.weight/step"] == 3
    assert different(saved, ranks(2).run(load, first, on_two, GQA, second)[0]) == []
    assert different(saved, load(0, 1, second, "stock", GQA)) == []


def test_to_a_mesh_with_a_ring_and_back(ranks, tmp_path: Path):
    case = Case(tied=True, frozen=("layers.0.mlp",))
    one, ring = str(tmp_path / "deep" / "one"), str(tmp_path / "ring")
    saved = save(0, 1, one, "stock", case, 1)
    assert different(saved, ranks(4).run(load, one, "2x2", case, ring)[0]) == []
    assert different(saved, ranks(3).run(load, ring, "odysseus", case)[0]) == []
    names = json.loads((tmp_path / "ring" / "checkpoint.json").read_text())["tensors"]
    assert "model.model.embed_tokens.weight" in names and "model.lm_head.weight" not in names, "tied: saved once"
    assert "optimizer.model.layers.0.mlp.up_proj.weight.exp_avg" not in names, "frozen: no state"


def test_before_the_first_step(ranks, tmp_path: Path):
    folder = str(tmp_path / "fresh")
    saved = ranks(2).run(save, folder, "odysseus", GQA, 0)[0]
    assert not any("/" in name for name in saved), "saving must not make state"
    assert different(saved, load(0, 1, folder, "stock", GQA)) == []


def test_master_weights_go_on_to_the_bit(ranks, tmp_path: Path):
    folder = str(tmp_path / "masters")
    third = ranks(2).run(save_masters, folder)[0]
    assert third["lm_head.weight/master"].dtype == torch.float32
    assert third["lm_head.weight"].dtype == torch.bfloat16
    assert different(third, load_masters(0, 1, folder, "stock")) == []
    assert different(third, ranks(2).run(load_masters, folder, "odysseus")[0]) == []


def _refused(match: str, folder: Path, model: Any, optimizer: Any = None) -> str:
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=match) as caught:
        ody.load_checkpoint(folder, model, optimizer)
    assert different(before, snapshot(model, optimizer)) == [], "nothing is loaded"
    return str(caught.value)


def refuse_on_ranks(rank: int, world_size: int, folder: str) -> str:
    model = build("odysseus", world_size, Case(kv_heads=4), seed=3)  # without the biases
    return _refused("unknown to the model", Path(folder), model, optimizer_of(model))


def test_what_does_not_fit_is_listed_and_not_loaded(ranks, tmp_path: Path):
    folder = tmp_path / "saved"
    save(0, 1, str(folder), "stock", GQA, 1)
    for message in ranks(2).run(refuse_on_ranks, str(folder)):
        assert "model.model.layers.1.self_attn.o_proj.bias" in message
        assert "group 1 of the optimizer: model.layers.0.mlp.down_proj.bias" in message
    wide = Case(kv_heads=4, bias=True, vocabulary=60).model()
    message = _refused("nothing was loaded", folder, wide)
    assert "model.lm_head.weight: expected [60, 96] torch.float32, got [120, 96] torch.float32" in message
    _refused(r"norm.weight: expected \[96\] torch.bfloat16, got \[96\] torch.float32", folder, GQA.model().bfloat16())
    deeper = GQA.model()
    deeper.model.layers.append(GQA.model().model.layers[0])
    assert "model.model.layers.2.mlp.up_proj.bias" in _refused("missing in the checkpoint", folder, deeper)
    model = GQA.model()
    _refused("expected SGD, got AdamW", folder, model, torch.optim.SGD(model.parameters(), lr=1.0))
    _refused("expected 1 groups of parameters, got 2", folder, model, torch.optim.AdamW(model.parameters()))
    master = ody.MasterWeights(torch.optim.AdamW, model.parameters())
    _refused("expected MasterWeights of AdamW, got AdamW", folder, model, master)
    other = Case().model()
    _refused("expected parameters of the model, got", folder, model, torch.optim.AdamW(other.parameters()))
    ody.save_checkpoint(tmp_path / "weights", model)
    _refused("expected a checkpoint with an optimizer", tmp_path / "weights", model, optimizer_of(model))
    assert ody.load_checkpoint(tmp_path / "weights", model) == {}


def test_an_interrupted_checkpoint_does_not_look_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, model = tmp_path / "saved", GQA.model()
    ody.save_checkpoint(folder, model, extra={"step": 1})

    def interrupted(*args: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("odysseus_kernels.integrations.checkpoint_files._described", interrupted)
        with pytest.raises(RuntimeError, match=r"could not save .*rank 0: OSError\('disk full'\)"):
            ody.save_checkpoint(folder, model, extra={"step": 2})
        with pytest.raises(RuntimeError, match="disk full"):
            ody.save_checkpoint(tmp_path / "new", model)
    assert ody.load_checkpoint(folder, model)["step"] == 1, "the one before is kept"
    _refused("new.unfinished was interrupted", tmp_path / "new", model)
    _refused("expected a checkpoint of save_checkpoint", tmp_path / "never", model)
    ody.save_checkpoint(folder, model, extra={"step": 3})
    assert ody.load_checkpoint(folder, model)["step"] == 3
    assert [path.name for path in tmp_path.iterdir() if "saved" in path.name] == ["saved"]


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def save_onto(rank: int, world_size: int, folder: str) -> str:
    with pytest.raises(ValueError, match="nothing was touched") as caught:
        ody.save_checkpoint(folder, build("odysseus", world_size, GQA))
    return str(caught.value)


def test_only_a_checkpoint_is_replaced(ranks, tmp_path: Path):
    model = GQA.model()
    logs, file, mixed, beside = tmp_path / "logs", tmp_path / "file", tmp_path / "mixed", tmp_path / "beside"
    (logs / "run").mkdir(parents=True)
    (logs / "run" / "events").write_text("losses")
    (tmp_path / "empty").mkdir()
    file.write_text("text")
    ody.save_checkpoint(mixed, model)
    (mixed / "tokenizer.json").write_text("{}")
    (tmp_path / "beside.unfinished").mkdir()
    (tmp_path / "beside.unfinished" / "notes").write_text("mine")
    ody.save_checkpoint(tmp_path / "real", model)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ody.save_pretrained(model, tmp_path / "export")
    before = _tree(tmp_path)
    for name, got in (
        ("logs", "a folder with run"), ("file", "a file"), ("mixed", "with tokenizer.json"), ("empty", "without one"),
        ("beside", "with notes"), ("link", "a link"), ("export", "with config.json"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{got}.*nothing was touched"):
            ody.save_checkpoint(tmp_path / name, model)
    for message in ranks(2).run(save_onto, str(logs)):
        assert "expected no such path, or a checkpoint of save_checkpoint" in message
    assert _tree(tmp_path) == before
    assert not beside.exists()
    ody.save_checkpoint(tmp_path / "real", model, extra={"step": 2})
    assert ody.load_checkpoint(tmp_path / "link", model) == {"step": 2}


def in_inference_mode(rank: int, world_size: int, folder: str) -> None:
    model, other = build("odysseus", world_size, GQA), build("odysseus", world_size, GQA, seed=3)
    optimizer, second = optimizer_of(model), optimizer_of(other)
    give_gradients(model, 0)
    optimizer.step()
    with torch.inference_mode():
        ody.save_checkpoint(folder, model, optimizer)
        ody.load_checkpoint(folder, other, second)
        assert different(snapshot(model, optimizer), snapshot(other, second)) == []
        ody.save_pretrained(model, f"{folder}-export")
        other = build("odysseus", world_size, GQA, seed=3)
        ody.load_pretrained(other, f"{folder}-export")
        assert different(snapshot(model), snapshot(other)) == []
    give_gradients(model, 1)
    optimizer.step()  # it can still be trained


def test_in_inference_mode(ranks, tmp_path: Path):
    ranks(2).run(in_inference_mode, str(tmp_path / "saved"))


class _Evil:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self._path,))


def test_nothing_is_unpickled(tmp_path: Path):
    model = GQA.model()
    ody.save_checkpoint(tmp_path / "saved", model)
    evil = pickle.dumps(_Evil(tmp_path / "unpickled"))
    (tmp_path / "saved" / ".metadata").write_bytes(evil)
    ody.load_checkpoint(tmp_path / "saved", model)
    for path in (tmp_path / "saved").glob("*.distcp"):
        path.write_bytes(evil + bytes(path.stat().st_size - len(evil)))
    with pytest.raises(RuntimeError, match="could not load"):
        ody.load_checkpoint(tmp_path / "saved", model)
    assert not (tmp_path / "unpickled").exists()
    description = tmp_path / "saved" / "checkpoint.json"
    description.write_text(description.read_text().replace("__0_0.distcp", "../other"))
    with pytest.raises(ValueError, match="names of files within the folder"):
        ody.load_checkpoint(tmp_path / "saved", model)


def test_pytorch_reads_the_folder_too(tmp_path: Path):
    import torch.distributed.checkpoint as dcp

    model = GQA.model()
    ody.save_checkpoint(tmp_path / "saved", model)
    state = {"model.lm_head.weight": torch.zeros_like(model.lm_head.weight)}
    dcp.load(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    assert torch.equal(state["model.lm_head.weight"], model.lm_head.weight)


def test_where_tensors_lie_is_known_from_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torch 2.10 notes it in a copy of the metadata that it was given."""
    import torch.distributed.checkpoint as dcp

    finish = dcp.FileSystemWriter.finish

    def on_a_copy(self: Any, metadata: Any, results: Any) -> None:
        finish(self, dataclasses.replace(metadata), results)

    monkeypatch.setattr(dcp.FileSystemWriter, "finish", on_a_copy)
    model, other = GQA.model(), GQA.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    ody.save_checkpoint(tmp_path / "saved", model)
    ody.load_checkpoint(tmp_path / "saved", other)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_what_cannot_be_saved(tmp_path: Path):
    model = GQA.model()
    with pytest.raises(ValueError, match="that JSON can hold"):
        ody.save_checkpoint(tmp_path / "saved", model, extra={"when": object()})
    with pytest.raises(ValueError, match="after parallelize"):
        ody.save_checkpoint(tmp_path / "saved", model, optimizer_of(Case().model()))
    assert not list(tmp_path.iterdir())
    compiled = GQA.model()
    compiled.model.layers[0] = torch.compile(compiled.model.layers[0])
    ody.save_checkpoint(tmp_path / "saved", compiled)
    ody.load_checkpoint(tmp_path / "saved", model)
