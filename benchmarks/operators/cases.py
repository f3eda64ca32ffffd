"""What is measured, as data: one table of shapes for time and memory, and the figures that must be reached.

Letters: L tokens of the whole sequence, N ranks, d hidden size, dk key/value width, i FFN width.  Sizes in a
:class:`Case` are what one rank passes to an operator, except ``tokens``, which is always L.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

from benchmarks.common.cases import CONTRACT, Size, nearest_multiple

__all__ = ["TARGETS", "Case", "ModelShape", "Operator", "Target", "make_cases"]

Operator = Literal["all_gather_linear", "linear_reduce_scatter", "zero3_linear"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: an operator, the sizes that a rank passes to it, and whether backward is part of it.

    Attributes:
        label: where the shape comes from.
        operator: name of the operator.
        tokens: L. The operators see L/N rows (input of all_gather_linear, output of linear_reduce_scatter,
            both of zero3_linear) or all L of them.
        inner: input features: of the layer (all_gather_linear, zero3_linear) or of this rank (linear_reduce_scatter).
        outer: output features of each projection that is fed by one gather: of this rank (all_gather_linear) or of
            the layer (the other two, which have one projection).
        backward: whether all gradients are computed too.
    """

    label: str
    operator: Operator
    tokens: int
    inner: int
    outer: tuple[int, ...]
    backward: bool

    @property
    def part(self) -> str:
        """``"forward"`` or ``"forward+backward"``."""
        return "forward+backward" if self.backward else "forward"

    @property
    def shape(self) -> str:
        """Sizes in words, such as ``L8192 1024>768``."""
        return f"L{self.tokens} {self.inner}>{'+'.join(map(str, self.outer))}"

    @property
    def name(self) -> str:
        """All of it, which ``--cases`` is matched with."""
        return f"{self.operator} {self.label} {self.shape} {self.part}"

    def flops(self, world_size: int) -> int:
        """Floating-point operations of one rank's products: 2·rows·inner·outer, three times that with backward."""
        rows = self.tokens // world_size if self.operator == "zero3_linear" else self.tokens
        return 2 * rows * self.inner * sum(self.outer) * (3 if self.backward else 1)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Widths of a model's layers."""

    name: str
    hidden: int
    key_value: int
    intermediate: int

    def layers(self, tokens: int, divisor: int, world_size: int) -> Iterator[Case]:
        """The layer's linears as Odysseus runs them, forward only, widths divided by ``divisor``."""
        d, dk, i = (nearest_multiple(w // divisor, world_size) for w in self.widths)
        scale = f"/{divisor}" if divisor > 1 else ""
        n = world_size
        yield Case(f"{self.name}{scale} qkv", "all_gather_linear", tokens, d, (d // n, dk // n, dk // n), False)
        yield Case(f"{self.name}{scale} out", "linear_reduce_scatter", tokens, d // n, (d,), False)
        yield Case(f"{self.name}{scale} up", "zero3_linear", tokens, d, (i,), False)
        yield Case(f"{self.name}{scale} down", "zero3_linear", tokens, i, (d,), False)

    @property
    def widths(self) -> tuple[int, int, int]:
        """(d, dk, i)"""
        return self.hidden, self.key_value, self.intermediate


MODELS = (
    ModelShape("Llama-2-7B", hidden=4096, key_value=4096, intermediate=11008),
    ModelShape("Llama-3-8B", hidden=4096, key_value=1024, intermediate=14336),
)


@dataclasses.dataclass(frozen=True)
class _Scale:
    forward_tokens: int
    backward_tokens: int
    model_tokens: int
    divisor: int
    models: int


_SCALES: dict[Size, _Scale] = {
    "quick": _Scale(forward_tokens=2048, backward_tokens=512, model_tokens=512, divisor=8, models=1),
    "default": _Scale(forward_tokens=8192, backward_tokens=4096, model_tokens=2048, divisor=8, models=2),
    "full": _Scale(forward_tokens=8192, backward_tokens=8192, model_tokens=8192, divisor=1, models=2),
}


def make_cases(world_size: int, size: Size = "default", pattern: str = "") -> list[Case]:
    """The rows of a run, by operator; those of the contract come first.

    Args:
        world_size: N; lengths and widths become multiples of it.
        size: ``"default"`` divides the models' widths so that a row takes seconds on two cores, ``"full"`` leaves
            them, ``"quick"`` shortens everything.
        pattern: a regular expression; only rows whose :attr:`Case.name` it is found in are kept.

    Raises:
        ValueError: if the pattern is not an expression, or is found in no row.
    """
    scale = _SCALES[size]
    long, short = (nearest_multiple(t, world_size) for t in (scale.forward_tokens, scale.backward_tokens))
    rows = []
    for tokens, backward in ((long, False), (short, True)):
        # What the contract fixes for the first two is L and each rank's features; for zero3_linear it is L/N = 4096,
        # which is the same L at the two ranks that the contract is for.
        rows.append(Case(CONTRACT, "all_gather_linear", tokens, 1024, (768,), backward))
        rows.append(Case(CONTRACT, "linear_reduce_scatter", tokens, 1024, (2048,), backward))
        rows.append(Case(CONTRACT, "zero3_linear", tokens, 1024, (nearest_multiple(2816, world_size),), backward))
    for model in MODELS[: scale.models]:
        for case in model.layers(nearest_multiple(scale.model_tokens, world_size), scale.divisor, world_size):
            rows += [case, dataclasses.replace(case, backward=True)]
    order = {"all_gather_linear": 0, "linear_reduce_scatter": 1, "zero3_linear": 2}
    rows.sort(key=lambda case: order[case.operator])  # stable: the contract's rows stay first
    try:
        kept = [case for case in rows if re.search(pattern, case.name)]
    except re.error as error:
        raise ValueError(f"--cases: {pattern!r} is not a regular expression: {error}") from None
    if not kept:
        names = "\n  ".join(case.name for case in rows)
        raise ValueError(f"--cases: {pattern!r} is found in no row; the rows are\n  {names}")
    return kept


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio of two variants' times that one of the contract's rows must reach."""

    operator: Operator
    backward: bool
    variant: str
    base: str
    limit: float


_FUSED, _GLOO, _GEMM = "fused symmetric", "unfused collective", "gemm"

TARGETS = (
    Target("all_gather_linear", False, _FUSED, _GEMM, 1.06),
    Target("all_gather_linear", False, _FUSED, _GLOO, 0.80),
    Target("linear_reduce_scatter", False, _FUSED, _GEMM, 1.08),
    Target("linear_reduce_scatter", False, _FUSED, _GLOO, 0.80),
    Target("all_gather_linear", True, _FUSED, _GEMM, 1.12),
    Target("linear_reduce_scatter", True, _FUSED, _GEMM, 1.12),
    Target("zero3_linear", True, _FUSED, _GEMM, 1.12),
)
