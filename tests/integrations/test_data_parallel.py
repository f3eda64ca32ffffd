"""FSDP2 over the mesh's outermost dimension, around every strategy and Ring."""

from __future__ import annotations

import pytest
from family_cases import Case, data_parallel_step

from odysseus_kernels.strategies import STRATEGIES

CASE = Case(kv_heads=4)


@pytest.fixture(scope="module")
def truth():
    """Mean over both rows' losses of their gradients: what data parallelism computes."""
    model, batch = CASE.model(), CASE.whole_batch()
    losses = [model(**{name: t[row : row + 1] for name, t in batch.items()}).loss for row in range(2)]
    (sum(losses) / 2).backward()
    return {"losses": [loss.item() for loss in losses], "gradients": {n: p.grad for n, p in model.named_parameters()}}


@pytest.mark.parametrize("sizes", [(2, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fsdp_outside(ranks, truth, strategy, sizes):
    results = ranks(4).run(data_parallel_step, CASE, strategy, sizes)
    for rank, result in enumerate(results):
        assert result["loss"] == pytest.approx(truth["losses"][rank // 2], rel=1e-6)
    for name, gradient in truth["gradients"].items():
        error = (results[0]["gradients"][name] - gradient).norm() / gradient.norm()
        assert error <= 1e-4, f"{name}: {error:.1e}"  # the contract's figure in single precision
