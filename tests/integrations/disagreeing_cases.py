"""One rank builds, changes, trains or is given something else than its peers: what each rank gets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from changed_cases import step
from failure_cases import attempt as told
from family_cases import Case, make_mesh
from peft import LoraConfig, get_peft_model
from peft_cases import fill
from torch import nn

import odysseus_kernels as ody
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.nn.sequence import shard_sequence
from odysseus_kernels.strategies import STRATEGIES

CASE = Case(kv_heads=4, length=12)
TIMEOUT_S = 60.0


def lora(model: Any, scaling: int = 2, dropout: float = 0.0) -> Any:
    """Adapters with the same values for every scaling."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=4 * scaling, lora_dropout=dropout, target_modules=["q_proj", "up_proj"]
    )
    adapted = get_peft_model(model, config)
    fill(adapted, seed=3)
    return adapted.train()


def _each(model: Any, name: str, value: Any) -> None:
    """Sets an attribute wherever there is one of that name."""
    found = [module for module in model.modules() if name in vars(module)]
    assert found, name
    for module in found:
        setattr(module, name, value)


def _another_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


# ---- when it is parallelized ----------------------------------------------------------------------------------------

# (family, changes of the configuration on one rank, what every rank is told).
BUILT: dict[str, tuple[str, dict[str, Any], str]] = {
    "epsilon": ("llama", {"rms_norm_eps": 1e-2}, "config.rms_norm_eps"),
    "activation": ("llama", {"hidden_act": "gelu"}, "config.hidden_act"),
    "dropout": ("llama", {"attention_dropout": 0.1}, "config.attention_dropout"),
    "window": ("mistral", {"sliding_window": 5}, "config.sliding_window"),
    "rotation": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, "rope"),
    "experts": ("mixtral", {"num_experts_per_tok": 3}, "config.num_experts_per_tok"),
    "normed experts": ("qwen3_moe", {"norm_topk_prob": False}, "config.norm_topk_prob"),
    "router's loss": ("qwen3_moe", {"router_aux_loss_coef": 0.5}, "config.router_aux_loss_coef"),
}

# What is done to the stock model, and how parallelize is called, on one rank.
SET: dict[str, tuple[Callable[[Any], None], str]] = {
    "an epsilon": (
        lambda model: setattr(model.model.layers[1].input_layernorm, "variance_epsilon", 0.1),
        "model.layers.1.input_layernorm.variance_epsilon",
    ),
    "an activation": (_another_activation, "model.layers.0.mlp.act_fn"),
    "a scaling": (lambda model: _each(model, "scaling", 0.5), "model.layers.0.self_attn.scaling"),
    "a padding token": (lambda model: _each(model.model.embed_tokens, "padding_idx", 3), "embed_tokens.padding_idx"),
    "no stock model": (lambda model: setattr(model, "extra", nn.Linear(2, 2)), "stock model's parameters only"),
}
CALLED: dict[str, tuple[dict[str, Any], str]] = {
    "strategy": ({"strategy": "tsp"}, "strategy (here '"),
    "an unknown one": ({"strategy": "best"}, "strategy: expected one of"),
    "tune": ({"config": OverlapConfig(timeout_s=TIMEOUT_S, tune="measure")}, "OverlapConfig.tune"),
    "mode": ({"config": OverlapConfig(timeout_s=TIMEOUT_S, mode="unfused")}, "OverlapConfig.mode"),
}


def parallelized(rank: int, world: int, bad: int) -> dict[str, tuple[str, str, float]]:
    """(type, text, seconds) of the error of each."""
    mesh, strategies = make_mesh(world, 1), itertools.cycle(("odysseus", "tp", "ulysses", "tp_sp"))
    found: dict[str, tuple[str, str, float]] = {}

    def attempt(name: str, case: Case, change: Callable[[Any], None] | None = None, **given: Any) -> None:
        model = case.model()
        if change is not None and rank == bad:
            change(model)
        call: dict[str, Any] = {"strategy": next(strategies), "config": OverlapConfig(timeout_s=TIMEOUT_S)}
        call |= given if rank == bad else {}
        found[name] = told(lambda: ody.parallelize(model, mesh, **call))
        assert not hasattr(model, "sequence_group"), "a refused model must stay as it was"

    for name, (family, changes, _) in BUILT.items():
        case = dataclasses.replace(CASE, family=family)
        settings = {name: value for name, value in changes.items() if rank == bad}
        attempt(name, dataclasses.replace(case, changes=tuple(settings.items())) if settings else case)
    for name, (change, _) in SET.items():
        attempt(name, CASE, change)
    for name, (given, _) in CALLED.items():
        attempt(name, CASE, **given)
    return found


# ---- afterwards -----------------------------------------------------------------------------------------------------


def _no_dropout(model: Any) -> None:
    model.model.layers[0].self_attn.eval()


@torch.no_grad()
def _doubled(model: Any) -> None:
    model.model.norm.weight.mul_(2)


