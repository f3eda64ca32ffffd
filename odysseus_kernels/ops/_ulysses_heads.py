"""What a block of Ulysses' attention gives, makes and computes at each of its stages, forward and backward.

In G + 3 stages, of which each is one exchange (``comm/exchange.py``), a group of heads goes through four:

===== ============================================ =============================================================
stage forward                                      backward
===== ============================================ =============================================================
g     weights' rows of group g arrive; queries,    the output weight's columns arrive; gradients of attention's
      keys and values of all tokens are made       output are made, and of these columns
g + 1 attention                                    attention
g + 2 its output goes back to the tokens' ranks    gradients of queries, keys and values go back
g + 3 the output weight's columns arrive, and      weights' rows arrive; the input's gradient is added up, those
      their products are added up                  of these rows are made
===== ============================================ =============================================================

So each stage works on up to four groups.  All that arrives before a rank is visited are weights, of which the first
rank's were sent ahead in the stage before: no product waits for attention's output, which travels for a whole stage.
Nothing here communicates: ``ops/_ulysses_block.py`` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.ops._heads import tokens_of_ranks
from odysseus_kernels.ops._products import ProductSum, multiply, multiply_lines, project
from odysseus_kernels.ops._rotation import HeadNorm, rotate, rotate_backward
from odysseus_kernels.ops._ulysses_groups import HeadAttention, HeadGroups, Unit

__all__ = ["BackwardHeads", "ForwardHeads", "Needed"]

_STAGES = 4  # of a group


class _Stages:
    """Which groups are where at a stage."""

    def __init__(self, groups: HeadGroups) -> None:
        self._groups = groups

    @property
    def stages(self) -> int:
        """Their number."""
        return self._groups.count + _STAGES - 1

    def _at(self, stage: int, step: int) -> Iterator[int]:
        """The group that is at its ``step`` at ``stage``, if there is one."""
        if 0 <= stage - step < self._groups.count:
            yield stage - step


class ForwardHeads(_Stages):
    """Forward of one block on one rank.

    Attributes:
        q, k, v, out: [B, L, H * D] of this rank's heads, queries and keys normalized and rotated.
        lse: [B, H, L], log-sum-exp of the scores, wide.
        raw: queries and keys before their norms, or two empty tensors.
        kept: [G, N, B, L/N, w], for each group and rank the output of that rank's heads for this rank's tokens; empty
            unless it is kept for the weight's gradient.
    """

    def __init__(self, x: Tensor, groups: HeadGroups, *, normed: bool, keep: bool) -> None:
        super().__init__(groups)
        batch, rows, _ = x.shape
        length, wide = rows * groups.world, accumulator_dtype(x.dtype)
        self.q, self.k, self.v = (x.new_empty((batch, length, n)) for n in (groups.queries, groups.keys, groups.keys))
        self.out = torch.empty_like(self.q)
        self.lse = x.new_empty((batch, groups.queries // groups.head_dim, length), dtype=wide)
        self.raw = [x.new_empty((batch, length, n) if normed else (0,)) for n in (groups.queries, groups.keys)]
        part = (groups.world, batch, rows, groups.widths[0])
        self.kept = x.new_empty((groups.count, *part) if keep else (0,))
        self._part = part

    @property
    def results(self) -> list[Tensor]:
        """What backward needs."""
        return [self.q, self.k, self.v, self.out, self.lse, *self.raw, self.kept]

    def prepare(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        output_weight: Tensor,
        rotation: Sequence[Tensor],
        norms: Sequence[HeadNorm],
        attention: HeadAttention,
    ) -> None:
        """What the methods below compute with."""
        self._x, self._weights, self._biases, self._output_weight = x, weights, biases, output_weight
        self._rotation, self._norms, self._attention = rotation, norms, attention

    @property
    def described(self) -> str:
        """Which biases there are, which shapes alone do not say; must be equal on all ranks."""
        present = [index for index, bias in enumerate(self._biases) if bias is not None]
        return f", biases {present}" if present else ""

    def restart(self) -> None:
        """Begins the output's sum."""
        self._total = ProductSum(self._x, self._x.shape[:2].numel(), self._output_weight.shape[0])
        self._parts: dict[int, Tensor] = {}

    def shared(self, stage: int) -> tuple[Tensor, ...]:
        """What every rank is given of this one's weights and biases."""
        found: list[Tensor] = []
        for group in self._at(stage, 0):
            places = list(zip(self._weights, self._biases, self._groups.features(group), strict=True))
            found += [weight[rows] for weight, _, rows in places]
            found += [bias[rows] for _, bias, rows in places if bias is not None]
        for group in self._at(stage, 3):
            found.append(self._output_weight[:, self._groups.features(group)[0]].contiguous())
        return tuple(found)

    def exchange(self, stage: int, shared: tuple[Tensor, ...]) -> Exchange:
        """What is given, made and computed at a stage, attention aside."""
        world, received = self._groups.world, list[Tensor]()
        for group in self._at(stage, 0):
            projected = (*self.raw, self.v) if self._norms else (self.q, self.k, self.v)
            columns = self._groups.features(group)
            received += [tokens_of_ranks(one, world)[..., own] for one, own in zip(projected, columns, strict=True)]
        for group in self._at(stage, 2):
            part = self.kept[group] if self.kept.numel() else self._x.new_empty(self._part)
            self._parts[group] = part
            received.append(part)

        def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            gets, puts = iter(given), iter(made)
            for _ in self._at(stage, 0):
                weights = [next(gets) for _ in self._weights]
                biases = [None if bias is None else next(gets) for bias in self._biases]
                for weight, bias in zip(weights, biases, strict=True):
                    project(next(puts), self._x, weight, bias)
            for group in self._at(stage, 2):
                columns = self._groups.features(group)[0]
                next(puts).copy_(tokens_of_ranks(self.out, world)[rank][..., columns])
            for group in self._at(stage, 3):
                part = self._parts[group][rank]
                self._total.add(part.view(-1, part.shape[-1]), next(gets).t())

        return Exchange(visit, shared, received=tuple(received))

    def units(self, stage: int) -> list[Callable[[], None]]:
        """Attention at a stage."""
        length = self.q.shape[1]
        return [
            functools.partial(self._attend, unit)
            for group in self._at(stage, 1)
            for unit in self._groups.units(group, length)
        ]

    def end(self, stage: int) -> None:
        """Lets go of what no later stage needs."""
        for group in self._at(stage, 3):
            del self._parts[group]

    def output(self, bias: Tensor | None) -> Tensor:
        """y [B, L/N, n], with the whole ``bias`` [n]."""
        return self._total.total(bias).view(*self._x.shape[:2], -1)

    def _attend(self, unit: Unit) -> None:
        if unit.first:
            self._turn(unit)
        q, k, v, out = map(self._groups.heads, (self.q, self.k, self.v, self.out))
        own, kv_heads, rows = unit.heads, unit.kv_heads, unit.rows
        self._attention.of(own).forward(
            rows.start, rows.stop, q[:, own], k[:, kv_heads], v[:, kv_heads], out[:, own], self.lse[:, own]
        )

    def _turn(self, unit: Unit) -> None:
        """Norms and rotation of a unit's heads."""
        if not (self._norms or self._rotation):
            return
        for index, (done, own) in enumerate(zip((self.q, self.k), (unit.heads, unit.kv_heads), strict=True)):
            heads = self._groups.split(self.raw[index] if self._norms else done)[:, :, own]
            if self._norms:
                heads = self._norms[index].forward(heads)
            if self._rotation:
                heads = rotate(heads, *self._rotation)
            self._groups.split(done)[:, :, own] = heads


