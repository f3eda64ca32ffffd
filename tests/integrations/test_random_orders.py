"""Random types, meshes, replicas and orders of calls: the single process's number or an error on all ranks in time."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from family_cases import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_cases import RIGHT, TIMEOUT_S
from random_fields import FIELDS
from random_order_cases import CHANGED, REPLICAS, SORTS, case_of, replica_batches, run
from random_order_programs import PROGRAMS, Order, Side

from odysseus_kernels.testing.spawn import RankPools

EXAMPLES = int(os.environ.get("ODYSSEUS_RANDOM_USES", "1"))
AT_ONCE = 8  # uses in one launch of the ranks
MUST_WORK = (
    *("two_forwards", "backward_twice", "evaluation_between", "accumulates", "eval", "late_backward", "checkpoints"),
    *("scaled", "autograd_grad", "frozen", "autocast", "double", "items_types", "replicas", "replicas_accumulate"),
)
MUST_FAIL = (
    "scaled_one",
    "skips_backward",
    "backward_alone",
    "evaluates_alone",
    "frozen_one",
    "replica_raises",
    "rank_forgets_items",
)

orders = st.builds(
    Order,
    sort=st.sampled_from(SORTS),
    **FIELDS,
    variant=st.integers(0, 59),
    stepped=st.booleans(),
)


@functools.cache
def stock(case: Case):
    return case.model()


@functools.cache
def right_loss() -> float:
    return RIGHT.model()(**RIGHT.whole_batch(), use_cache=False).loss.item()


def norm_of(model) -> float:
    return torch.stack([p.grad.norm().double() for p in model.parameters() if p.grad is not None]).norm().item()


def truth(use: Order, sort: str = "") -> tuple[float, float]:
    """Loss and norm of all gradients of the single process."""
    model = RIGHT.model() if use.sort in CHANGED else stock(case_of(use))
    model.zero_grad()
    if use.sort in REPLICAS:
        batches = [(replica, batch) for replica in range(2) for batch in replica_batches(use, replica)]
        items = [sum(int((batch["labels"][:, 1:] != -100).sum()) for _, batch in batches)] * 2
        if use.sort == "rank_forgets_items":  # a replica of one rank: its loss is the mean over its own tokens
            items[use.odd % 2] = 2 * int((batches[use.odd % 2][1]["labels"][:, 1:] != -100).sum())
        loss = sum(model(**one, use_cache=False, num_items_in_batch=items[replica]).loss for replica, one in batches)
        loss.backward()
    else:
        side = Side(use, model, lambda batch: {**batch, "use_cache": False})
        loss = PROGRAMS.get(sort or use.sort, PROGRAMS["right"])(side)
    return loss.item(), norm_of(model)


def check(use: Order, results: list[dict]) -> None:
    said = f"{use}: {results}"
    assert max(result["seconds"] for result in results) <= TIMEOUT_S + 2, f"waited: {said}"
    lasting = any(result.get("lasting") for result in results)
    if use.sort == "subsets":
        failing = use.odd % len(results) % 2
        spared = results[1 - failing :: 2]
        assert not any(r.get("error") or r.get("next_error") for r in spared), f"others touched: {said}"
        check_numbers(use, spared, said)
        assert all(r.get("error") for r in results[failing::2]), f"some ranks only: {said}"
    else:
        # A rank that left out a call has no wait in which it could learn of it: it does at its next step.
        errors = [result.get("error") or result.get("next_error") for result in results]
        assert all(errors) or not any(errors), f"some ranks only: {said}"
        if any(errors):
            assert use.sort not in MUST_WORK, f"must work: {said}"
            assert all(r.get("error", "ValueError").startswith("ValueError") for r in results) or (
                use.sort != "permuted"
            ), said
        else:
            alone = use.sort == "rank_forgets_items" and len(results) == 2
            assert alone or use.sort not in MUST_FAIL, f"must fail: {said}"
            check_numbers(use, results, said)
    for result in results:
        if "next" in result or not lasting:
            expected = right_loss()
            assert abs(result.get("next", float("nan")) - expected) <= 2e-5 * expected, f"next step: {said}"


def check_numbers(use: Order, results: list[dict], said: str) -> None:
    loss, norm = truth(use, "right" if use.sort == "part_cast" else "")
    wide = [2e-5, 2e-4]
    if "cast" in use.sort:
        other = truth(use, "autocast")
        wide = [1.5 * abs(a / b - 1) + 2e-3 for a, b in zip(other, truth(use, "right"), strict=True)]
        loss, norm = truth(use, "right")
    if use.sort in REPLICAS:
        results = [{"loss": sum(r["loss"] for r in results) / len(results), "norm": r["norm"]} for r in results]
    for result in results:
        assert abs(result["loss"] - loss) <= wide[0] * abs(loss), f"number {loss}, {norm}: {said}"
        assert abs(result["norm"] - norm) <= wide[1] * norm, f"number {loss}, {norm}: {said}"


@pytest.fixture(scope="module")
def own_ranks():
    """Their process groups are made again after errors that last, which other tests' ranks would not survive."""
    with RankPools(threads=1, timeout=300) as pools:
        yield pools


@pytest.mark.parametrize("world", (2, 4))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(orders, min_size=AT_ONCE, max_size=AT_ONCE))
def test_random_orders(own_ranks, world, several):
    """``ODYSSEUS_RANDOM_USES=63 pytest ...`` tries 504 of them on 2 ranks and as many on 4."""
    for use, *results in zip(several, *own_ranks(world).run(run, several), strict=True):
        check(use, results)
