"""What a rank runs in the tests of the blocks of code in README and docs, and the names that it gives to them."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import odysseus_kernels as ody

VOCABULARY = 120


def run(rank: int, world: int, place: str, text: str, folder: str) -> int:
    """Runs a block in ``folder``, its names of its own; returns how many statements it has."""
    tree = ast.parse(text, place)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with (
            _as_torchrun(rank, world),
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch.object(dist, "init_process_group"),  # ranks of a test have met already
        ):
            exec(compile(tree, place, "exec"), Given(rank, world, stock="parallelize" in text))
    finally:
        os.chdir(before)
    return len(tree.body)


class Given(dict[str, Any]):
    """Names that blocks may use without making them; each is made when it is first asked for."""

    def __init__(self, rank: int, world: int, *, stock: bool) -> None:
        super().__init__(__name__="__main__", torch=torch, dist=dist, ody=ody, rank=rank, group=dist.group.WORLD)
        self._world = world
        self._stock = stock

    def __missing__(self, name: str) -> Any:
        maker: Callable[[], Any] | None = getattr(self, f"_make_{name}", None)
        if maker is None and name not in _SHAPES:
            raise KeyError(name)  # a builtin, or a NameError
        self[name] = torch.ones(_SHAPES[name]) if maker is None else maker()
        return self[name]

    def _make_mesh(self) -> Any:
        return init_device_mesh("cpu", (self._world,), mesh_dim_names=("seq",))

    def _make_ids(self) -> torch.Tensor:
        return torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))

    def _make_batch(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self["ids"], "labels": self["ids"].clone()}

    def _make_config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=96, intermediate_size=144, num_hidden_layers=2, num_attention_heads=12,
            num_key_value_heads=4, max_position_embeddings=64,
        )  # fmt: skip

    def _make_model(self) -> torch.nn.Module:
        """A small Llama; parallelized, unless the block parallelizes it."""
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        model = LlamaForCausalLM(self["config"]).train()
        return model if self._stock else ody.parallelize(model, self["mesh"])

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self["model"].parameters())

    def _make_scheduler(self) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(self["optimizer"], lambda step: 1.0)

    def _make_rows(self) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": row, "labels": row} for row in self["ids"]]

    _make_train = _make_held_out = _make_rows

    def _make_loader(self) -> Any:
        return torch.utils.data.DataLoader(self["rows"], batch_size=2)

    def _make_documents(self) -> list[dict[str, list[int]]]:
        return [{"input_ids": list(range(1, length))} for length in (6, 13, 10, 21)]

    def _make_arguments(self) -> Any:
        from transformers import TrainingArguments

        return TrainingArguments("trainer", max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)

    def _make_collator(self) -> Any:
        from transformers import default_data_collator

        return default_data_collator

    def _make_f(self) -> Callable[..., torch.Tensor]:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# Operands of operators on two ranks: L = 8 tokens, K = 8 input features, n or k = 6 of a rank; heads of 2 or 16.
_SHAPES: dict[str, tuple[int, ...]] = {
    "x": (1, 4, 8),
    "weight": (6, 8),
    "bias": (6,),
    "wq": (4, 8),
    "wk": (2, 8),
    "wv": (2, 8),
    "gate": (6, 8),
    "up": (6, 8),
    "h": (1, 8, 6),
    "down": (8, 6),
    "weight_shard": (3, 8),
    "bias_shard": (3,),
    "o": (1, 8, 4),
    "wo_shard": (8, 4),
    "q": (1, 4, 8, 16),
    "k": (1, 2, 8, 16),
    "v": (1, 2, 8, 16),
}


@contextlib.contextmanager
def _as_torchrun(rank: int, world: int) -> Iterator[None]:
    """What torchrun tells its processes; accelerate forgets what it was told before, and afterwards."""
    told = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    _forget()
    with mock.patch.dict(os.environ, {name: str(value) for name, value in told.items()}):
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
