"""What CPU ranks run of the switch's benchmark: everything but the switch."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.device import switch


def refused(rank: int, world: int) -> str:
    return switch.why_not(torch.device("cpu"))


def measured(rank: int, world: int) -> list[dict[str, Any]]:
    """Small rows from rank to rank."""
    return [
        switch.measure_case(switch.SwitchCase(operator, "tiny", 16, 32, 24), torch.device("cpu"), 2, ("ranks",))
        for operator in ("linear_reduce_scatter", "linear_all_reduce", "all_gather_linear")
    ]
