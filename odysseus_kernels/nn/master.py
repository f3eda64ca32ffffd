"""Training in bf16 or fp16 with fp32 master weights: the optimizer that keeps them.

The model computes with narrow parameters, the optimizer works on fp32 copies of them that are distributed in the same
way. Gradients of several backward passes are added in fp32: the first one is widened where it arrives, so that
``.grad`` is what ``clip_grad_norm_`` and loss scalers expect, only wider. Nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from odysseus_kernels.nn.dtensor import complete_dtensor

__all__ = ["MasterWeights"]

_MASTER = "master"
_NARROW = (torch.bfloat16, torch.float16)


class MasterWeights(torch.optim.Optimizer):
    """Runs any optimizer on fp32 copies of bf16 or fp16 parameters.

    It is used as every optimizer is: ``param_groups`` hold the model's parameters, learning rate schedulers change
    them, and ``state`` has for each narrow parameter what the inner optimizer keeps and, as ``"master"``, the fp32
    copy, so that :func:`odysseus_kernels.save_checkpoint` and ``state_dict`` restore training to the bit. Wider
    parameters are optimized as they are. Each step leaves ``parameter = master`` rounded to the parameter's type:
    change parameters by hand (or load weights without this optimizer) only before it is made.

    Attributes:
        kind: this class and the inner optimizer's, as checkpoints compare them.

    Args:
        optimizer_class: called with the masters and ``settings``; keeps its state by parameter.
        params: parameters or groups of them, plain or DTensors.
        grad_dtype: type in which ``.grad`` is added up; None leaves it the parameter's own.
        **settings: learning rate and so on.

    Raises:
        ValueError: for a ``grad_dtype`` other than fp32 or None, or where this torch has none.

    Example:
        >>> model = ody.parallelize(model.bfloat16(), mesh)
        >>> optimizer = ody.MasterWeights(torch.optim.AdamW, model.parameters(), lr=1e-4)
        >>> model(**ody.shard_sequence(batch, mesh)).loss.backward()  # any number of micro-batches
        >>> optimizer.step()
        >>> weight = model.model.norm.weight
        >>> weight.dtype, optimizer.state[weight]["master"].dtype
        (torch.bfloat16, torch.float32)
    """

    def __init__(
        self,
        optimizer_class: Callable[..., torch.optim.Optimizer],
        params: Iterable[Any],
        *,
        grad_dtype: torch.dtype | None = torch.float32,
        **settings: Any,
    ) -> None:
        if grad_dtype not in (torch.float32, None):
            raise ValueError(f"grad_dtype: expected torch.float32 or None, got {grad_dtype}")
        if grad_dtype is not None and not hasattr(torch.Tensor, "grad_dtype"):
            raise ValueError(f"grad_dtype: expected None, torch {torch.__version__} adds in the gradient's own type")
        super().__init__(params, {})
        complete_dtensor()
        groups, self._masters = [], dict[torch.Tensor, torch.Tensor]()
        for group in self.param_groups:
            for parameter in group["params"]:
                narrow = parameter.dtype in _NARROW
                self._masters[parameter] = _wide_copy(parameter) if narrow else parameter
                if narrow and grad_dtype is not None and parameter.requires_grad:
                    # Any type: FSDP2 gives gradients in the parameter's own, and calls the hook, too.
                    parameter.grad_dtype = None
                    parameter.register_post_accumulate_grad_hook(_widen)
            groups.append({**group, "params": [self._masters[parameter] for parameter in group["params"]]})
        self._inner = optimizer_class(groups, **settings)
        self.kind = f"{type(self).__name__} of {type(self._inner).__name__}"
        self.defaults = self._inner.defaults
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            group.update({key: value for key, value in inner.items() if key not in ("params", "param_names")})
        self._publish()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the inner optimizer, then the parameters become what their masters are, rounded."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adopt()
        pairs = [(p, master) for p, master in self._masters.items() if p is not master]
        for parameter, master in pairs:
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        self._inner.step()
        stepped = [(p, master) for p, master in pairs if master.grad is not None]
        for _, master in pairs:
            master.grad = None
        if stepped:
            torch._foreach_copy_([_local(p) for p, _ in stepped], [_local(master) for _, master in stepped])
        self._publish()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses groups that come later: the inner optimizer is made for the first ones."""
        if hasattr(self, "_inner"):
            raise ValueError("add_param_group: expected all parameters when MasterWeights is made; make another one")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned; unlike torch's own, does not round fp32 state to the parameters."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                present = self.state[parameter][key]
                if isinstance(value, torch.Tensor) and present.dtype != value.dtype:
                    self.state[parameter][key] = value.detach().clone().to(present.device)

    def _adopt(self) -> None:
        """Gives the inner optimizer the settings and the state as they are now, loaded ones included."""
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update({key: value for key, value in group.items() if key not in ("params", "param_names")})
        for parameter, master in self._masters.items():
            state = dict(self.state.get(parameter, {}))
            loaded = state.pop(_MASTER, master)
            if loaded is not master:
                master.copy_(loaded)
            if state:
                self._inner.state[master] = state
            else:
                self._inner.state.pop(master, None)

    def _publish(self) -> None:
        """Shows the masters and the inner optimizer's state as this optimizer's; the same tensors, not copies."""
        for parameter, master in self._masters.items():
            shown: dict[str, Any] = {} if parameter is master else {_MASTER: master}
            shown |= self._inner.state.get(master, {})
            if shown:
                self.state[parameter] = shown


def _widen(parameter: torch.Tensor) -> None:
    """After each backward pass: later gradients are added to what is fp32 by then."""
    if parameter.grad is not None and parameter.grad.dtype != torch.float32:
        parameter.grad = parameter.grad.to(torch.float32)


def _wide_copy(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to(torch.float32).requires_grad_(parameter.requires_grad)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
