"""Random use and misuse: the single process's number or an error on all ranks in time, never another number."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_cases import RIGHT, SORTS, TIMEOUT_S, Use, run
from random_fields import FIELDS

EXAMPLES = int(os.environ.get("ODYSSEUS_RANDOM_USES", "5"))
AT_ONCE = 8  # uses in one launch of the ranks
MUST_WORK = ("right", "ignore_index")
MUST_FAIL = ("other_samples", "skips_a_step", "bad_token", "user_error", "labels_taken", "cut_twice")

uses = st.builds(
    Use,
    sort=st.sampled_from(SORTS),
    **FIELDS,
)


@functools.cache
def stock():
    return RIGHT.model()


@functools.cache
def right_loss() -> float:
    return stock()(**RIGHT.whole_batch(), use_cache=False).loss.item()


def truth(use: Use) -> tuple[float, float]:
    """Loss and norm of all gradients of the single process."""
    model = stock()
    model.zero_grad()
    loss = model(**use.whole(), **use.settings(), use_cache=False).loss
    loss.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.stack(norms).norm().item()


def check(use: Use, results: list[dict]) -> None:
    errors = [result.get("error") for result in results]
    said = f"{use}: {results}"
    assert all(errors) or not any(errors), f"some ranks only: {said}"
    assert max(result["seconds"] for result in results) <= TIMEOUT_S + 2, said
    if any(errors):
        assert use.sort not in MUST_WORK, said
    else:
        assert use.sort not in MUST_FAIL, said
        loss, norm = truth(use)
        for result in results:
            assert abs(result["loss"] - loss) <= 2e-5 * abs(loss), f"{loss}, {norm}: {said}"
            assert abs(result["norm"] - norm) <= 2e-4 * norm, f"{loss}, {norm}: {said}"
    if not any(result.get("lasting") for result in results):
        for result in results:
            assert abs(result.get("next", float("nan")) - right_loss()) <= 2e-5 * right_loss(), f"next step: {said}"


@pytest.mark.parametrize("world", (2, 4))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(uses, min_size=AT_ONCE, max_size=AT_ONCE))
def test_random_uses(ranks, world, several):
    """``ODYSSEUS_RANDOM_USES=63 pytest ...`` tries 504 of them on 2 ranks and as many on 4."""
    for use, *results in zip(several, *ranks(world).run(run, several), strict=True):
        check(use, results)
