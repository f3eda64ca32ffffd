"""Which of all variants of the kernels tests compile by default: every pair of values, and what could fail alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from covering import cover

from benchmarks.device.compile import RESULT, Variant, described

_DESCRIBED = 8  # cells of a row of the table that say what was compiled; registers follow

# A variant that was recorded with fewer registers, of those that a thread may have, is not the first one to spill.
FULL = 15 / 16


def recorded_registers() -> dict[tuple[str, ...], int]:
    """What the table of all variants says, by what was compiled."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in RESULT.open() if line.startswith("| ")]
    return {tuple(row[:_DESCRIBED]): int(row[_DESCRIBED]) for row in rows if "".join(row[_DESCRIBED:][:1]).isdigit()}


def values_of(variant: Variant) -> tuple[Any, ...]:
    """The axes of which every two values meet: everything by which the machine code of two variants can differ."""
    types = (variant.dtype, variant.out)
    return (variant.kernel, variant.architecture, variant.config, types, variant.count, variant.deep)


def closest_to_spilling(variants: Sequence[Variant], registers: dict[tuple[str, ...], int]) -> list[Variant]:
    """Of each kernel, architecture and configuration the variant with most registers, if it has nearly all it may have.

    And every variant that the table does not know yet.
    """
    unknown = [one for one in variants if tuple(described(one)) not in registers]
    most: dict[tuple[Any, ...], Variant] = {}
    for one in variants:
        if one in unknown or registers[tuple(described(one))] < FULL * one.config.max_registers:
            continue
        best = most.setdefault((one.kernel, one.architecture, one.config), one)
        if registers[tuple(described(one))] > registers[tuple(described(best))]:
            most[one.kernel, one.architecture, one.config] = one
    return [*unknown, *most.values()]


def chosen(variants: Sequence[Variant], registers: dict[tuple[str, ...], int]) -> list[Variant]:
    """What is compiled by default, in the order of ``variants``."""
    axes = [list(dict.fromkeys(axis)) for axis in zip(*map(values_of, variants), strict=True)]

    def row(variant: Variant) -> tuple[int, ...]:
        return tuple(axis.index(value) for axis, value in zip(axes, values_of(variant), strict=True))

    rows = {row(variant): variant for variant in reversed(variants)}
    alone = closest_to_spilling(variants, registers)
    covered = {rows[tuple(found)] for found in cover(list(rows), map(row, alone))}
    return [variant for variant in variants if variant in covered or variant in alone]
