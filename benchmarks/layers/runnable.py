"""A variant on one rank: what can be stepped and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.nn.step import Stepped

__all__ = ["Runnable", "stepper"]


@dataclasses.dataclass
class Runnable:
    """A variant on this rank.

    Attributes:
        step: forward and backward; afterwards :attr:`result` holds what it gave.
        parameters: by the stock model's names; gradients are in their ``grad``.
        positions: of this rank's tokens in the whole sequence.
        leaf: the input whose gradient is checked, or None.
        forward: forward alone, for what is kept for backward.
        mesh, model, batch: of ours: the mesh, what was parallelized on it, and this rank's part of the batch.
    """

    step: Callable[[], Tensor]
    parameters: dict[str, torch.nn.Parameter]
    positions: Tensor
    leaf: Tensor | None = None
    forward: Callable[[], Tensor] | None = None
    mesh: DeviceMesh | None = None
    model: Stepped | None = None
    batch: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def stepper(
    parameters: dict[str, torch.nn.Parameter], forward: Callable[[], Tensor], leaf: Tensor | None, grad: Tensor | None
) -> Callable[[], Tensor]:
    every: Sequence[Tensor] = [*parameters.values(), *([] if leaf is None else [leaf])]

    def step() -> Tensor:
        for tensor in every:
            tensor.grad = None
        output = forward()
        output.backward(grad)
        return output.detach()

    return step
