"""The loss is torch's cross-entropy of the whole batch, its gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.linear import VocabParallelLinear, Zero3Linear
from odysseus_kernels.nn.loss import ChunkedCrossEntropy, sequence_loss
from odysseus_kernels.nn.parameters import Cut, distribute_parameter
from odysseus_kernels.nn.swap import swap_class
from odysseus_kernels.testing.compare import relative_error

ROWS, VOCABULARY, WIDTH = 12, 37, 8
HEAD_VOCABULARY = 36  # rows that 1, 2, 3 and 4 ranks divide
KINDS = ["zero3", "sharded", "replicated"]
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


def loss_of_head(
    rank: int, world_size: int, kind: str, dtype: str, transport: str, valid: float, ring_size: int
) -> dict[str, Any]:
    """The loss and all gradients of one of our heads, with a ring of ``ring_size`` outside of "seq"."""
    size = world_size // ring_size
    names, shape = (("seq",), (size,)) if ring_size == 1 else (("ring", "seq"), (ring_size, size))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    config = OverlapConfig(transport=transport, timeout_s=30)
    group = SequenceGroup.of(mesh, config)
    hidden, labels = _inputs(getattr(torch, dtype), WIDTH, valid)
    head = _distributed_head(kind, group, getattr(torch, dtype))
    own, tokens = hidden.chunk(ring_size, 1)[group.ring_rank], labels.chunk(ring_size, 1)[group.ring_rank]
    if head.tokens == "sharded":
        own, tokens = own.chunk(size, 1)[group.rank], tokens.chunk(size, 1)[group.rank]
    own = own.clone().requires_grad_()
    loss = sequence_loss(own, tokens, mesh, head=head, tokens=head.tokens, chunk_rows=5, config=config)
    (2 * loss).backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    assert all(isinstance(grad, DTensor) for grad in gradients.values())
    whole = {name: grad.full_tensor() for name, grad in gradients.items()}
    return {"loss": loss.detach(), "hidden": own.grad, **whole}


def _whole_head(dtype: torch.dtype) -> torch.nn.Linear:
    torch.manual_seed(5)
    return torch.nn.Linear(WIDTH, HEAD_VOCABULARY, dtype=torch.float64).to(dtype)


def _distributed_head(kind: str, group: SequenceGroup, dtype: torch.dtype) -> Any:
    """A head of which this rank has its rows: of all ranks under ZeRO-3, of those of "seq" else."""
    head: Any = _whole_head(dtype)
    for name in ("weight", "bias"):
        cut = Cut(0, "everyone") if kind == "zero3" else Cut(0)
        setattr(head, name, distribute_parameter(getattr(head, name), group, cut))
    swap_class(head, Zero3Linear if kind == "zero3" else VocabParallelLinear)
    head.sequence_group = group
    if kind != "zero3":
        head.tokens = kind
    return head


def _truth_of_head(dtype: torch.dtype, valid: float) -> dict[str, torch.Tensor]:
    hidden, labels = _inputs(dtype, WIDTH, valid)
    hidden = hidden.double().requires_grad_()
    head = _whole_head(dtype).double()
    loss = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    (2 * loss).backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": head.weight.grad, "bias": head.bias.grad}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_distributed_heads(ranks, kind, dtype, world_size):
    truth = _truth_of_head(dtype, 0.6)
    # Logits of at most 8 in bf16, rounded by 2^-8 of their size: errors of 3 % in probabilities at worst.
    tolerance = 4e-2 if dtype == torch.bfloat16 else 10 * TOLERANCE[dtype]
    for transport in ("symmetric", "collective"):
        results = ranks(world_size).run(loss_of_head, kind, str(dtype)[6:], transport, 0.6, 1)
        for result in results:
            assert result["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert result["loss"].item() == pytest.approx(truth["loss"].item(), rel=tolerance)
        hidden = [result["hidden"] for result in results]
        if kind == "replicated":
            assert all(torch.equal(hidden[0], other) for other in hidden)
        else:
            hidden = [torch.cat(hidden, dim=1)]
        assert relative_error(hidden[0], truth["hidden"]) <= tolerance
        for name in ("weight", "bias"):
            assert relative_error(results[0][name], truth[name]) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_distributed_heads_with_a_ring(ranks, kind):
    """2 x 2 ranks: the mean is over the tokens of all, and replicated ones count once."""
    truth = _truth_of_head(torch.float64, 0.6)
    results = ranks(4).run(loss_of_head, kind, "float64", "symmetric", 0.6, 2)
    for result in results:
        assert result["loss"].item() == pytest.approx(truth["loss"].item(), rel=1e-12)
    hidden = [results[0], results[2]] if kind == "replicated" else results
    torch.testing.assert_close(torch.cat([result["hidden"] for result in hidden], dim=1), truth["hidden"])
    for result in results:  # ring ranks hold copies, whose gradients must be whole on each of them
        for name in ("weight", "bias"):
            torch.testing.assert_close(result[name], truth[name])


@pytest.mark.parametrize("kind", KINDS)
def test_distributed_heads_without_valid_labels(ranks, kind):
    for result in ranks(2).run(loss_of_head, kind, "float32", "symmetric", 0.0, 1):
        assert result["loss"].isnan()
        assert not any(result[name].any() for name in ("hidden", "weight", "bias"))


def logits_of_head(rank: int, world_size: int, kind: str, transport: str) -> None:
    """Without labels a head gives the logits of the tokens that it is given, over the whole vocabulary."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))
    group = SequenceGroup.of(mesh, OverlapConfig(transport=transport, timeout_s=30))
    hidden, _ = _inputs(torch.float64, WIDTH, 1.0)
    grad = torch.randn(2, ROWS, HEAD_VOCABULARY, dtype=torch.float64)
    truth, whole = hidden.clone().requires_grad_(), _whole_head(torch.float64)
    expected = whole(truth)
    expected.backward(grad)
    head = _distributed_head(kind, group, torch.float64)

    def part(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if head.tokens == "replicated" else tensor.chunk(world_size, 1)[rank]

    own = part(hidden).clone().requires_grad_()
    logits = head(own)
    logits.backward(part(grad))
    torch.testing.assert_close(logits, part(expected))
    torch.testing.assert_close(own.grad, part(truth.grad))
    for name in ("weight", "bias"):
        mine = getattr(whole, name).grad.chunk(world_size)[rank]
        torch.testing.assert_close(getattr(head, name).grad.to_local(), mine)


@pytest.mark.parametrize("transport", ["symmetric", "collective"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_distributed_heads(ranks, kind, transport):
    ranks(3).run(logits_of_head, kind, transport)


def replicated_logits(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))
    logits, labels = _inputs(torch.float64, VOCABULARY, 0.6)
    logits.requires_grad_()
    with CommRecorder() as record:
        loss = sequence_loss(logits, labels, mesh, tokens="replicated")
        loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad, record.bytes()


def test_replicated_logits_need_no_communication(ranks):
    logits, labels = _inputs(torch.float64, VOCABULARY, 0.6)
    logits.requires_grad_()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    for loss, grad, sent in ranks(2).run(replicated_logits):
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad, logits.grad)
        assert sent == 0


def refusals(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))
    logits, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels: expected shape \(2, 3\).* got \(2, 2\)"):
        sequence_loss(logits, labels[:, 1:], mesh)
    with pytest.raises(ValueError, match="labels: expected an integer dtype, got torch.float32"):
        sequence_loss(logits, labels.float(), mesh)
    with pytest.raises(ValueError, match="chunk_rows"):
        sequence_loss(logits, labels, mesh, chunk_rows=0)
    with pytest.raises(ValueError, match="tokens: expected .*got 'cut'"):
        sequence_loss(logits, labels, mesh, tokens="cut")  # type: ignore[arg-type]
    head = _distributed_head("zero3", SequenceGroup.of(mesh), torch.float32)
    with pytest.raises(ValueError, match="tokens: expected 'sharded', which Zero3Linear.* got 'replicated'"):
        sequence_loss(torch.zeros(2, 3, WIDTH), labels, mesh, head=head, tokens="replicated")


def test_refusals(ranks):
    ranks(1).run(refusals)


def test_sum_passes_gradcheck():
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, -100, 2, 1, -100, 3])
    assert torch.autograd.gradcheck(lambda x: ChunkedCrossEntropy.apply(x, targets, -100, 3), (logits,))
