"""Mathematics of one gated expert on the tokens that are routed to it, and the order in which tokens reach experts.

Everything here is local and for use below autograd.  Products are in the tensors' own type; what lies between them, and
every sum over the experts of a token, is in the accumulator's type (fp32, fp64 for fp64).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "Routing", "expert_backward", "expert_forward"]


@dataclasses.dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative.

    Attributes:
        apply: ``apply(x)``.
        gradient: ``gradient(grad, x)`` is the gradient of x where ``grad`` is that of ``apply(x)``.
    """

    apply: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


# By the names that models' configurations give them.
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_pytorch_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "relu": Activation(F.relu, lambda grad, x: grad * (x > 0)),
}


@dataclasses.dataclass(frozen=True)
class Routing:
    """The pairs (token, expert) in the order of experts, and within an expert in the order of tokens.

    Attributes:
        pair: int64 [T * k], index of each pair in the flattened ``top_k_index``.
        token: int64 [T * k], its token.
        weight: [T * k], its routing weight, in the accumulator's type.
        bounds: expert e has the pairs from ``bounds[e]`` to ``bounds[e + 1]``.
    """

    pair: Tensor
    token: Tensor
    weight: Tensor
    bounds: list[int]

    @staticmethod
    def of(top_k_index: Tensor, top_k_weights: Tensor, experts: int, wide: torch.dtype) -> Routing:
        """Sorts what a router chose.  The bounds are read on the host: on a GPU it waits for the router here.

        Raises:
            ValueError: an index does not name one of ``experts`` experts.
        """
        flat = top_k_index.reshape(-1).long()
        ordered, pair = torch.sort(flat, stable=True)
        bounds = torch.searchsorted(ordered, torch.arange(experts + 1, device=flat.device)).tolist()
        if bounds[0] != 0 or bounds[-1] != flat.numel():
            raise ValueError(
                f"zero3_experts: expected top_k_index from 0 to {experts - 1}, got {ordered[0]} to {ordered[-1]}"
            )
        weight = top_k_weights.reshape(-1)[pair].to(wide)
        return Routing(pair, pair // top_k_index.shape[1], weight, bounds)


def expert_forward(
    y: Tensor, x: Tensor, weight: Tensor, token: Tensor, gate_up: Tensor, down: Tensor, act: Activation, pre: Tensor
) -> None:
    """``y[token] += weight * (act(x @ gate.T) * (x @ up.T)) @ down.T`` for the n tokens of one expert.

    y [T, d] in the accumulator's type, x [T, d], weight [n], token [n] without repetition, gate_up [2i, d] holds gate
    and then up, down [d, i]; ``pre`` [n, 2i] becomes both products with x.
    """
    torch.mm(x[token], gate_up.t(), out=pre)
    gate, up = pre.to(y.dtype).chunk(2, dim=-1)
    hidden = act.apply(gate).mul_(up).to(x.dtype)
    y.index_add_(0, token, torch.mm(hidden, down.t()).to(y.dtype).mul_(weight[:, None]))


def expert_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    token: Tensor,
    pre: Tensor,
    act: Activation,
    *,
    gate_up: Tensor | None,
    down: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dgate_up: Tensor | None,
    ddown: Tensor | None,
) -> None:
    """The gradients of :func:`expert_forward`, where they are wanted, from the gradient ``grad`` [T, d] of y.

    The output of the expert is not needed: with h its hidden state, the gradient of a token's weight is
    <grad, h @ down.T> = <grad @ down, h>.

    Args:
        grad, x, weight, token, pre, act: as in :func:`expert_forward`.
        gate_up: needed for ``dx``.
        down: needed for all but ``ddown``.
        dx: [T, d] in the accumulator's type; is added to.
        dweight: [n] in the accumulator's type; is written.
        dgate_up, ddown: are written.
    """
    wide = weight.dtype
    if token.numel() == 0:
        for written in (dgate_up, ddown):
            if written is not None:
                written.zero_()
        return
    incoming = grad[token]
    gate, up = pre.to(wide).chunk(2, dim=-1)
    activated = act.apply(gate)
    if ddown is not None:
        torch.mm(incoming.t(), (activated * up).mul_(weight[:, None]).to(x.dtype), out=ddown)
    if down is None:
        return
    dhidden = torch.mm(incoming, down).to(wide)
    if dweight is not None:
        dweight.copy_((dhidden * activated).mul_(up).sum(-1))
    if dx is None and dgate_up is None:
        return
    dhidden *= weight[:, None]
    dpre = torch.cat((act.gradient(dhidden * up, gate), dhidden.mul_(activated)), dim=-1).to(x.dtype)
    if dgate_up is not None:
        torch.mm(dpre.t(), x[token], out=dgate_up)
    if dx is not None:
        assert gate_up is not None
        dx.index_add_(0, token, torch.mm(dpre, gate_up).to(wide))
