"""What a rank runs in the tests of the examples in docstrings, and the names that it gives to them."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import odysseus_kernels as ody

VOCABULARY = 120


def examples_of(name: str, text: str | None = None) -> doctest.DocTest:
    """The examples of a public name's own docstring, or of ``text``; names are for :func:`run` to give."""
    docstring = getattr(ody, name).__doc__ if text is None else text
    return doctest.DocTestParser().get_doctest(docstring or "", {}, name, None, 0)


def without_example(rank: int, world: int) -> list[str]:
    """Public names whose docstring does not end with an example that uses the package."""
    missing = []
    for name in ody.__all__:
        heading, _, example = (getattr(ody, name).__doc__ or "").rpartition("Example:\n")
        if not heading or ">>> " not in example or not any("ody." in e.source for e in examples_of(name).examples):
            missing.append(name)
    return missing


def run(rank: int, world: int, name: str, folder: str, text: str | None = None) -> int:
    """Runs the examples of one name and returns how many there were."""
    test = examples_of(name, text)
    return check(test, _names(rank, world, Path(folder), with_model="model" in test.docstring))


def check(test: doctest.DocTest, names: dict[str, Any]) -> int:
    """Raises doctest's report of the first example that fails."""
    test.globs = names
    report: list[str] = []
    flags = doctest.FAIL_FAST | doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=flags).run(test, out=report.append)
    if result.failed:
        raise AssertionError("".join(report))
    return result.attempted


def _names(rank: int, world: int, folder: Path, *, with_model: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("seq",))
    names = {"torch": torch, "dist": dist, "ody": ody, "rank": rank, "group": dist.group.WORLD, "mesh": mesh}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (2, 16), generator=generator)
    names |= {"folder": folder, "batch": {"input_ids": ids, "labels": ids.clone()}}
    return names | {"model": _model()} if with_model else names


def _model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds, which most examples need not wait for

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=144, num_hidden_layers=2, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config)
