"""The example's text."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

_PATH = Path(__file__).parents[2] / "examples" / "data.py"


@pytest.fixture(scope="module")
def data():
    spec = importlib.util.spec_from_file_location("example_data", _PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _write(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"# {name}\n".encode() * 20)


def test_text_is_sorted_split_and_without_installed_packages(data, tmp_path):
    names = [f"folder/m{index:03}.py" for index in range(60)]
    _write(tmp_path, [*reversed(names), "site-packages/other.py", "notes.txt"])
    text = data.load_text(folder=tmp_path)
    assert text.files == 60
    training, validation = (bytes(part.tolist()).decode() for part in (text.training, text.validation))
    seen = [line.removeprefix("# ") for line in training.replace("\0", "").splitlines()[::20]]
    held_out = [line.removeprefix("# ") for line in validation.replace("\0", "").splitlines()[::20]]
    assert sorted(seen + held_out) == names
    assert seen == sorted(seen)
    assert not set(seen) & set(held_out)
    # Which files are held out depends on nothing but their names.
    _write(tmp_path, ["another.py"])
    again = bytes(data.load_text(folder=tmp_path).validation.tolist()).decode()
    assert all(name in again for name in held_out)


def test_batches(data, tmp_path):
    _write(tmp_path, [f"m{index:03}.py" for index in range(60)])
    text = data.load_text(folder=tmp_path)
    batch = text.batch(0, 3, 4, 17)
    assert batch.shape == (4, 17)
    assert batch.dtype == torch.int64
    assert torch.equal(batch, text.batch(0, 3, 4, 17))
    assert not torch.equal(batch, text.batch(0, 4, 4, 17))
    windows = text.validation_batches(4, 17, 2)
    assert torch.equal(torch.cat(windows).flatten(), text.validation[: torch.cat(windows).numel()].long())


def test_too_little_text(data, tmp_path):
    _write(tmp_path, ["m.py"])
    with pytest.raises(ValueError, match="training and validation"):
        data.load_text(folder=tmp_path)


def test_limit(data):
    text = data.load_text(limit=400_000)
    assert text.training.numel() + text.validation.numel() == 400_000 + text.files  # a separator for each file
