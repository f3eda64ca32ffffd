"""Ways to distribute a model over the ranks of a sequence; one module and one line of the table for each.

Each of them can be crossed with Ring attention: a mesh with a dimension ``"ring"`` outside of ``"seq"``.
"""

from __future__ import annotations

from odysseus_kernels.strategies.base import Strategy
from odysseus_kernels.strategies.odysseus import ODYSSEUS
from odysseus_kernels.strategies.tp import TP
from odysseus_kernels.strategies.tp_sp import TP_SP
from odysseus_kernels.strategies.tsp import TSP
from odysseus_kernels.strategies.ulysses import ULYSSES

__all__ = ["STRATEGIES", "Strategy", "get_strategy"]

STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in (TP, TP_SP, ULYSSES, ODYSSEUS, TSP)}


def get_strategy(name: str) -> Strategy:
    """The strategy called ``name``; a ValueError names the known ones."""
    if name not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {sorted(STRATEGIES)}, got {name!r}")
    return STRATEGIES[name]