CHANGED: dict[str, tuple[Case, Callable[[Any], object], str]] = {
    "an epsilon": (CASE, lambda model: _each(model.model.norm, "variance_epsilon", 0.1), "norm.variance_epsilon 0.1"),
    "an activation": (CASE, _another_activation, "layers.0.mlp.act_fn GELU(approximate='none')"),
    "a window": (
        dataclasses.replace(CASE, family="mistral"),
        lambda model: setattr(model.config, "sliding_window", 3),
        "config.sliding_window 3",
    ),
    "experts": (
        dataclasses.replace(CASE, family="mixtral"),
        lambda model: setattr(model, "num_experts_per_tok", 3),
        "num_experts_per_tok 3",
    ),
    "a dropout": (CASE, lambda model: _each(model, "attention_dropout", 0.1), "self_attn.attention_dropout 0.1"),
    "a dropout less": (
        dataclasses.replace(CASE, changes=(("attention_dropout", 0.1),)),
        _no_dropout,
        "1 of 2 modules without dropout",
    ),
    "weights": (CASE, _doubled, "weights changed before 1 forwards"),
}


def changed(rank: int, world: int, bad: int) -> dict[str, tuple[str, str, float]]:
    """The same of forwards of models that were changed on one rank."""
    mesh, found = make_mesh(world, 1), dict[str, tuple[str, str, float]]()
    for index, (name, (case, change, _)) in enumerate(CHANGED.items()):
        strategy = list(STRATEGIES)[index % len(STRATEGIES)]
        model = ody.parallelize(case.model(), mesh, strategy, OverlapConfig(timeout_s=TIMEOUT_S))
        if rank == bad:
            change(model)
        batch = shard_sequence(case.whole_batch(), model)
        found[name] = told(lambda model=model, batch=batch: model(**batch))
    adapters: dict[str, dict[str, Any]] = {"adapters' scaling": {"scaling": 3}, "adapters' dropout": {"dropout": 0.1}}
    for name, settings in adapters.items():
        model = ody.parallelize(CASE.model(), mesh, "odysseus", OverlapConfig(timeout_s=TIMEOUT_S))
        adapted = lora(model, **(settings if rank == bad else {}))
        batch = shard_sequence(CASE.whole_batch(), model)
        found[name] = told(lambda model=adapted, batch=batch: model(**batch))
    return found


STEPS = ("a step", "no step", "gradients", "embeddings")


def trained(rank: int, world: int, bad: int, foreach: bool, folder: str) -> dict[str, tuple[str, str, float]]:
    """What the forward after a step says, which one rank has ended in another way."""
    mesh, found = make_mesh(world, 1), dict[str, tuple[str, str, float]]()
    for name, strategy in zip(STEPS, ("tp", "odysseus", "ulysses", "tsp"), strict=True):
        model = ody.parallelize(CASE.model(), mesh, strategy, OverlapConfig(timeout_s=TIMEOUT_S))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=foreach)
        batch = shard_sequence(CASE.whole_batch(), model)
        for _ in range(2):  # steps that all take
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if name == "a step":
            ody.save_checkpoint(folder, model)
        model(**batch).loss.backward()
        if (name == "a step" and rank == bad) or (name == "no step" and rank != bad):
            optimizer.step()
        if name != "gradients" or rank != bad:
            optimizer.zero_grad()
        if name == "embeddings" and rank == bad:
            batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
        found[name] = told(lambda model=model, batch=batch: model(**batch))
        if name == "a step":
            again = told(lambda model=model, batch=batch: model(**batch))
            assert again[:1] == found[name][:1], f"copies still differ: {again}"
            ody.load_checkpoint(folder, model)
            assert told(lambda model=model, batch=batch: model(**batch))[0] == "", "they do not any more"
    return found


def refused(rank: int, world: int, bad: int) -> tuple[str, str]:
    """A step in which one rank's batch is refused, with another change of all weights behind it; what follows."""
    mesh = make_mesh(world, 1)
    model = ody.parallelize(CASE.model(), mesh, "odysseus", OverlapConfig(timeout_s=TIMEOUT_S))
    batch = shard_sequence(CASE.whole_batch(), model)

    def change() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)

    def pass_(wrong: bool) -> None:
        with ody.step(model):
            positions = batch["position_ids"]
            model(**{**batch, "position_ids": positions.double() if wrong else positions}).loss.backward()

    change()
    first = told(lambda: pass_(rank == bad))
    model.zero_grad()
    change()
    return first[0], told(lambda: pass_(False))[0]


# ---- what may differ ------------------------------------------------------------------------------------------------


def harmless(rank: int, world: int, strategy: str) -> tuple[float, dict[str, torch.Tensor]]:
    """A step in which the ranks differ in what decides no number; gradients on the first."""
    odd = rank == world - 1
    # Under "tsp" the one attends to all keys at once, the other to one rank's after another's.
    model = dataclasses.replace(CASE, attention="eager" if odd and strategy != "tsp" else "sdpa").model()
    if odd:
        model.config._name_or_path, model.config.architectures = "/another/folder", ["Another"]
        model.config.use_cache, model.config.eos_token_id, model.config.dtype = False, 2, torch.bfloat16
        model.noted = model.model.layers[0].noted = model.config.noted = 3.5
        model.eval()
        for module in (model.model.layers[0], model.model.layers[1].mlp, model.model.norm):
            module.register_forward_hook(lambda *_: None)
    model = ody.parallelize(model, make_mesh(world, 1), strategy, OverlapConfig(timeout_s=TIMEOUT_S / (1 + odd)))
    if odd:
        model.noted_since = model.model.layers[1].seconds = 1.5
        model.config.use_cache = True
    loss, gradients = 0.0, dict[str, torch.Tensor]()
    for again in (False, True):  # gradients of two batches, added
        batch = shard_sequence(CASE.whole_batch(), model)
        if odd and again and strategy != "tp":  # whose ranks compare the tokens that they were given
            batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
        loss, gradients = step(model, batch)
    return loss, gradients if rank == 0 else {}
