"""An error on one rank of a parallelized model is an error on all, at once, and the next right step is right."""

from __future__ import annotations

import failure_cases as cases
import pytest
from llama_cases import stock_step

from odysseus_kernels.testing.spawn import RankPools

MESHES = {
    "S2": {"seq": 2},
    "S4": {"seq": 4},
    "R2S2": {"ring": 2, "seq": 2},
}
TEXTS = {
    "id": "IndexError: index out of range",
    "label": "expected ids below 120",
    "hook": "ZeroDivisionError: of a hook",
    "backward": "ZeroDivisionError: of a hook",
    "scaled": "its backward pass ended with an error",
    "user": "ZeroDivisionError: of the user",
    "interrupt": "KeyboardInterrupt: stopped by hand",
}
# Below the ranks' ``timeout_s`` of 60 by far; on idle cores it takes a tenth of a second.
AT_ONCE_S = 5


@pytest.fixture(scope="module")
def loss() -> float:
    """The stock model's."""
    return float(stock_step(cases.CASE)["loss"])


@pytest.mark.parametrize("transport", ("symmetric", "collective"))
@pytest.mark.parametrize(("mesh", "strategy"), (("S2", "tp"), ("S4", "odysseus"), ("R2S2", "ulysses")))
def test_every_rank_learns_at_once(ranks: RankPools, loss: float, mesh: str, strategy: str, transport: str) -> None:
    sizes = MESHES[mesh]
    world = 2 if mesh == "S2" else 4
    results = ranks(world).run(cases.failing_steps, strategy, transport, sizes, 1)
    for rank, faults in enumerate(results):
        for fault, (error, message, seconds, next_loss) in faults.items():
            assert next_loss == pytest.approx(loss, rel=1e-6), (rank, fault)
            assert seconds < AT_ONCE_S, (rank, fault, error, message)
            if rank == 1:
                assert error not in ("", "PeerLostError", "SignalTimeoutError"), (fault, error, message)
            else:
                assert error == "PeerLostError", (rank, fault, error, message)
                assert f"rank 1 left the step: {TEXTS[fault]}" in message.replace("ValueError: labels: ", ""), message
