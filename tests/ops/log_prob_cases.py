"""What ranks run in the tests of linear_log_probs: against log_softmax in fp64 on unsharded data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from operator_cases import leaf
from torch import Tensor

import odysseus_kernels as ody
from benchmarks.common.memory import peak_of_others, record_allocations
from odysseus_kernels.ops import LogProbs, linear_log_probs
from odysseus_kernels.testing.compare import nan_empty

PLACEMENTS = ("whole", "zero3", "vocab_parallel")
ROWS, FEATURES, VOCABULARY, TOP, TEMPERATURE, IGNORE = 11, 16, 13, 5, 0.7, -100


def problem(world: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole tensors; rows of all ranks one after another; two ids of a row are equal, others are none."""
    generator = torch.Generator().manual_seed(world)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, vocabulary = ROWS * world, VOCABULARY * world
    ids = torch.randint(vocabulary, (rows, 3), generator=generator)
    ids[::4, 1] = ids[::4, 0]
    ids[torch.rand(ids.shape, generator=generator) < 0.2] = IGNORE
    hidden, weight = make(rows, FEATURES), make(vocabulary, FEATURES) / math.sqrt(FEATURES)
    whole = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "bias": make(vocabulary).to(dtype)}
    return whole | {"ids": ids, "grad": make(rows, 3), "grad_entropy": make(rows)}


def truth(data: dict[str, Tensor], dtype: torch.dtype) -> tuple[LogProbs, dict[str, Tensor]]:
    """The same by log_softmax, products in ``dtype``, and gradients of the sum of grads times values."""
    leaves = {name: data[name].detach().to(dtype, copy=True).requires_grad_() for name in ("hidden", "weight", "bias")}
    logits = F.linear(leaves["hidden"], leaves["weight"], leaves["bias"])
    log_p = ((logits if dtype == torch.float64 else logits.float()) / TEMPERATURE).log_softmax(-1)
    none = data["ids"] == IGNORE
    log_probs = log_p.gather(1, data["ids"].where(~none, 0)).masked_fill(none, 0.0)
    entropy = -(log_p.exp() * log_p).sum(1)
    is_top = (log_p.argmax(1, keepdim=True) == data["ids"]) & ~none
    top, top_ids = log_p.detach().topk(TOP, dim=1)
    ((log_probs * data["grad"]).sum() + (entropy * data["grad_entropy"]).sum()).backward()
    return LogProbs(log_probs, entropy, is_top, top_ids, top), {name: t.grad for name, t in leaves.items()}


def found(
    placement: str, data: dict[str, Tensor], rank: int, world: int, config: ody.OverlapConfig, **settings: Any
) -> tuple[LogProbs, dict[str, Tensor], slice]:
    """This rank's results and gradients, and which rows they are of."""
    rows = slice(rank * ROWS, (rank + 1) * ROWS) if placement == "zero3" else slice(None)
    own = own_rows(placement, rank)
    leaves = {name: leaf(data[name][part]) for name, part in (("hidden", rows), ("weight", own), ("bias", own))}
    with nan_empty():
        result = linear_log_probs(
            leaves["hidden"], data["ids"][rows], leaves["weight"], leaves["bias"],
            group=None, placement=placement, temperature=TEMPERATURE, entropy=True, top_k=TOP, chunk_rows=4,
            config=config, **settings,
        )  # fmt: skip
        total = (result.log_probs * data["grad"][rows]).sum() + (result.entropy * data["grad_entropy"][rows]).sum()
        total.backward()
    return result, {name: tensor.grad for name, tensor in leaves.items()}, rows


def own_rows(placement: str, rank: int) -> slice:
    return slice(None) if placement == "whole" else slice(rank * VOCABULARY, (rank + 1) * VOCABULARY)


def check(rank: int, world: int, placement: str, dtype_name: str) -> None:
    """Every transport and mode; in 16 bits no further from the truth than torch's own is, times 1.5."""
    dtype = getattr(torch, dtype_name)
    data = problem(world, dtype)
    right, right_grads = truth(data, torch.float64)
    plain, plain_grads = truth(data, dtype)
    # Sums of 16 products and of up to 52 exponentials, of numbers of size 1 to 5.
    exact = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype)
    for transport in ("symmetric", "collective") if placement != "whole" else ("auto",):
        for mode in ("fused", "unfused") if placement == "zero3" else ("auto",):
            config = ody.OverlapConfig(transport=transport, mode=mode, timeout_s=60)
            result, grads, rows = found(placement, data, rank, world, config)
            assert not result.top_log_probs.requires_grad
            pairs = [(result.log_probs, right.log_probs[rows], plain.log_probs[rows])]
            pairs += [(result.entropy, right.entropy[rows], plain.entropy[rows])]
            pairs += [(result.top_log_probs, right.top_log_probs[rows], plain.top_log_probs[rows])]
            for name, grad in grads.items():
                part = rows if name == "hidden" else own_rows(placement, rank)
                pairs.append((grad, right_grads[name][part], plain_grads[name][part]))
            for value, expected, other in pairs:
                if exact is not None:
                    torch.testing.assert_close(value.double(), expected.detach(), rtol=exact, atol=exact)
                else:
                    error = (value.double() - expected).norm()
                    assert error <= 1.5 * (other.double() - expected).norm() + 1e-6, (transport, mode, error)
            if exact is not None:
                assert torch.equal(result.top_ids, right.top_ids[rows])
                assert torch.equal(result.is_top, right.is_top[rows])


