"""What is put into a parallelized model counts as in the stock one, or is an error on all ranks: never left out."""

from __future__ import annotations

import pytest
from changed_cases import (
    CASE,
    FOLLOWED,
    OTHERS,
    REFUSED,
    followed,
    left_padding,
    odd_inputs,
    refused,
    refused_elsewhere,
    step,
)

from odysseus_kernels.strategies import STRATEGIES


@pytest.mark.parametrize("strategy", ["tp", "odysseus"])
def test_what_would_be_left_out_is_refused(ranks, strategy):
    for said in ranks(2).run(refused, strategy):
        for name, (_, text) in REFUSED.items():
            assert text in said.get(name, ""), f"{name}: {said}"


def test_what_other_families_would_leave_out_is_refused(ranks):
    for said in ranks(2).run(refused_elsewhere):
        for name, (_, _, text) in OTHERS.items():
            assert text in said.get(name, ""), f"{name}: {said}"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_counts_counts_as_in_stock(ranks, strategy):
    results = ranks(2).run(followed, strategy)
    for name, change in FOLLOWED.items():
        model = CASE.model()
        change(model)
        loss, gradients = step(model, CASE.whole_batch())
        for found, found_gradients in (result[name] for result in results):
            assert abs(found - loss) <= 2e-6 * loss, name
            assert found_gradients.keys() == gradients.keys(), name
            for parameter, gradient in gradients.items():
                error = (found_gradients[parameter] - gradient).norm() / gradient.norm()
                assert error <= 1e-4, f"{name}, {parameter}: {error:.1e}"


def test_masks_and_positions_that_are_no_integers(ranks):
    truth = CASE.model()(**CASE.whole_batch(), attention_mask=left_padding(), use_cache=False).loss.item()
    for loss, said in ranks(2).run(odd_inputs):
        assert abs(loss - truth) <= 2e-6 * truth
        assert "position_ids: expected an integer dtype, got torch.float32" in said
