"""Whether a parallelized model is still what ``parallelize`` made of it: what was put into it since may not be seen.

Projections are not called: their weights are read and multiplied while they travel.  So a hook on one, a wrapper
around it or a forward of its own would be left out without a word, and a parameter that is no distributed one would get
the gradient of this rank's tokens.  PEFT's LoRA layers are the wrappers that are read, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss

from odysseus_kernels.integrations.calls import changed_call
from odysseus_kernels.integrations.peft import lora_linears, take_in
from odysseus_kernels.integrations.peft_refusals import check_adapter, refuse_others, refuse_row_adapters
from odysseus_kernels.nn.group import SEQUENCE_DIMENSION, SequenceGroup

__all__ = ["check_intact", "check_loss"]

_RANDOM = ("residual_dropout", "embedding_dropout", "jitter_noise")
_AGAIN = "change the stock model, and parallelize it then"


def check_intact(model: nn.Module, group: SequenceGroup) -> None:
    """Raises ValueError if a projection is another module or would not be called, or if a parameter is not distributed.

    Likewise if the experts' activation is another one, or if ranks with the same tokens would draw random numbers.

    Adapters that PEFT has put around projections since get the first rank's values; else nothing is sent and no values
    are read.
    """
    if torch.compiler.is_compiling():
        return
    projections = {
        f"{path}.{name}": getattr(module, name)
        for path, module in model.named_modules()
        for name in _projections(module)
    }
    adapted = list(lora_linears(projections.values()))
    refuse_row_adapters(adapted)
    for name, projection in projections.items():
        _check_projection(name, projection, group)
    refuse_others(model, adapted)
    take_in(model, adapted, group)
    adapters = {
        id(parameter)
        for module in adapted
        for kind in (module.lora_A, module.lora_B)
        for parameter in kind.parameters()
    }
    for path, module in model.named_modules():
        if "experts_spec" in vars(module):
            _check_activation(f"{path}.act_fn", module)
        if group.tokens == "replicated" and module.training:
            _check_nothing_random(path, module)
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in adapters:
                _check_parameter(f"{path}.{name}", parameter, vars(module).get("sequence_placements", {}), name, group)


def check_loss(model: Any) -> None:
    """Raises ValueError if a model with labels would leave out its own loss function, or what is put on its head."""
    if torch.compiler.is_compiling():
        return
    if model.loss_function is not ForCausalLMLoss:
        name = getattr(model.loss_function, "__name__", model.loss_function)
        raise ValueError(
            f"loss_function: expected transformers' ForCausalLMLoss, which a parallelized model computes without whole "
            f"logits, got {name}: call the model without labels and give its logits, made whole by gather_sequence, to "
            f"a loss of your own"
        )
    head = model.get_output_embeddings()
    if not hasattr(head, "sequence_group"):
        raise ValueError(
            f"the language head: expected the one that was parallelized, got {_kind(head)}: {_AGAIN}; or call the "
            f"model without labels"
        )
    _check_called(
        "the language head", head, "with labels it is not called: its logits never exist whole; call without labels"
    )


def _projections(module: nn.Module) -> Iterator[str]:
    """Names of the linear layers of which a parallelized module reads the weights alone."""
    own = vars(module)
    attention, mlp = own.get("attention_spec"), own.get("mlp_spec")
    if attention is not None:
        yield from (attention.query, attention.key, attention.value, attention.output)
    if mlp is not None:
        yield from (name for name in (mlp.gate, mlp.up, mlp.down) if name is not None)


def _check_projection(name: str, module: Any, group: SequenceGroup) -> None:
    instead = "projections of a parallelized model are not called: put it on the module around, or on the parameters"
    if next(lora_linears([module]), None) is not None:
        check_adapter(name, module, group)
        _check_called(name, module, instead)
        _check_called(f"{name}.base_layer", module.base_layer, instead)
        return
    # A parametrized layer is another class; its weight is what the parametrization makes of it, and that is read.
    if type(module) is not nn.Linear and not (isinstance(module, nn.Linear) and is_parametrized(module)):
        raise ValueError(
            f"{name}: expected a stock Linear, got {_kind(module)}: adapters other than PEFT's LoRA, "
            f"quantized and wrapped layers are not called within a parallelized model; merge them into the stock "
            f"model's weight, and parallelize it then"
        )
    _check_called(name, module, instead)


def _check_activation(name: str, experts: Any) -> None:
    expected = type(ACT2FN[experts.experts_spec.activation])
    if type(experts.act_fn) is not expected:
        raise ValueError(
            f"{name}: expected {expected.__name__}, with which the experts were parallelized, got "
            f"{_kind(experts.act_fn)}: set hidden_act in the configuration before the model is built"
        )
    _check_called(name, experts.act_fn, "experts of a parallelized model do not call it: put it on the experts")


def _check_nothing_random(path: str, module: nn.Module) -> None:
    """Ranks that compute the same tokens would draw different numbers for them."""
    for name in _RANDOM:
        value = vars(module).get(name, 0)
        if isinstance(value, float | int) and value > 0:
            raise ValueError(
                f"{path}.{name}: expected 0 where ranks compute the same tokens, got {value}: they would draw "
                f"different random numbers; use another strategy than 'tp'"
            )


def _check_called(name: str, module: nn.Module, instead: str) -> None:
    what = changed_call(module)
    if what:
        raise ValueError(f"{name}: expected a layer without hooks, got one with {what}: {instead}")


def _check_parameter(
    path: str, parameter: torch.Tensor, placements: dict[str, Any], name: str, group: SequenceGroup
) -> None:
    if not isinstance(parameter, DTensor) or SEQUENCE_DIMENSION not in (parameter.device_mesh.mesh_dim_names or ()):
        if name in placements or (parameter.requires_grad and torch.is_grad_enabled()):
            raise ValueError(
                f"{path}: expected a parameter that parallelize distributed, got a plain one of shape "
                f"{list(parameter.shape)}, whose gradient would be that of this rank's tokens alone: {_AGAIN}; values "
                f"are loaded by load_pretrained or load_checkpoint. A module of your own stays outside of the model: "
                f"give it what gather_sequence makes whole"
            )
        return
    # Data parallelism shows parameters of another mesh outside of its layers.
    expected = placements.get(name)
    if expected is not None and parameter.device_mesh == group.mesh and tuple(parameter.placements) != expected:
        raise ValueError(
            f"{path}: expected a parameter with placements {expected}, got {tuple(parameter.placements)}: it was "
            f"replaced or tied to another one since parallelize; {_AGAIN}"
        )


def _kind(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"