def each_gradient_alone(rank: int, world: int, placement: str) -> None:
    """A loss of entropies alone, of log-probabilities alone, and of neither's weights."""
    data = problem(world, torch.float64)
    for name, other in (("grad", "grad_entropy"), ("grad_entropy", "grad")):
        alone = data | {other: torch.zeros_like(data[other])}
        _, expected = truth(alone, torch.float64)
        rows = slice(rank * ROWS, (rank + 1) * ROWS) if placement == "zero3" else slice(None)
        own = own_rows(placement, rank)
        hidden, weight = leaf(data["hidden"][rows]), data["weight"][own]
        result = linear_log_probs(
            hidden, data["ids"][rows], weight, data["bias"][own], group=None, placement=placement, entropy=True,
            temperature=TEMPERATURE,
        )  # fmt: skip
        value = result.log_probs if name == "grad" else result.entropy
        (value * data[name][rows]).sum().backward()
        torch.testing.assert_close(hidden.grad, expected["hidden"][rows], rtol=1e-12, atol=1e-12)


def ties(rank: int, world: int) -> None:
    """Equal logits everywhere: the likeliest is of the first part, whatever is visited first, and every id is top."""
    hidden, ids = torch.ones(2, 4), torch.tensor([[0], [3 * world - 1]])
    for placement in ("zero3", "vocab_parallel"):
        result = linear_log_probs(hidden, ids, torch.ones(3, 4), group=None, placement=placement, top_k=1)
        assert bool((result.top_ids < 3).all())
        assert result.is_top.all()
        assert torch.allclose(result.top_log_probs, -torch.tensor(3.0 * world).log())


def traffic(rank: int, world: int, placement: str) -> dict[str, int]:
    """Bytes by phase and collective, for chunks of 4 rows."""
    data = problem(world, torch.float32)
    with ody.CommRecorder() as record:
        found(placement, data, rank, world, ody.OverlapConfig(timeout_s=60))
    return {f"{row['phase']} {row['collective']}": row["bytes"] for row in record.rows()}


def largest_allocation(rank: int, world: int, placement: str) -> tuple[int, int, int]:
    """Bytes of the largest allocation; of a chunk's logits or of an operand in fp32; and of all rows' logits."""
    rows, features, vocabulary, chunk = 1024, 8, 512, 32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, features, generator=generator).bfloat16()
    weight = torch.randn(vocabulary, features, generator=generator).bfloat16()
    ids = torch.randint(vocabulary, (rows, 2), generator=generator)

    def run() -> list[Tensor]:
        leaves = [leaf(hidden), leaf(weight)]
        found = linear_log_probs(
            leaves[0], ids, leaves[1], group=None, placement=placement, entropy=True, top_k=3, chunk_rows=chunk,
            config=ody.OverlapConfig(transport="symmetric", timeout_s=60),
        )  # fmt: skip
        (found.log_probs.sum() + found.entropy.sum()).backward()
        return [found.log_probs]

    run()
    _, events = record_allocations(run)
    _, largest = peak_of_others(events, set())
    return largest, max(chunk * vocabulary, world * weight.numel(), hidden.numel()) * 4, rows * vocabulary * 4


def opcheck(rank: int, world: int) -> None:
    name, key = dist.group.WORLD.group_name, ody.OverlapConfig(timeout_s=30).key()
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    ids = torch.tensor([[0, 1], [4, 4], [IGNORE, 2], [2, 0], [1, IGNORE], [3, 0]])
    for placement in PLACEMENTS:
        for bias, entropy, top_k in ((None, False, 0), (torch.randn(5, requires_grad=True), True, 2)):
            settings = (placement, name, key, TEMPERATURE, entropy, top_k, IGNORE, 4, [], "")
            torch.library.opcheck(torch.ops.odysseus.linear_log_probs.default, (hidden, ids, weight, bias, *settings))


def messages(rank: int, world: int) -> dict[str, str]:
    hidden, ids, weight = torch.randn(2, 3, 8), torch.zeros(2, 3, 1, dtype=torch.int64), torch.randn(5, 8)

    def message(call: Callable[[], Any]) -> str:
        with ody.CommRecorder() as record:
            try:
                call()
            except ValueError as error:
                assert record.bytes() == 0, "something was sent before the input was refused"
                return str(error)
        raise AssertionError("no ValueError")

    def of(hidden: Tensor = hidden, ids: Tensor = ids, placement: Any = "zero3", **settings: Any) -> str:
        return message(lambda: linear_log_probs(hidden, ids, weight, group=None, placement=placement, **settings))

    return {
        "placement": of(placement="cut"),
        "float ids": of(ids=ids.float()),
        "shape": of(ids=ids[0]),
        "temperature": of(temperature=0.0),
        "top_k": of(top_k=5 * world + 1),
        "above": of(ids=ids + 5 * world),
        "below": of(ids=ids - 3, placement="vocab_parallel"),
        "chunks": of(chunk_rows=0, placement="whole"),
    }


def differing(rank: int, world: int) -> list[str]:
    """One rank asks for more: an error on every rank, under each placement that communicates."""
    found = []
    for placement in ("zero3", "vocab_parallel"):
        try:
            linear_log_probs(
                torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int64), torch.randn(5, 8), group=None,
                placement=placement, top_k=1 + rank, config=ody.OverlapConfig(timeout_s=30),
            )  # fmt: skip
        except ody.RankMismatchError as error:
            found.append(str(error))
    return found
