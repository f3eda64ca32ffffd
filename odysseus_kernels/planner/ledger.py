"""Bytes that one rank sends, added up collective by collective; what each costs is in formulas.py."""

from __future__ import annotations

from collections import Counter

__all__ = ["Ledger", "Traffic", "part_of"]

Traffic = dict[tuple[str, str, str], int]
"""Bytes that one rank sends by (phase, operator, collective), as :class:`~odysseus_kernels.CommRecorder` names them."""


class Ledger:
    """Adds up bytes; ``size`` is the bytes of an element."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes: Counter[tuple[str, str, str]] = Counter()

    def shard(self, phase: str, operator: str, collective: str, ranks: int, elements: int) -> None:
        """``elements`` of one rank's part, sent to each of the others or received from them."""
        if ranks > 1:
            self.bytes[phase, operator, collective] += (ranks - 1) * elements * self.size

    def all_reduce(self, phase: str, operator: str, ranks: int, elements: int) -> None:
        self.shard(phase, operator, "all_reduce", ranks, 2 * -(-elements // ranks))

    def replicated(self, ranks: int, elements: int) -> None:
        """The gradient of a parameter of which ``ranks`` ranks hold the same part."""
        self.all_reduce("backward", "replicated_parameter", ranks, elements)

    def zero3(self, operator: str, ranks: int, elements: int) -> None:
        """A weight of ``elements`` cut over ``ranks``: gathered twice, its gradient reduced once."""
        rows = part_of(elements, ranks)
        self.shard("forward", operator, "all_gather", ranks, rows)
        self.shard("backward", operator, "all_gather", ranks, rows)
        self.shard("backward", operator, "reduce_scatter", ranks, rows)

    def zero3_bias(self, operator: str, ranks: int, elements: int) -> None:
        """A bias that is cut like its ZeRO-3 weight: gathered once; its gradient travels in the accumulator's type."""
        rows = part_of(elements, ranks)
        self.shard("forward", operator, "all_gather", ranks, rows)
        if ranks > 1:
            self.bytes["backward", operator, "reduce_scatter"] += (ranks - 1) * rows * max(self.size, 4)

    def rename(self, operators: tuple[str, ...], name: str) -> None:
        """What ``operators`` have sent so far was sent by the one operator ``name``."""
        for phase, operator, collective in list(self.bytes):
            if operator in operators:
                self.bytes[phase, name, collective] += self.bytes.pop((phase, operator, collective))

    def result(self) -> Traffic:
        return dict(self.bytes)


def part_of(elements: int, ranks: int) -> int:
    """Elements of one rank's part; ValueError where the ranks do not divide them."""
    if elements % ranks:
        raise ValueError(f"expected a parameter whose {elements} elements {ranks} ranks divide")
    return elements // ranks
