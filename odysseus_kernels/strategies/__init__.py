"""Ways to distribute a model over the ranks of a sequence; one module and one line of the table for each."""

from __future__ import annotations

from odysseus_kernels.strategies.base import Strategy
from odysseus_kernels.strategies.odysseus import ODYSSEUS

__all__ = ["STRATEGIES", "Strategy", "get_strategy"]

STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in (ODYSSEUS,)}


def get_strategy(name: str) -> Strategy:
    """The strategy called ``name``; a ValueError names the known ones."""
    if name not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {sorted(STRATEGIES)}, got {name!r}")
    return STRATEGIES[name]
