"""What hypothesis draws for every random use: strategy, mesh, batch."""

from __future__ import annotations

from hypothesis import strategies as st

from odysseus_kernels.strategies import STRATEGIES

FIELDS = {
    "strategy": st.sampled_from(sorted(STRATEGIES)),
    "ring": st.sampled_from((1, 2)),
    "length": st.integers(4, 30),
    "rows": st.integers(1, 2),
    "mask": st.sampled_from(("none", "none", "left", "right", "holes")),
    "packed": st.booleans(),
    "items": st.sampled_from(("none", "none", "int", "tensor", "vector")),
    "odd": st.integers(0, 3),
    "seed": st.integers(0, 10**6),
}
