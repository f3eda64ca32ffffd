"""The original's table of costs as it was published, as data, with what of it is wrong.

Symbols as there: L sequence length, d hidden size, i intermediate size, N ranks.  Its text says that "when the sequence
length L exceeds the intermediate hidden size i (L > i), Odysseus+ZeRO3 demonstrates lower communication cost compared
to TP-SP and Ulysses+ZeRO3".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["COLUMNS", "ORIGINAL", "STATEMENT", "OriginalRow", "split_measured"]

COLUMNS = (
    "Method",
    "Comm Activation",
    "Comm Volume",
    "Comm Gradient",
    "Comm Volume",
    "Mem Activation",
    "Mem Param/Grad",
)


@dataclasses.dataclass(frozen=True)
class OriginalRow:
    """One row of the published table.

    Attributes:
        strategy: what this project calls it.
        cells: as published, in the order of :data:`COLUMNS`.
        activations, weights: elements that the volumes claim, from (L, d, i).
        wrong: what of it the measured bytes refute.
    """

    strategy: str
    cells: tuple[str, ...]
    activations: Callable[[int, int, int], int]
    weights: Callable[[int, int, int], int]
    wrong: str


ORIGINAL = (
    OriginalRow(
        "tp",
        ("TP", "2AllReduce", "4O(Ld)", "0", "0", "full", "1/N"),
        lambda L, d, i: 4 * L * d,
        lambda L, d, i: 0,
        "counts forward only: backward has two all-reduces more, 8Ld in all",
    ),
    OriginalRow(
        "tp_sp",
        ("TP-SP", "4RS+4AG", "4O(Ld)", "0", "0", "1/N", "1/N"),
        lambda L, d, i: 4 * L * d,
        lambda L, d, i: 0,
        "the volume counts forward only, the collectives both passes: 4AG+4RS are 8Ld, and its own code keeps what was "
        "gathered, so its activations exceed 1/N; with 1/N backward gathers again, 6AG+4RS = 10Ld (the later table "
        "swaps these two)",
    ),
    OriginalRow(
        "ulysses",
        ("Ulysses+ZeRO3", "4All2All", "4O(Ld)", "AllReduce", "4O(d^2)+2O(di)", "1/N", "1/N"),
        lambda L, d, i: 4 * L * d,
        lambda L, d, i: 4 * d * d + 2 * d * i,
        "an all-to-all of a tensor sends 1/N of it: 8Ld/N in both passes; ZeRO-3 moves each weight three times (two "
        "gathers, one reduction), and a gated feed-forward network has three matrices",
    ),
    OriginalRow(
        "odysseus",
        ("Odysseus+ZeRO3", "2RS+2AG", "2O(Ld)", "AllReduce (FFN)", "2O(di)", "1/N", "1/N"),
        lambda L, d, i: 2 * L * d,
        lambda L, d, i: 2 * d * i,
        "counts forward only: 2AG+2RS are 4Ld with the gathered input saved, and 3AG+2RS = 5Ld with activations of 1/N "
        "(the later table has 3RS+2AG); ZeRO-3 moves each weight three times",
    ),
)

STATEMENT = (
    '"When L > i, Odysseus sends less than TP-SP and Ulysses" follows from neither volume: less than TP-SP from '
    "L > 1.8 i on (gated, re-gather); less than Ulysses only below a length, and where N is 4 or more no common model "
    "has a length where it beats both."
)

_WEIGHTS = ("zero3_linear", "replicated_parameter")
_ULYSSES = ("linear_all_to_all", "all_to_all_linear", "pipelined_ulysses")


def split_measured(recorded: Mapping[str, Any]) -> dict[str, int]:
    """Recorded bytes ("phase operator collective") by what they move: ``"activations"`` or ``"weights"``."""
    sums = {"activations": 0, "weights": 0}
    for name, count in recorded.items():
        _, operator, collective = name.split(" ")
        weights = operator in _WEIGHTS or (operator in _ULYSSES and collective != "all_to_all")
        sums["weights" if weights else "activations"] += int(count)
    return sums