class Needed:
    """Which gradients are needed.

    Attributes:
        input: that of x.
        weights, biases: those of the three projections.
        output: that of the output weight.
        norms: those of the heads' norms.
        used: projections whose gradients anything depends on that is sent back.
        attention: whether attention's are.
    """

    def __init__(
        self, *, input: bool, weights: Sequence[bool], biases: Sequence[bool], output: bool, norms: bool
    ) -> None:
        self.input, self.weights, self.biases, self.output, self.norms = input, weights, biases, output, norms
        self.used = [i for i in range(3) if input or weights[i] or biases[i]]
        self.attention = bool(self.used) or norms


class BackwardHeads(_Stages):
    """Backward of one block on one rank."""

    def __init__(
        self,
        grad: Tensor,
        x: Tensor,
        weights: Sequence[Tensor],
        output_weight: Tensor,
        rotation: Sequence[Tensor],
        norms: Sequence[HeadNorm],
        attention: HeadAttention,
        saved: Sequence[Tensor],
        groups: HeadGroups,
        needed: Needed,
    ) -> None:
        super().__init__(groups)
        self._q, self._k, self._v, self._out, self._lse, *self._raw, self._kept = saved
        self._grad, self._x, self._needed = grad, x, needed
        self._weights, self._output_weight = weights, output_weight
        self._rotation, self._norms, self._attention = rotation, norms, attention
        self._lines = grad.view(-1, grad.shape[-1])
        self._inputs = x.view(-1, x.shape[-1])

    @property
    def described(self) -> str:
        """Which gradients are made for others, which shapes alone do not say; must be equal on all ranks."""
        needed = self._needed
        parts = ["x"] if needed.input else []
        for name, which in (("weights", needed.weights), ("biases", needed.biases)):
            wanted = [index for index, one in enumerate(which) if one]
            parts += [f"{name} {wanted}"] if wanted else []
        return f", gradients of {', '.join(parts)}" if parts else ""

    def restart(self) -> None:
        """Begins all sums."""
        x, needed = self._x, self._needed
        wide = accumulator_dtype(x.dtype)
        self._dx = ProductSum(x, self._inputs.shape[0], x.shape[-1]) if needed.input else None
        self._dweights = [
            w.new_empty(w.shape if wanted else (0,)) for w, wanted in zip(self._weights, needed.weights, strict=True)
        ]
        # The sum over tokens and ranks stays in the accumulator's type until the end.
        self._dbiases = [
            w.new_empty(w.shape[:1] if wanted else (0,), dtype=wide)
            for w, wanted in zip(self._weights, needed.biases, strict=True)
        ]
        output = self._output_weight
        self._doutput = output.new_empty(output.shape if needed.output else (0,))
        for norm in self._norms:
            norm.restart()
        # By group: of columns of the output weight; of attention's output; of queries, keys and values, of this rank's
        # heads for all tokens; the same of all heads for this rank's tokens.
        self._columns: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._projected: dict[int, list[Tensor]] = {}
        self._parts: dict[int, list[Tensor]] = {}

    def shared(self, stage: int) -> tuple[Tensor, ...]:
        """What every rank is given of this one's weights."""
        found: list[Tensor] = []
        for group in self._at(stage, 0):
            if self._needed.attention:
                found.append(self._output_weight[:, self._groups.features(group)[0]].contiguous())
        for group in self._at(stage, 3):
            if self._needed.input:
                found += [w[rows] for w, rows in zip(self._weights, self._groups.features(group), strict=True)]
        return tuple(found)

    def exchange(self, stage: int, shared: tuple[Tensor, ...]) -> Exchange:
        """What is given, made and computed at a stage, attention aside."""
        needed, world = self._needed, self._groups.world
        batch, length, _ = self._q.shape
        sums, received = list[Tensor](), list[Tensor]()
        for group in self._at(stage, 0):
            width = self._groups.widths[0]
            if needed.output:
                self._columns[group] = self._output_weight.new_empty((self._lines.shape[1], width))
                sums.append(self._columns[group])
            if needed.attention:
                self._outputs[group] = self._x.new_empty((batch, length, width))
                received.append(tokens_of_ranks(self._outputs[group], world))
        for group in self._at(stage, 2):
            shape = (world, batch, length // world)
            self._parts[group] = [self._x.new_empty((*shape, self._groups.widths[i])) for i in needed.used]
            received += self._parts[group]
        for group in self._at(stage, 3):
            for i in needed.used:
                rows = self._groups.features(group)[i]
                sums += [all_rows[rows] for all_rows in (self._dweights[i], self._dbiases[i]) if all_rows.numel()]

        def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            gets, adds, puts = iter(given), iter(made[: len(sums)]), iter(made[len(sums) :])
            for group in self._at(stage, 0):
                if needed.output:
                    part = self._kept[group, rank]
                    multiply_lines(next(adds), self._lines.t(), part.view(-1, part.shape[-1]))
                if needed.attention:
                    multiply(next(puts), self._grad, next(gets))
            for group in self._at(stage, 2):
                for i in needed.used:
                    next(puts).copy_(tokens_of_ranks(self._projected[group][i], world)[rank])
            for group in self._at(stage, 3):
                self._conclude(self._parts[group], rank, gets, adds)

        return Exchange(visit, shared, (), tuple(sums), tuple(received))

    def _conclude(self, parts: list[Tensor], rank: int, gets: Iterator[Tensor], adds: Iterator[Tensor]) -> None:
        """What the gradients of ``rank``'s heads for this rank's tokens contribute."""
        needed = self._needed
        for i, part in zip(needed.used, parts, strict=True):
            grad = part[rank].view(-1, part.shape[-1])
            if self._dx is not None:
                self._dx.add(grad, next(gets))
            if needed.weights[i]:
                multiply_lines(next(adds), grad.t(), self._inputs)
            if needed.biases[i]:
                torch.sum(grad, 0, dtype=self._dbiases[i].dtype, out=next(adds))

    def units(self, stage: int) -> list[Callable[[], None]]:
        """Attention at a stage."""
        if not self._needed.attention:
            return []
        return [
            functools.partial(self._attend, group, unit)
            for group in self._at(stage, 1)
            for unit in self._groups.units(group, self._q.shape[1])
        ]

    def end(self, stage: int) -> None:
        """Lets go of what no later stage needs."""
        for group in self._at(stage, 0):
            if self._needed.output:
                self._doutput[:, self._groups.features(group)[0]] = self._columns.pop(group)
        for group in self._at(stage, 1):
            self._outputs.pop(group, None)
        for group in self._at(stage, 2):
            self._projected.pop(group, None)
        for group in self._at(stage, 3):
            self._parts.pop(group, None)

    def gradients(self) -> list[Tensor]:
        """Of x, weights, biases, the output weight and norms; empty tensors where not needed."""
        x = self._x
        return [
            x.new_empty(0) if self._dx is None else self._dx.total().view(x.shape),
            *self._dweights,
            *(bias.to(x.dtype) for bias in self._dbiases),
            self._doutput,
            *(norm.weight_gradient() if self._needed.norms else x.new_empty(0) for norm in self._norms),
        ]

    def _attend(self, group: int, unit: Unit) -> None:
        groups, own, kv_heads, rows = self._groups, unit.heads, unit.kv_heads, unit.rows
        if group not in self._projected:
            like = (self._q, self._k, self._v)
            self._projected[group] = [
                one.new_empty((*one.shape[:2], width)) for one, width in zip(like, groups.widths, strict=True)
            ]
        q, k, v, out = map(groups.heads, (self._q, self._k, self._v, self._out))
        if unit.first:
            wide = accumulator_dtype(q.dtype)
            self._dk, self._dv = (torch.zeros_like(one[:, kv_heads], dtype=wide) for one in (k, v))
        first = groups.first_heads(group)[0]
        grad = groups.heads(self._outputs[group])[:, own.start - first : own.stop - first, rows]
        dq = self._attention.of(own).backward(
            rows.start, rows.stop, grad, q[:, own], k[:, kv_heads], v[:, kv_heads], out[:, own], self._lse[:, own],
            self._dk, self._dv,
        )  # fmt: skip
        self._turn_back(0, group, dq, own, rows)
        if unit.last:
            for number, total in ((1, self._dk), (2, self._dv)):
                self._turn_back(number, group, total, kv_heads, slice(0, q.shape[2]))
            del self._dk, self._dv

    def _turn_back(self, number: int, group: int, grad: Tensor, own: slice, rows: slice) -> None:
        """Gradients [B, h, n, D] of queries, keys or values, through rotation and norms."""
        heads = grad.transpose(1, 2)
        if number < 2 and self._rotation:
            heads = rotate_backward(heads, *(table[:, rows] for table in self._rotation))
        if number < 2 and self._norms:
            heads = self._norms[number].backward(heads, self._groups.split(self._raw[number])[:, rows, own])
        first = self._groups.first_heads(group)[number]
        into = self._groups.split(self._projected[group][number])
        into[:, rows, own.start - first : own.stop - first] = heads
