"""Layer inputs that are away between forward and backward: same bits, less memory, errors instead of waits."""

from __future__ import annotations

import copy
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import offload_cases as cases
import pytest
import torch
from offload_cases import BATCH, INPUT, LAYERS, LENGTH, WIDTH, assert_same_bits, make_batch, make_model, step
from transformers import LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import odysseus_kernels as ody
from odysseus_kernels.nn.offload_file import FileStore, is_memory
from odysseus_kernels.planner.memory import layer_inputs
from odysseus_kernels.testing.spawn import RankPools


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of products this small cost more than they give, and sums in other orders are not the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    return step(make_model(), make_batch())


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 3, LAYERS])
def test_bits_and_bytes(model: Any, expected: list[torch.Tensor], tmp_path: Path, keep: int, reentrant: bool) -> None:
    offload = ody.offload_activations(model, folder=tmp_path, min_bytes=0, keep=keep)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})  # as a Trainer does
    for _ in range(3):
        assert_same_bits(step(model, make_batch()), expected)
    away = (LAYERS - keep) * INPUT
    assert offload.bytes_out == 3 * away
    # With keep=0 the last input is asked for before it has left.
    assert offload.bytes_in == 3 * (away - INPUT if keep == 0 else away)
    assert f"{offload.bytes_out} bytes out" in repr(offload)
    assert cases.files_in(tmp_path) == [], "the file has no name"
    if keep < LAYERS:
        assert offload._file is not None
        assert os.fstat(offload._file._file.fileno()).st_size == away, "each step uses the same room"


@pytest.mark.parametrize("keep", [1, 3])
def test_peak_falls_as_the_formula_says(model: Any, tmp_path: Path, keep: int) -> None:
    sizes: dict[str, Any] = {"layers": LAYERS, "tokens": BATCH * LENGTH}
    before = cases.peak_of_step(model, make_batch())
    ody.offload_activations(model, folder=tmp_path, min_bytes=0, keep=keep)
    after = cases.peak_of_step(model, make_batch())
    saved = layer_inputs(WIDTH, "odysseus", 1, **sizes) - layer_inputs(WIDTH, "odysseus", 1, keep=keep, **sizes)
    assert saved == (LAYERS - max(keep, 2)) * INPUT
    assert before - after == saved


def test_other_ways_through_backward(model: Any, expected: list[torch.Tensor], tmp_path: Path) -> None:
    offload = ody.offload_activations(model, folder=tmp_path, min_bytes=0)
    batch = make_batch()
    # A forward without backward gives its room back; without gradients nothing is put away.
    model(**batch)
    with torch.no_grad():
        model(**batch)
    model.eval()
    model(**batch)
    model.train()
    assert offload.bytes_out == (LAYERS - 1) * INPUT
    # Twice through one graph.
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert_same_bits([loss.detach(), *(p.grad for p in model.parameters())], expected)
    # Two forwards, then two backwards, the first one first.
    model.zero_grad()
    losses = [model(**batch).loss for _ in range(2)]
    losses[0].backward()
    assert_same_bits([losses[0].detach(), *(p.grad for p in model.parameters())], expected)
    model.zero_grad()
    losses[1].backward()
    assert_same_bits([losses[1].detach(), *(p.grad for p in model.parameters())], expected)
    # A batch of another length, and a copy of the model.
    longer = make_batch(LENGTH // 2)
    assert_same_bits(step(model, longer), step(make_model(), longer))
    assert_same_bits(step(copy.deepcopy(model), batch), expected)


def test_small_tensors_stay_and_other_types_come_back(model: Any, tmp_path: Path) -> None:
    offload = ody.offload_activations(model, folder=tmp_path, min_bytes=INPUT + 1)
    step(model, make_batch())
    assert offload.bytes_out == 0
    empty = torch.empty(0)
    assert ody.offload_activations(make_model(), folder=tmp_path, min_bytes=0).put_away(0, empty) is empty
    store = FileStore(tmp_path, 30)
    for tensor in (
        torch.randn(5, 7).bfloat16(),
        torch.arange(12).view(3, 4).t(),
        torch.tensor([True, False]),
        torch.tensor(3.5),
        torch.full((4,), torch.nan),
    ):
        slot = store.put(tensor)
        store.settle()
        back = slot.take()
        assert back.dtype == tensor.dtype and back.shape == tensor.shape
        torch.testing.assert_close(back, tensor, rtol=0, atol=0, equal_nan=True)


def test_a_model_that_was_not_checkpointed_is(tmp_path: Path, expected: list[torch.Tensor]) -> None:
    model = make_model()
    model.activation_checkpointing_disable()
    offload = ody.offload_activations(model, folder=tmp_path, min_bytes=0)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert_same_bits(step(model, make_batch()), expected)
    assert offload.bytes_out > 0
    # Layers that are not checkpointed keep everything.
    model.activation_checkpointing_disable()
    before = offload.bytes_out
    assert_same_bits(step(model, make_batch()), expected)
    assert offload.bytes_out == before


def test_a_full_disk(model: Any, expected: list[torch.Tensor], tmp_path: Path) -> None:
    ody.offload_activations(model, folder=tmp_path, min_bytes=0)
    message = rf"could not reserve {INPUT} bytes in {tmp_path}: .*; {INPUT} bytes are put away there and \d+ are free"
    with cases.small_files(INPUT), pytest.raises(OSError, match=message) as caught:
        step(model, make_batch())
    assert caught.value.errno == errno.EFBIG
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None, "no hook stays set"
    del caught
    assert_same_bits(step(model, make_batch()), expected)


def test_a_disk_that_fails_or_does_not_answer(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offload = ody.offload_activations(model, folder=tmp_path, min_bytes=0, timeout_s=0.2)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "failed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(OSError, match=rf"could not read {INPUT} bytes in {tmp_path}: Input/output error"):
            step(model, make_batch())
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: 0)
        with pytest.raises(OSError, match="could not read"):
            step(model, make_batch())
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(OSError, match=rf"could not write {INPUT} bytes"):
            step(model, make_batch())
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda _, memory, __: time.sleep(1) or len(memory))
        with pytest.raises(TimeoutError, match=rf"expected to write {INPUT} bytes in {tmp_path} within 0.2 s"):
            step(model, make_batch())
    offload.remove()


