"""Nothing as long as the whole sequence is held, however many ranks there are."""

from __future__ import annotations

import pytest
import ring_memory_cases as cases

from odysseus_kernels.testing.spawn import RankPools


@pytest.mark.parametrize("window", (None, 700), ids=("plain", "window"))
@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
def test_memory_does_not_grow_with_the_ring(ranks: RankPools, backward: bool, window: int | None) -> None:
    ((few, _),) = ranks(1).run(cases.held, 2, window, backward)
    ((many, largest),) = ranks(1).run(cases.held, 16, window, backward)
    # Two numbers for each tile of queries and keys, and nothing else, may differ.
    assert many <= few + 0.01
    if window is None:
        # The part that is merged, or the kernel's own gradients: as large as what the rank has of the sequence.
        assert largest <= 1.01
