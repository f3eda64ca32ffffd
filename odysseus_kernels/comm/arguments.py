"""What every operator makes sure of, or does with its arguments, before anything is sent."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from odysseus_kernels.config import OverlapConfig

__all__ = ["autocasts", "check_config", "check_tensors", "refuse_second_derivative", "under_autocast"]


_OPTIONAL = ("bias", "bias_shard", "documents")


def check_config(config: OverlapConfig | None) -> OverlapConfig:
    """``config``, or the default for None.

    Raises:
        TypeError: it is something else.
    """
    if config is None:
        return OverlapConfig()
    if not isinstance(config, OverlapConfig):
        raise TypeError(f"config: expected an OverlapConfig or None, got {type(config).__name__}")
    return config


def check_tensors(operator: str, **arguments: Tensor | None) -> None:
    """Refuses what an operator would compute wrongly, or fail on with an error that does not name the cause.

    Raises:
        ValueError: not a tensor; a sparse, nested or distributed one; or one with a forward-mode tangent, which
            operators would silently drop.
    """
    for name, argument in arguments.items():
        if argument is not None or name.partition("[")[0] not in _OPTIONAL:
            _check(operator, name, argument)


def _check(operator: str, name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{operator}: expected {name} to be a tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else f"one of layout {tensor.layout}"
        raise ValueError(f"{operator}: expected {name} to be a dense tensor, got {kind}")
    if torch.compiler.is_compiling():
        return  # graphs of forward-mode derivatives are not captured
    if hasattr(tensor, "placements") and hasattr(tensor, "to_local"):
        raise ValueError(
            f"{operator}: expected {name} to be this rank's plain tensor, got a DTensor; pass {name}.to_local()"
        )
    if tensor.is_floating_point() and forward_ad.unpack_dual(tensor).tangent is not None:
        raise ValueError(
            f"{operator}: expected {name} without a forward-mode tangent (torch.func.jvp, torch.autograd.forward_ad): "
            f"operators between ranks have reverse-mode derivatives only"
        )


def autocasts(device: torch.device) -> bool:
    """Whether ``torch.autocast`` is on for ``device``'s type."""
    # Other types (meta) would raise; torch 2.10 cannot compile the question which ones there are.
    return device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)


def under_autocast(device: torch.device, *tensors: Any) -> tuple[Any, ...]:
    """What torch's own linear layers would do to their arguments within ``torch.autocast`` of ``device``'s type.

    Floating tensors except fp64 become the autocast type, differentiably: gradients come back in their own types.  None
    stays None.
    """
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors
    )


def refuse_second_derivative(backward: torch.library.CustomOpDef, operator: str) -> None:
    """Makes what ``operator``'s ``backward`` returns raise when it is differentiated itself, and say what did."""

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"{operator} has no second derivative: its gradients were made with create_graph=True and then "
            f"differentiated; penalties on gradients need plain layers"
        )

    backward.register_autograd(refuse)
