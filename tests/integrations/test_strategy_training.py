"""Training under every strategy, plain and crossed with Ring, is training the stock model."""

from __future__ import annotations

import pytest
import torch
from family_cases import FAMILIES, Case, optimize, train_steps

from odysseus_kernels.strategies import STRATEGIES

STEPS, FEW = 50, 20
# The contract's figure for 50 losses in single precision.
LOSS_TOLERANCE = 1e-4
# One key/value head, which all ranks share whatever their number.
CASE = Case(kv_heads=1, length=47, changes=(("num_hidden_layers", 1),))
MESHES = {"tp": (2, 1), "tp_sp": (3, 1), "ulysses": (4, 1), "odysseus": (3, 1), "tsp": (4, 1)}


@pytest.fixture(scope="module")
def stock():
    runs = {}
    for steps in (STEPS, FEW):
        model = CASE.model()
        losses = optimize(model, [CASE.whole_batch()] * steps)
        assert losses[-1] < 0.8 * losses[0], "this run must learn, or equal losses say little"
        runs[steps] = {"losses": losses, "parameters": {name: p.detach() for name, p in model.named_parameters()}}
    return runs


def agree(results):
    """All ranks' losses, and parameters as each rank sees them."""
    for result in results[1:]:
        assert result["losses"] == results[0]["losses"], "ranks must agree to the bit"
        for name, parameter in result["parameters"].items():
            assert torch.equal(parameter, results[0]["parameters"][name]), f"{name}: ranks must see one parameter"


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_and_parameters(ranks, stock, strategy, crossed):
    world_size, ring = (4, 2) if crossed else MESHES[strategy]
    steps = FEW if crossed else STEPS
    results = ranks(world_size).run(train_steps, CASE, strategy, ring, steps)
    for step, truth in enumerate(stock[steps]["losses"]):
        assert results[0]["losses"][step] == pytest.approx(truth, rel=LOSS_TOLERANCE), step
    agree(results)
    for name, truth in stock[steps]["parameters"].items():
        error = (results[0]["parameters"][name] - truth).norm() / truth.norm()
        # Adam divides by the gradients' own size, which lifts their rounding where they are small.
        assert error < 1e-3, f"{name}: {error:.1e}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_five_steps_of_every_family(ranks, family, strategy):
    """Plain or crossed in turn: gradients of both are those of one process for every family (``test_families.py``)."""
    case = Case(family=family, kv_heads=4)
    losses = optimize(case.model(), [case.whole_batch()] * 5)
    crossed = (list(FAMILIES).index(family) + list(STRATEGIES).index(strategy)) % 2
    world_size, ring = (4, 2) if crossed else (2, 1)
    results = ranks(world_size).run(train_steps, case, strategy, ring, 5)
    assert results[0]["losses"] == pytest.approx(losses, rel=LOSS_TOLERANCE)
    agree(results)
