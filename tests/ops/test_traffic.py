"""The recorder against the formulas: a global tensor of S elements costs each rank (N-1)/N * S."""

from __future__ import annotations

import torch
import traffic_cases as cases
from covering import every_pair

from odysseus_kernels.testing.spawn import RankPools

X, GATHERED_Y, WEIGHT = 2 * 6 * 10, 2 * 6 * 4, 4 * 10  # elements of one rank's shard


def formula(operator: str, gathered: str) -> dict[str, int]:
    """Elements of one rank's shard in each collective."""
    if operator == "all_gather_linear":
        again = {} if gathered == "save" else {"backward all_gather": X}
        return {"forward all_gather": X, "backward reduce_scatter": X, **again}
    if operator == "linear_reduce_scatter":
        return {"forward reduce_scatter": GATHERED_Y, "backward all_gather": GATHERED_Y}
    return {"forward all_gather": WEIGHT, "backward all_gather": WEIGHT, "backward reduce_scatter": WEIGHT}


@every_pair(
    operator=("all_gather_linear", "linear_reduce_scatter", "zero3_linear"),
    mode=("fused", "unfused"),
    transport=("symmetric", "collective"),
    world=(1, 2, 3, 4),
)
def test_bytes_equal_the_formula(ranks: RankPools, operator: str, mode: str, transport: str, world: int) -> None:
    for gathered in ("regather", "save"):
        for dtype in ("float32", "bfloat16"):
            size = getattr(torch, dtype).itemsize
            expected = {name: (world - 1) * n * size for name, n in formula(operator, gathered).items()}
            for counted in ranks(world).run(cases.traffic, operator, transport, mode, gathered, dtype):
                assert counted == (expected if world > 1 else {})
