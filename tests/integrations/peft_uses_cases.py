"""Adapters that begin with parts of the weights that they are put on, and calls with an adapter for each row."""

from __future__ import annotations

from typing import Any

import torch
from family_cases import make_mesh, parallel_model
from peft import LoraConfig, get_peft_model
from peft_cases import CASE, RANK, TIMEOUT_S, Adapted, step

import odysseus_kernels as ody
from odysseus_kernels.config import OverlapConfig

BEGINNINGS = ("pissa", "olora")


def adapted(model: Any, beginning: str) -> Any:
    """A PEFT model whose adapters hold a part of each weight, and whose weights hold the rest."""
    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=beginning)
    return get_peft_model(model, config).train()


def begun_before(rank: int, world: int, strategy: str, beginning: str) -> tuple[float, dict[str, torch.Tensor]]:
    """A step of a model that was parallelized with its adapters."""
    model = ody.parallelize(
        adapted(CASE.model(), beginning), make_mesh(world, 1), strategy, OverlapConfig(timeout_s=TIMEOUT_S)
    )
    return step(model, ody.shard_sequence(CASE.whole_batch(), model))


def begun_after(rank: int, world: int, strategy: str, beginning: str) -> str:
    """What is said where they come afterwards, to the whole model or as another adapter."""
    model, said = parallel_model(CASE, strategy, make_mesh(world, 1), timeout_s=TIMEOUT_S), []
    try:
        adapted(model, beginning)
    except ValueError as error:
        said.append(str(error))
    plain = get_peft_model(
        parallel_model(CASE, strategy, make_mesh(world, 1), timeout_s=TIMEOUT_S), LoraConfig(target_modules=["q_proj"])
    )
    try:
        plain.add_adapter("second", LoraConfig(target_modules=["q_proj"], init_lora_weights=beginning))
    except ValueError as error:
        said.append(str(error))
    return " | ".join(said)


def an_adapter_for_each_row(rank: int, world: int) -> tuple[str, float]:
    """What is said, and the loss of a call afterwards with the active adapter."""
    model = Adapted().before("odysseus", make_mesh(world, 1)).eval()
    batch, said = ody.shard_sequence(CASE.whole_batch(), model), ""
    with torch.no_grad():
        try:
            model(**batch, adapter_names=["default", "__base__"])
        except ValueError as error:
            said = str(error)
        return said, model(**batch).loss.item()
