"""What is done to a model after it was parallelized: what each rank gets from the next step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from family_cases import Case, make_mesh, parallel_model, whole
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from odysseus_kernels.nn.sequence import shard_sequence

CASE = Case(kv_heads=4, length=12)
TIMEOUT_S = 20.0


class Adapter(nn.Module):
    """A layer with something added, which shows the layer's weight as its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.added = nn.Parameter(torch.ones(()))

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) * self.added


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def _twice(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def _forward_hook(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.register_forward_hook(_twice)


def _pre_hook(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda _, given: (given[0] * 2,))


def _backward_hook(model: Any) -> None:
    model.model.layers[0].self_attn.o_proj.register_full_backward_hook(lambda _, gradients, __: (gradients[0] * 2,))


def _forward_of_its_own(model: Any) -> None:
    projection = model.model.layers[0].mlp.gate_proj
    stock = projection.forward
    projection.forward = lambda x: stock(x) * 2


def _hook_of_the_head(model: Any) -> None:
    model.lm_head.register_forward_hook(_twice)


def _adapter(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.v_proj = Adapter(attention.v_proj)
    attention.v_proj.added.requires_grad_(False)


def _adapter_of_the_head(model: Any) -> None:
    model.lm_head = Adapter(model.lm_head)
    model.lm_head.added.requires_grad_(False)


def _another_projection(model: Any) -> None:
    model.model.layers[0].mlp.down_proj = nn.Linear(144, 96, bias=False)


def _another_head(model: Any) -> None:
    model.lm_head = nn.Linear(96, 120, bias=False)


def _another_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm = LlamaRMSNorm(96)


def _one_more_module(model: Any) -> None:
    model.extra = nn.Linear(96, 2)


def _tied_head(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def _own_loss(model: Any) -> None:
    model.loss_function = lambda logits, labels, **_: logits.float().square().mean()


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "a forward hook": (_forward_hook, "model.layers.1.self_attn.q_proj: expected a layer without hooks"),
    "a pre-hook": (_pre_hook, "model.layers.0.mlp.up_proj: expected a layer without hooks"),
    "a backward hook": (_backward_hook, "model.layers.0.self_attn.o_proj: expected a layer without hooks"),
    "a forward of its own": (_forward_of_its_own, "got one with a forward of its own"),
    "a hook of the head": (_hook_of_the_head, "the language head: expected a layer without hooks"),
    "an adapter": (_adapter, "model.layers.0.self_attn.v_proj: expected a stock Linear, got changed_cases.Adapter"),
    "an adapter of the head": (_adapter_of_the_head, "the language head: expected the one that was parallelized"),
    "another projection": (_another_projection, "model.layers.0.mlp.down_proj.weight: expected a parameter that"),
    "another head": (_another_head, "lm_head.weight: expected a parameter that parallelize distributed"),
    "another norm": (_another_norm, "model.layers.0.input_layernorm.weight: expected a parameter that"),
    "one more module": (_one_more_module, "extra.weight: expected a parameter that parallelize distributed"),
    "a tied head": (_tied_head, "lm_head.weight: expected a parameter with placements"),
    "a loss of its own": (_own_loss, "loss_function: expected transformers' ForCausalLMLoss"),
}


def _hooks_around(model: Any) -> None:
    layer = model.model.layers[0]
    for module in (layer, layer.mlp, layer.mlp.act_fn, layer.input_layernorm):
        module.register_forward_hook(lambda _, __, output: output * 1.5)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient * 2)


def _fewer_layers(model: Any) -> None:
    model.model.layers = nn.ModuleList([model.model.layers[1]])


def _parametrized(model: Any) -> None:
    parametrize.register_parametrization(model.model.layers[0].self_attn.q_proj, "weight", Doubled())


class Around(nn.Module):
    """A module around another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def _wrapped(model: Any) -> None:
    layer = model.model.layers[0]
    layer.self_attn, layer.mlp = Around(layer.self_attn), Around(layer.mlp)
    model.model.layers[1] = Around(model.model.layers[1])


def _shared_layer(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


def _frozen(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    model.extra = nn.Linear(96, 2).requires_grad_(False)


FOLLOWED: dict[str, Callable[[Any], None]] = {
    "hooks around": _hooks_around,
    "fewer layers": _fewer_layers,
    "a parametrization": _parametrized,
    "a layer twice": _shared_layer,
    "modules around": _wrapped,
    "frozen": _frozen,
}


def _another_activation(model: Any) -> None:
    model.model.layers[1].mlp.experts.act_fn = nn.GELU()


def _hook_of_an_activation(model: Any) -> None:
    model.model.layers[1].mlp.experts.act_fn.register_forward_hook(_twice)


def _dropout(model: Any) -> None:
    model.model.layers[1].mlp.residual_dropout = 0.5


# Of other families, under "tp".
OTHERS: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "another activation": (
        "mixtral",
        _another_activation,
        "layers.1.mlp.experts.act_fn: expected SiLUActivation, with",
    ),
    "a hook of it": ("mixtral", _hook_of_an_activation, "layers.1.mlp.experts.act_fn: expected a layer without hooks"),
    "dropout": ("starcoder2", _dropout, "layers.1.mlp.residual_dropout: expected 0 where ranks compute the same"),
}


def step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and whole gradients."""
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def refused(rank: int, world: int, strategy: str) -> dict[str, str]:
    """What each change says, made on all ranks or on the last one alone."""
    mesh, said = make_mesh(world, 1), {}
    batch = shard_sequence(CASE.whole_batch(), mesh, strategy)
    for index, (name, (change, _)) in enumerate(REFUSED.items()):
        model = parallel_model(CASE, strategy, mesh, timeout_s=TIMEOUT_S)
        if index % 2 or rank == world - 1:
            change(model)
        try:
            step(model, batch)
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)
    return said


def refused_elsewhere(rank: int, world: int) -> dict[str, str]:
    """The same of other families."""
    mesh, said = make_mesh(world, 1), {}
    for name, (family, change, _) in OTHERS.items():
        model = parallel_model(Case(family=family, length=12), "tp", mesh, timeout_s=TIMEOUT_S)
        change(model)
        try:
            step(model, shard_sequence(CASE.whole_batch(), mesh, "tp"))
        except ValueError as error:
            said[name] = str(error)
    return said


def followed(rank: int, world: int, strategy: str) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Steps of models that were changed in ways that count."""
    mesh, found = make_mesh(world, 1), {}
    for name, change in FOLLOWED.items():
        model = parallel_model(CASE, strategy, mesh, timeout_s=TIMEOUT_S)
        change(model)
        found[name] = step(model, shard_sequence(CASE.whole_batch(), mesh, strategy))
    return found


def odd_inputs(rank: int, world: int) -> tuple[float, str]:
    """A loss with a mask of fractions, and what is said of positions of that kind."""
    mesh = make_mesh(world, 1)
    model = parallel_model(CASE, "odysseus", mesh, timeout_s=TIMEOUT_S)
    batch = shard_sequence({**CASE.whole_batch(), "attention_mask": left_padding()}, mesh)
    loss = model(**{**batch, "attention_mask": batch["attention_mask"] * 0.5}).loss.item()
    try:
        model(**{**batch, "position_ids": batch["position_ids"] / 2})
    except ValueError as error:
        return loss, str(error)
    return loss, ""


def left_padding() -> torch.Tensor:
    """A mask."""
    mask = torch.ones(CASE.batch, CASE.length, dtype=torch.int64)
    mask[0, :5] = 0
    return mask
