"""Training under every strategy, plain and crossed with Ring, is training the stock model."""

from __future__ import annotations

import itertools

import pytest
import torch
from family_cases import FAMILIES, Case, optimize, train_steps

from odysseus_kernels.strategies import STRATEGIES

STEPS, FEW = 50, 20
# The contract's figure for 50 losses in single precision.
LOSS_TOLERANCE = 1e-4
# One key/value head, which all ranks share whatever their number.
CASE = Case(kv_heads=1, length=47, changes=(("num_hidden_layers", 1),))
MESHES = {"tp": (2, 1), "tp_sp": (3, 1), "ulysses": (4, 1), "odysseus": (2, 1), "tsp": (2, 1)}


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


@pytest.mark.parametrize(
    "crossed",
    # A few steps of every family cross them, too, and show the same of losses and of what ranks have.
    [False, pytest.param(True, marks=pytest.mark.complete)],
)
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


def _plan():
    """Every family under every strategy, plain or crossed in turn.

    By default every family and every strategy once: gradients of every family under every strategy are those of one
    process (``test_families.py``), and what optimizes them knows neither family nor strategy.
    """
    families, strategies = [family for family in FAMILIES if family != "llama"], list(STRATEGIES)
    for (i, family), (j, strategy) in itertools.product(enumerate(families), enumerate(strategies)):
        turn = (i - j) % len(strategies)
        marks = () if turn == 0 else (pytest.mark.complete,)
        yield pytest.param(family, strategy, ((2, 1), (4, 2))[(i + turn) % 2], marks=marks)


@pytest.mark.parametrize(("family", "strategy", "mesh"), list(_plan()))
def test_five_steps_of_every_family(ranks, family, strategy, mesh):
    case, (world_size, ring) = Case(family=family, kv_heads=4), mesh
    losses = optimize(case.model(), [case.whole_batch()] * 5)
    results = ranks(world_size).run(train_steps, case, strategy, ring, 5)
    assert results[0]["losses"] == pytest.approx(losses, rel=LOSS_TOLERANCE)
    agree(results)
