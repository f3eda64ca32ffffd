"""Feed-forward networks a tile of tokens at a time, so that the intermediate [s, i] never exists whole.

Forward computes one tile after another and keeps the network's input; backward computes each tile again and
differentiates it.  A checkpoint around the layer, which computes it again itself, ends where this network begins: it
keeps its input before it computes, so that its forward runs twice and not three times.

What travels (``planner/formulas.py`` has it to the byte):

- ZeRO-3: each weight once in forward, once in backward, and its gradient once, as without tiles: weights are gathered
  whole while the first tile is multiplied, and gradients of all tiles are added before they leave.  That takes the
  memory of the network's whole weights, and in backward of their gradients in the accumulator's type.
- tensor parallelism: each tile's tokens and results.  A tile of n tokens is n of each rank's own.  Backward gathers the
  network's input once more, and keeps it for the tile's gradient.

Summation.  Gradients of weights are added over the tiles in fp32 (fp64 for fp64), in their order.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from odysseus_kernels import ops
from odysseus_kernels.comm.arguments import under_autocast
from odysseus_kernels.comm.functional import all_gather, reduce_scatter
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.nn.ahead import Shards
from odysseus_kernels.nn.derivatives import not_differentiable
from odysseus_kernels.nn.gradient_sums import GradientSums
from odysseus_kernels.ops._gathered_product import gathered_product

__all__ = ["ShardedWeights", "TensorParallelWeights", "TiledNetwork", "tiled"]

Activate = Callable[[tuple[Tensor, ...]], Tensor]
_OPERATOR = "zero3_linear"  # that is what travels, and how it is counted


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Weights and biases of gate and up, or of up alone, and of down."""

    inner: tuple[Tensor, ...]
    inner_bias: tuple[Tensor | None, ...]
    outer: Tensor
    outer_bias: Tensor | None

    @staticmethod
    def of(parameters: Sequence[Any]) -> _Weights:
        """From a list [inner weights, inner biases, outer weight, outer bias]."""
        count = len(parameters) // 2 - 1
        return _Weights(tuple(parameters[:count]), tuple(parameters[count:-2]), *parameters[-2:])

    def flat(self) -> list[Tensor | None]:
        return [*self.inner, *self.inner_bias, self.outer, self.outer_bias]


