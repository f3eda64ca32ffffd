"""What is measured on one GPU whose peers are emulated, as data: shapes, links, and the figures that must be reached.

Letters as in ``cases.py``.  A case is one operator in one phase over one emulated link; its sizes are what one of N
ranks passes to the operator.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Literal

__all__ = [
    "DEFAULT_LINKS",
    "JUDGED_ROWS",
    "KERNEL_TARGETS",
    "TARGETS",
    "WORLD",
    "EmulatedCase",
    "EmulatedTarget",
    "KernelTarget",
    "gather_shapes",
    "make_emulated_cases",
]

Operator = Literal["all_gather_linear", "linear_reduce_scatter"]
PhaseName = Literal["forward", "backward"]

WORLD = 8
DEFAULT_LINKS = ("paced:80", "pcie", "paced:450")
JUDGED_ROWS = 4096
"""Rows of a chunk from which on limits hold: the long-sequence case that the operators are for."""
ITEMSIZE = 2  # bfloat16


@dataclasses.dataclass(frozen=True)
class EmulatedCase:
    """One row.

    Attributes:
        label: the models that have this shape.
        operator, phase: what is timed; ``"backward"`` is the backward pass alone, with all gradients.
        tokens: L, the whole sequence.
        inner, outer: input and output features as this rank has them: K and n of all_gather_linear, k and n of
            linear_reduce_scatter.
        link: name of the emulated link, see ``odysseus_kernels.testing.virtual_devices.link_of``.
        world: N.
    """

    label: str
    operator: Operator
    phase: PhaseName
    tokens: int
    inner: int
    outer: int
    link: str
    world: int = WORLD

    @property
    def rows(self) -> int:
        """Rows of a chunk, L/N."""
        return self.tokens // self.world

    @property
    def judged(self) -> bool:
        """Whether limits hold for this row."""
        return self.rows >= JUDGED_ROWS

    @property
    def shape(self) -> str:
        return f"L{self.tokens} {self.inner}>{self.outer}"

    @property
    def name(self) -> str:
        """All of it, which ``--cases`` is matched with."""
        return f"{self.operator} {self.phase} {self.label} {self.shape} {self.link}"

    @property
    def flops(self) -> int:
        """Floating-point operations of this rank's products: 2·L·inner·outer, twice that in backward."""
        return 2 * self.tokens * self.inner * self.outer * (1 if self.phase == "forward" else 2)

    @property
    def width(self) -> int:
        """Features of what travels."""
        return self.inner if self.operator == "all_gather_linear" else self.outer

    @property
    def gathers(self) -> bool:
        return self.phase == "backward" or self.operator == "all_gather_linear"

    @property
    def scatters(self) -> bool:
        return (self.operator == "linear_reduce_scatter") == (self.phase == "forward")

    @property
    def chunk_bytes(self) -> int:
        return self.rows * self.width * ITEMSIZE

    @property
    def link_bytes(self) -> int:
        """Bytes that this rank's copies move over the link: (N-1) chunks for each gather and each scatter."""
        return (self.world - 1) * self.chunk_bytes * (self.gathers + self.scatters)


@dataclasses.dataclass(frozen=True)
class _Shape:
    label: str
    operator: Operator
    inner: int
    outer: int


def gather_shapes(world: int) -> list[tuple[str, int, int]]:
    """(label, K, n) of Q, K and V of Llama models as one product behind a gather, split over ``world`` ranks."""
    models = (("Llama-2-7B", 4096, 4096), ("Llama-3-8B", 4096, 1024), ("Llama-3-70B", 8192, 1024))
    return [(f"{label} qkv", hidden, (hidden + 2 * key_value) // world) for label, hidden, key_value in models]


def _shapes(world: int) -> Iterator[_Shape]:
    """Attention's projections: Q, K and V behind a gather, the output before a sum."""
    for label, inner, outer in gather_shapes(world):
        yield _Shape(label, "all_gather_linear", inner, outer)
    for label, hidden in (("Llama-2-7B, 3-8B", 4096), ("Llama-3-70B", 8192)):
        yield _Shape(f"{label} out", "linear_reduce_scatter", hidden // world, hidden)


def make_emulated_cases(
    links: Sequence[str] = DEFAULT_LINKS, pattern: str = "", *, quick: bool = False, world: int = WORLD
) -> list[EmulatedCase]:
    """The rows of a run, the most telling first: should time run out, the last are missing.

    Args:
        links: names of emulated links.
        pattern: a regular expression; only rows whose :attr:`EmulatedCase.name` it is found in are kept.
        quick: forward and backward of one sequence length.
        world: N.

    Raises:
        ValueError: the pattern is not an expression, or is found in no row.
    """
    lengths = (4096 * world,) if quick else (4096 * world, 8192 * world, 1024 * world)
    rows = [
        EmulatedCase(shape.label, shape.operator, phase, tokens, shape.inner, shape.outer, link, world)
        for tokens in lengths
        for link in links
        for phase in ("forward", "backward")
        for shape in _shapes(world)
    ]
    try:
        kept = [case for case in rows if re.search(pattern, case.name)]
    except re.error as error:
        raise ValueError(f"--cases: {pattern!r} is not a regular expression: {error}") from None
    if not kept:
        names = "\n  ".join(case.name for case in rows)
        raise ValueError(f"--cases: {pattern!r} is found in no row; the rows are\n  {names}")
    return kept


@dataclasses.dataclass(frozen=True)
class EmulatedTarget:
    """What every judged row of an operator's phase must reach.

    Attributes:
        figure: ``"fused / limit"`` or ``"host / fused"``, at most ``limit``, or ``"hidden"``, at least ``limit``.
    """

    operator: Operator
    phase: PhaseName
    figure: Literal["fused / limit", "hidden", "host / fused"]
    limit: float

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.figure != "hidden"

    def reached(self, measured: float) -> bool:
        return measured <= self.limit if self.at_most else measured >= self.limit


TARGETS = (
    EmulatedTarget("all_gather_linear", "forward", "fused / limit", 1.06),
    EmulatedTarget("all_gather_linear", "forward", "hidden", 0.95),
    EmulatedTarget("linear_reduce_scatter", "forward", "fused / limit", 1.08),
    EmulatedTarget("linear_reduce_scatter", "forward", "hidden", 0.92),
    EmulatedTarget("all_gather_linear", "backward", "fused / limit", 1.10),
    EmulatedTarget("linear_reduce_scatter", "backward", "fused / limit", 1.10),
    # A host that enqueues more slowly than the device works leaves the device idle.
    EmulatedTarget("all_gather_linear", "forward", "host / fused", 1.0),
    EmulatedTarget("linear_reduce_scatter", "forward", "host / fused", 1.0),
    EmulatedTarget("all_gather_linear", "backward", "host / fused", 1.0),
    EmulatedTarget("linear_reduce_scatter", "backward", "host / fused", 1.0),
)


@dataclasses.dataclass(frozen=True)
class KernelTarget:
    """What every row of a kernel must reach: at least ``limit`` of the library's speed."""

    kernel: str
    what: str
    limit: float


KERNEL_TARGETS = (
    KernelTarget("gather_matmul", "speed over cuBLAS, all chunks there", 0.95),
    KernelTarget("reduce", "bandwidth over a copy's", 0.85),
)
