"""The loss is torch's cross-entropy of the whole batch, its gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.nn.loss import ChunkedCrossEntropy, sequence_loss

ROWS, VOCABULARY, WIDTH = 12, 37, 8
# Sums of a few dozen terms in another order: one digit above the rounding of the type.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def _inputs(dtype: torch.dtype, width: int, valid: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(2, ROWS, width, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    labels = torch.randint(VOCABULARY, (2, ROWS), generator=generator)
    labels[torch.rand(2, ROWS, generator=generator) >= valid] = -100
    return values, labels


def _head() -> torch.nn.Linear:
    torch.manual_seed(4)
    return torch.nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)


def part_of_loss(
    rank: int, world_size: int, dtype: str, valid: float, chunk_rows: int, through_head: bool, num_items: int | None
) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))
    values, labels = _inputs(getattr(torch, dtype), WIDTH if through_head else VOCABULARY, valid)
    own = values.chunk(world_size, 1)[rank].clone().requires_grad_()
    head = _head() if through_head else None
    with CommRecorder() as record:
        loss = sequence_loss(
            own, labels.chunk(world_size, 1)[rank], mesh, head=head, num_items=num_items, chunk_rows=chunk_rows
        )
        (2 * loss).backward()
    return {
        "loss": loss.detach(),
        "grad": own.grad,
        "head": None if head is None else head.weight.grad,
        "backward_bytes": record.bytes(phase="backward"),
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1024])
def test_logits(ranks, world_size, dtype, chunk_rows):
    values, labels = _inputs(dtype, VOCABULARY, valid=0.6)
    truth = values.double().requires_grad_()
    expected = F.cross_entropy(truth.flatten(0, 1), labels.flatten())
    (2 * expected).backward()
    results = ranks(world_size).run(part_of_loss, str(dtype)[6:], 0.6, chunk_rows, False, None)
    tolerance = TOLERANCE[dtype]
    for result in results:
        assert result["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # The loss is computed in at least single precision, from the logits as they are.
        assert result["loss"].item() == pytest.approx(expected.item(), rel=min(tolerance, 1e-6))
        assert result["backward_bytes"] == 0
    grad = torch.cat([result["grad"] for result in results], dim=1)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), truth.grad, rtol=tolerance, atol=tolerance * 0.1)


def test_hidden_states_through_a_head(ranks):
    hidden, labels = _inputs(torch.float64, WIDTH, valid=0.6)
    hidden.requires_grad_()
    head = _head()
    expected = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    (2 * expected).backward()
    results = ranks(2).run(part_of_loss, "float64", 0.6, 5, True, None)
    torch.testing.assert_close(results[0]["loss"], expected.detach())
    torch.testing.assert_close(torch.cat([result["grad"] for result in results], dim=1), hidden.grad)
    torch.testing.assert_close(results[0]["head"] + results[1]["head"], head.weight.grad)


def test_number_of_items_divides_instead(ranks):
    values, labels = _inputs(torch.float64, VOCABULARY, valid=0.6)
    expected = F.cross_entropy(values.flatten(0, 1), labels.flatten(), reduction="sum") / 50
    assert ranks(2).run(part_of_loss, "float64", 0.6, 5, False, 50)[1]["loss"].item() == pytest.approx(expected.item())


def test_without_valid_labels_it_does_what_torch_does(ranks):
    values, labels = _inputs(torch.float32, VOCABULARY, valid=0.0)
    values.requires_grad_()
    expected = F.cross_entropy(values.flatten(0, 1), labels.flatten())
    expected.backward()
    assert expected.isnan()
    assert not values.grad.any()
    for result in ranks(2).run(part_of_loss, "float32", 0.0, 1024, False, None):
        assert result["loss"].isnan()
        assert not result["grad"].any()


def test_one_rank_without_valid_labels(ranks):
    assert all(r["loss"].isfinite() for r in ranks(3).run(part_of_loss, "float32", 0.1, 4, False, None))


def refusals(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))
    logits, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels: expected shape \(2, 3\).* got \(2, 2\)"):
        sequence_loss(logits, labels[:, 1:], mesh)
    with pytest.raises(ValueError, match="labels: expected an integer dtype, got torch.float32"):
        sequence_loss(logits, labels.float(), mesh)
    with pytest.raises(ValueError, match="chunk_rows"):
        sequence_loss(logits, labels, mesh, chunk_rows=0)


def test_refusals(ranks):
    ranks(1).run(refusals)


def test_sum_passes_gradcheck():
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, -100, 2, 1, -100, 3])
    assert torch.autograd.gradcheck(lambda x: ChunkedCrossEntropy.apply(x, targets, -100, 3), (logits,))