class TiledNetwork(abc.ABC):
    """How a strategy computes a network in tiles.

    Args:
        activate: the intermediate from what gate and up, or up alone, have given; element by element.
        rows: tokens of a tile.
        group: the ranks.
        config: how operators communicate.
    """

    def __init__(self, activate: Activate, rows: int, group: dist.ProcessGroup, config: OverlapConfig) -> None:
        self.activate, self.rows, self.group, self.config = activate, rows, group, config

    def tiles(self, lines: Tensor) -> list[slice]:
        """Rows of each tile; one without rows where there are none, for ranks meet in it."""
        count = lines.shape[0]
        return [slice(first, min(first + self.rows, count)) for first in range(0, max(count, 1), self.rows)]

    @abc.abstractmethod
    def forward(self, lines: Tensor, weights: _Weights) -> Tensor:
        """y [rows, d] of ``lines`` [rows, d]; below autograd."""

    @abc.abstractmethod
    def backward(self, grad: Tensor, lines: Tensor, weights: _Weights, needed: _Needed) -> tuple[Tensor, list[Any]]:
        """dx [rows, d], and gradients as :meth:`_Weights.flat` orders them, None where they are not needed."""

    def activated(self, projected: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        """The intermediate, and what turns its gradient into those of ``projected``."""
        leaves = tuple(one.detach().requires_grad_() for one in projected)
        with torch.enable_grad():
            hidden = self.activate(leaves)
        # The edge alone: the intermediate itself may go once it has been multiplied.
        edge = torch.autograd.graph.get_gradient_edge(hidden)

        def back(grad: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(edge, leaves, grad)

        return hidden.detach(), back


@dataclasses.dataclass(frozen=True)
class _Needed:
    """Which gradients are needed: x's, and those of the parameters as :meth:`_Weights.flat` orders them."""

    x: bool
    parameters: tuple[bool, ...]


class ShardedWeights(TiledNetwork):
    """ZeRO-3: weights [n/N, K] and biases [n/N] cut into rows, tokens of this rank's own.

    Args:
        following: what the group gathers next in forward, sent ahead while the first tile is multiplied.
    """

    def __init__(self, *args: Any, following: Shards = None) -> None:
        super().__init__(*args)
        self._following = following

    def forward(self, lines: Tensor, weights: _Weights) -> Tensor:
        """Gathers each weight while it multiplies the first tile."""
        *inner_biases, outer_bias = self._gather_biases((*weights.inner_bias, weights.outer_bias), "forward")
        first, *others = self.tiles(lines)
        projected, inner = self._gather_inner(lines[first], weights, inner_biases, "forward", weights.outer)
        out = lines.new_empty((lines.shape[0], weights.outer.shape[0] * self.group.size()))
        hidden = self.activate(projected)
        del projected
        out[first], outer = self._gather(hidden, weights.outer, outer_bias, "forward", following=self._following)
        for tile in others:
            del hidden  # not beside the next one
            hidden = self.activate(_project(lines[tile], inner, inner_biases))
            out[tile] = _linear(hidden, outer, outer_bias)
        return out

    def backward(self, grad: Tensor, lines: Tensor, weights: _Weights, needed: _Needed) -> tuple[Tensor, list[Any]]:
        """Gathers each weight once more, and reduces each gradient once."""
        inner_biases = self._gather_biases(weights.inner_bias, "backward")
        first, *others = self.tiles(lines)
        projected, inner = self._gather_inner(lines[first], weights, inner_biases, "backward", weights.outer)
        d_hidden, outer = self._gather(grad[first], weights.outer, None, "backward", transposed=True)
        whole = [*inner, *inner_biases, outer, _like_bias(weights.outer_bias, outer)]
        sums = GradientSums(whole, needed.parameters, accumulator_dtype(lines.dtype))
        dx = torch.empty_like(lines)
        self._tile(grad[first], lines[first], projected, d_hidden, inner, sums, dx[first])
        del projected, d_hidden
        for tile in others:
            again = _project(lines[tile], inner, inner_biases)
            self._tile(grad[tile], lines[tile], again, grad[tile] @ outer, inner, sums, dx[tile])
            del again
        del inner, outer, whole
        return dx, [self._reduce(sums, index, own) for index, own in enumerate(weights.flat())]

    def _tile(
        self,
        grad: Tensor,
        lines: Tensor,
        projected: Sequence[Tensor],
        d_hidden: Tensor,
        inner: Sequence[Tensor],
        sums: GradientSums,
        dx: Tensor,
    ) -> None:
        count = len(inner)
        hidden, back = self.activated(projected)
        sums.product(2 * count, grad, hidden)
        sums.lines(2 * count + 1, grad)
        del hidden
        for index, (d_projected, weight) in enumerate(zip(back(d_hidden), inner, strict=True)):
            if index == 0:
                torch.mm(d_projected, weight, out=dx)
            else:
                torch.addmm(dx, d_projected, weight, out=dx)
            sums.product(index, d_projected, lines)
            sums.lines(count + index, d_projected)

    def _gather_inner(
        self, lines: Tensor, weights: _Weights, biases: Sequence[Tensor | None], phase: str, following: Shards
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        projected, inner = [], []
        for shard, bias, after in zip(weights.inner, biases, (*weights.inner[1:], following), strict=True):
            product, whole = self._gather(lines, shard, bias, phase, following=after)
            projected.append(product)
            inner.append(whole)
        return tuple(projected), inner

    def _gather(
        self, lines: Tensor, shard: Tensor, bias: Tensor | None, phase: str, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return gathered_product(
            lines, shard, bias, group=self.group, config=self.config, operator=_OPERATOR, phase=phase, **options
        )

    def _gather_biases(self, shards: Sequence[Tensor | None], phase: Any) -> list[Tensor | None]:
        settings: Any = {"operator": _OPERATOR, "phase": phase, "config": self.config, "keeps_ahead": True}
        return [None if shard is None else all_gather(shard, self.group, **settings) for shard in shards]

    def _reduce(self, sums: GradientSums, index: int, own: Tensor | None) -> Tensor | None:
        """This rank's rows of a gradient: a weight's travels in its own type, a bias's in the accumulator's."""
        total, sums.totals[index] = sums.totals[index], None
        if total is None or own is None:
            return None
        sent = total if own.ndim == 1 else total.to(own.dtype)
        part = reduce_scatter(
            sent, self.group, operator=_OPERATOR, phase="backward", config=self.config, keeps_ahead=True
        )
        return part.to(own.dtype)


class TensorParallelWeights(TiledNetwork):
    """Column-parallel gate and up, row-parallel down.

    Args:
        cut: whether tokens are cut over the ranks outside of the network (TP-SP), or whole on all of them (TP).
    """

    def __init__(self, *args: Any, cut: bool) -> None:
        super().__init__(*args)
        self._cut = cut
        # A tile's gathered input is small, and is kept from its recomputation to its gradient.
        self._kept = dataclasses.replace(self.config, gathered="save")

    def forward(self, lines: Tensor, weights: _Weights) -> Tensor:
        """Each tile as without tiles."""
        out = lines.new_empty((lines.shape[0], weights.outer.shape[0]))
        for tile in self.tiles(lines):
            hidden = self.activate(self._project(lines[tile], weights, self.config))
            if self._cut:
                out[tile] = ops.linear_reduce_scatter(
                    hidden, weights.outer, weights.outer_bias, group=self.group, dim=0, config=self.config
                )
            else:
                out[tile] = ops.linear_all_reduce(
                    hidden, weights.outer, weights.outer_bias, group=self.group, config=self.config
                )
            del hidden  # not beside the next one
        return out

    def _project(self, lines: Tensor, weights: _Weights, config: OverlapConfig) -> tuple[Tensor, ...]:
        biases = None if all(bias is None for bias in weights.inner_bias) else weights.inner_bias
        if self._cut:
            return ops.all_gather_linear(lines, weights.inner, biases, group=self.group, dim=0, config=config)
        return ops.column_parallel_linear(lines, weights.inner, biases, group=self.group, config=config)

    def backward(self, grad: Tensor, lines: Tensor, weights: _Weights, needed: _Needed) -> tuple[Tensor, list[Any]]:
        """Each tile's intermediate again, then its gradients; what down gave is not computed again."""
        sums = GradientSums(weights.flat(), needed.parameters, accumulator_dtype(lines.dtype))
        dx, count = torch.empty_like(lines), len(weights.inner)
        wanted = [index for index in range(2 * count) if needed.parameters[index]]
        for tile in self.tiles(lines):
            x = lines[tile].detach().requires_grad_(needed.x)
            leaves = [
                None if own is None else own.detach().requires_grad_(one)
                for own, one in zip(weights.flat(), needed.parameters, strict=True)
            ]
            with torch.enable_grad():
                projected = self._project(x, _Weights.of(leaves), self._kept)
            hidden, back = self.activated(projected)
            d_hidden, *d_outer = self._outer_backward(grad[tile], hidden, weights.outer, needed.parameters[2 * count :])
            del hidden
            sums.add(2 * count, d_outer[0])
            sums.add(2 * count + 1, d_outer[1])
            del d_outer
            inputs = [*([x] if needed.x else []), *(leaves[index] for index in wanted)]
            if inputs:
                found = list(torch.autograd.grad(projected, inputs, back(d_hidden)))  # type: ignore[arg-type]
                if needed.x:
                    dx[tile] = found.pop(0)
                for index in wanted:
                    sums.add(index, found.pop(0))
            del projected, back, d_hidden
        return dx, sums.results()

    def _outer_backward(
        self, grad: Tensor, hidden: Tensor, weight: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor, ...]:
        # The operators' own backward: calling them would send what down gives once more.
        if self._cut:
            settings = (self.group.group_name, 0, self.config.key())
            return torch.ops.odysseus.linear_reduce_scatter_backward(grad, hidden, weight, *settings, True, *needed)
        return torch.ops.odysseus.linear_all_reduce_backward(grad, hidden, weight, True, *needed)


@torch.compiler.disable  # a graph that is captured is cut here
def tiled(network: TiledNetwork, x: Tensor, parameters: Sequence[Tensor | None]) -> Tensor:
    """The network of ``x`` [..., d], differentiable; parameters as [inner weights, inner biases, weight, bias] of down.

    Within ``torch.autocast`` inputs and weights are what linear layers would make of them.
    """
    x, *parameters = under_autocast(x.device, x, *parameters)
    found: list[Any] = []
    kept = _Keep.apply(found, x.reshape(-1, x.shape[-1]), *parameters)
    y: Tensor = _Tiled.apply(network, found[0], kept, *parameters)
    return y.view(x.shape)


class _Keep(torch.autograd.Function):
    """Saves what :class:`_Tiled` needs, before that computes anything.

    A checkpoint ends its recomputation once everything that was saved is there again; saved by :class:`_Tiled` itself,
    that would be after the whole network had run.

    Shapes: lines [rows, d].

    forward: the lines themselves
    gradient: the same
    """

    @staticmethod
    def forward(ctx: Any, found: list[Any], lines: Tensor, *parameters: Tensor | None) -> Tensor:
        """Returns the lines, sharing memory; puts itself into ``found``."""
        ctx.save_for_backward(lines, *parameters)
        ctx.count = len(parameters)
        found.append(ctx)
        return lines.view_as(lines)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        """Passes the gradient on; those of the parameters come from :class:`_Tiled`."""
        return None, grad_outputs[0], *[None] * ctx.count


class _Tiled(torch.autograd.Function):
    """The network, tile by tile.

    Shapes: lines and result [rows, d].

    forward: y = down(activation(gate(lines)) * up(lines)), or down(activation(up(lines)))
    gradients: of lines and all parameters, from the same computed again
    """

    @staticmethod
    def forward(ctx: Any, network: TiledNetwork, kept: Any, lines: Tensor, *parameters: Tensor | None) -> Tensor:
        """Returns y."""
        ctx.network, ctx.source = network, kept
        with torch.autocast(lines.device.type, enabled=False):
            return network.forward(lines.contiguous(), _Weights.of(parameters))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        """Returns gradients of lines and parameters."""
        # Read once: a checkpoint computes again what is asked for, and gives it once.
        lines, *parameters = ctx.source.saved_tensors
        needed = _Needed(ctx.needs_input_grad[2], tuple(ctx.needs_input_grad[3:]))
        with torch.no_grad(), torch.autocast(lines.device.type, enabled=False):
            dx, gradients = ctx.network.backward(
                grad_outputs[0].contiguous(), lines.detach().contiguous(), _Weights.of(parameters), needed
            )
        results = None, None, dx if needed.x else None, *gradients
        if not torch.is_grad_enabled():
            return results
        return not_differentiable("a feed-forward network in tiles", results, (*grad_outputs, lines, *parameters))


def _project(lines: Tensor, inner: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(_linear(lines, weight, bias) for weight, bias in zip(inner, biases, strict=True))


def _linear(lines: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(lines, weight, bias)


def _like_bias(shard: Tensor | None, weight: Tensor) -> Tensor | None:
    """A bias as long as the whole one; only its sizes are used."""
    return None if shard is None else shard.new_empty(weight.shape[0])