def test_an_input_that_is_modified_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, write = FileStore(tmp_path, 30), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *arguments: time.sleep(0.3) or write(*arguments))
    tensor = torch.ones(8)
    slot = store.put(tensor)
    tensor.add_(1)
    with pytest.raises(RuntimeError, match=r"a layer's input \[8\] was modified in place while it was being written"):
        slot.take()
    store.settle()
    with pytest.raises(RuntimeError, match="modified in place"):
        slot.take()


def test_bad_arguments(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder: expected a folder that exists, got '/nowhere'"):
        ody.offload_activations(model, folder="/nowhere")
    for name in ("min_bytes", "keep"):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number, 0 or more, got -1"):
            ody.offload_activations(model, folder=tmp_path, **{name: -1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout_s: expected seconds above 0"):
        ody.offload_activations(model, folder=tmp_path, timeout_s=0)
    with pytest.raises(ValueError, match="expected one whose layers can be checkpointed, got Linear"):
        ody.offload_activations(torch.nn.Linear(2, 2), folder=tmp_path)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patched:  # as in transformers 5.17
        patched.setattr(GradientCheckpointingLayer, "__call__", torch.nn.Module.__call__)
        with pytest.raises(ValueError, match="hooks run within the checkpoint"):
            ody.offload_activations(model, folder=tmp_path)
    offload = ody.offload_activations(model, folder=tmp_path)
    with pytest.raises(ValueError, match="not offloaded yet: call remove"):
        ody.offload_activations(model, folder=tmp_path)
    offload.remove()
    ody.offload_activations(model, folder=tmp_path)


def test_a_folder_in_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [("/", "ext4"), (str(tmp_path), "tmpfs"), (str(tmp_path / "disk"), "xfs")]
    (tmp_path / "disk" / "a").mkdir(parents=True)
    assert is_memory(tmp_path, mounts) and is_memory(tmp_path / "other", mounts)
    assert not is_memory(tmp_path / "disk" / "a", mounts) and not is_memory(Path("/"), mounts)
    assert not is_memory(tmp_path, []) and not is_memory(tmp_path, [*mounts, (str(tmp_path), "ext4")])
    monkeypatch.setattr("odysseus_kernels.nn.offload_file._mounts", lambda: mounts)
    with pytest.warns(ody.FallbackWarning, match=r"lies in memory \(tmpfs\)"):
        FileStore(tmp_path, 30)


def test_parallelized_models(ranks: RankPools, tmp_path: Path) -> None:
    ranks(2).run(cases.parallelized, str(tmp_path))
    assert cases.files_in(tmp_path) == []


def test_fsdp2(ranks: RankPools, tmp_path: Path) -> None:
    ranks(2).run(cases.sharded_by_fsdp, str(tmp_path))


def test_a_full_disk_on_one_rank_is_an_error_on_all(ranks: RankPools, tmp_path: Path) -> None:
    full, told = ranks(2).run(cases.full_disk_on_one_rank, str(tmp_path))
    assert full.startswith("OSError: ") and "could not reserve" in full
    assert told.startswith("PeerLostError: ") and "could not reserve" in told, told


@pytest.mark.gpu
def test_pinned_memory() -> None:
    model, batch = make_model().cuda(), {name: tensor.cuda() for name, tensor in make_batch().items()}
    expected = [tensor.clone() for tensor in step(model, batch)]
    offload = ody.offload_activations(model, min_bytes=0)
    for _ in range(3):
        assert_same_bits(step(model, batch), expected)
    assert offload.bytes_out == offload.bytes_in == 3 * (LAYERS - 1) * INPUT
