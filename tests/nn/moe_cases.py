"""What ranks run in the tests of mixtures of experts: stock blocks of transformers, whole and cut over the ranks."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import odysseus_kernels as ody
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.moe import ExpertsSpec, SplitTokensExperts, Zero3Experts, load_balancing_loss
from odysseus_kernels.nn.parameters import Cut, distribute_parameter
from odysseus_kernels.nn.replicated import Replicated
from odysseus_kernels.nn.swap import swap_class
from odysseus_kernels.testing.compare import assert_close_to_truth, nan_empty, relative_error, rounding_tolerance

WIDTH, INTERMEDIATE, TOP_K = 16, 12, 2
WEIGHTS = ("experts.gate_up_proj", "experts.down_proj")


@dataclasses.dataclass
class Problem:
    family: str
    experts: int
    tokens: tuple[int, ...]
    dtype: str = "float32"
    transport: str = "symmetric"
    mode: str = "fused"

    @property
    def config(self) -> ody.OverlapConfig:
        return ody.OverlapConfig(mode=self.mode, transport=self.transport, timeout_s=60)


def make_block(problem: Problem) -> nn.Module:
    """A stock block with random weights, the same on every rank."""
    sizes = {"hidden_size": WIDTH, "num_experts_per_tok": TOP_K}
    if problem.family == "mixtral":
        from transformers.models.mixtral import modeling_mixtral as modeling

        config: Any = modeling.MixtralConfig(**sizes, intermediate_size=INTERMEDIATE, num_local_experts=problem.experts)
        block: nn.Module = modeling.MixtralSparseMoeBlock(config)
    else:
        from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

        config = modeling.Qwen3MoeConfig(
            **sizes,
            moe_intermediate_size=INTERMEDIATE,
            num_experts=problem.experts,
            norm_topk_prob=problem.family == "qwen3_normed",
        )
        block = modeling.Qwen3MoeSparseMoeBlock(config)
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(1)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).mul_(0.5)
    return block.to(getattr(torch, problem.dtype))


def inputs(problem: Problem) -> tuple[Tensor, Tensor]:
    """x and the output's gradient [1, all tokens, d]."""
    generator = torch.Generator().manual_seed(2)
    shape = (1, sum(problem.tokens), WIDTH)
    make = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    return make[0].to(getattr(torch, problem.dtype)), make[1].to(getattr(torch, problem.dtype))


def run(block: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = block(x)
    y.backward(grad)
    found = {"output": y.detach(), "input": x.grad}
    for name, parameter in block.named_parameters():
        assert type(parameter.grad) is type(parameter.data)  # a DTensor has a DTensor's gradient
        found[name] = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found


def distribute(block: nn.Module, group: SequenceGroup, mixin: type[Zero3Experts], *, swap_router: bool) -> None:
    experts: Any = block.experts
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, distribute_parameter(getattr(experts, name), group, Cut(0)))
    swap_class(experts, mixin)
    experts.sequence_group, experts.experts_spec = group, ExpertsSpec()
    if swap_router:
        router: Any = block.gate
        router.weight = distribute_parameter(router.weight, group, Cut())
        swap_class(router, Replicated)
        router.sequence_group = group


def _compare(problem: Problem, actual: dict[str, Tensor], stock: nn.Module, rows: slice, held: slice) -> None:
    x, grad = inputs(problem)
    expected = run(copy.deepcopy(stock).double(), x.double(), grad.double())
    assert set(actual) == set(expected)
    # Four products in a row, the router's among them: four times the error of one is sixteen times the terms.
    terms = 16 * max(64, sum(problem.tokens))
    for name, result in actual.items():
        one = expected[name]
        if name in ("output", "input"):
            one = one[:, rows]
        elif name in WEIGHTS:
            one = one[held]
        dtype = getattr(torch, problem.dtype)
        if name in ("input", "gate.weight") and dtype == torch.float64:
            # Stock routers compute probabilities in fp32 whatever the model's type, so their gradients pass through it.
            assert relative_error(result, one) <= rounding_tolerance(torch.float32), f"{name} of {problem}"
        else:
            assert_close_to_truth(result, one, dtype=dtype, terms=terms, name=f"{name} of {problem}")


def check_own_tokens(rank: int, world: int, problem: Problem) -> None:
    """Each rank has other tokens."""
    group = SequenceGroup.of(init_device_mesh("cpu", (world,), mesh_dim_names=("seq",)), problem.config)
    stock = make_block(problem)
    block = copy.deepcopy(stock)
    distribute(block, group, Zero3Experts, swap_router=True)
    assert isinstance(block.gate, type(stock.gate)) and isinstance(block.experts, type(stock.experts))
    first = sum(problem.tokens[:rank])
    rows = slice(first, first + problem.tokens[rank])
    count = problem.experts // world
    x, grad = inputs(problem)
    with nan_empty():
        actual = run(block, x[:, rows], grad[:, rows])
    _compare(problem, actual, stock, rows, slice(rank * count, (rank + 1) * count))


def check_replicated_tokens(rank: int, world: int, problem: Problem) -> None:
    """All ranks have the same tokens: nothing of theirs, the router's weights included, is added over ranks."""
    group = SequenceGroup.of(init_device_mesh("cpu", (world,), mesh_dim_names=("seq",)), problem.config)
    stock = make_block(problem)
    block = copy.deepcopy(stock)
    distribute(block, group, SplitTokensExperts, swap_router=False)
    count = problem.experts // world
    x, grad = inputs(problem)
    with ody.CommRecorder() as record, nan_empty():
        actual = run(block, x, grad)
    _compare(problem, actual, stock, slice(None), slice(rank * count, (rank + 1) * count))
    rows, size = -(-sum(problem.tokens) // world), x.element_size()
    # The router's scores of Mixtral are fp32 in any model.
    routing = TOP_K * (4 if problem.family == "mixtral" else size)
    tokens = {phase: record.bytes(operator="expert_tokens", phase=phase) for phase in ("forward", "backward")}
    sent = (world - 1) * rows * WIDTH * size
    assert tokens == {"forward": sent, "backward": sent + (world - 1) * rows * routing}
    weights = (world - 1) * count * 3 * WIDTH * INTERMEDIATE * size
    assert record.bytes(operator="zero3_experts", phase="forward") == weights
    assert record.bytes(operator="zero3_experts", phase="backward") == 2 * weights


def check_ring(rank: int, world: int, problem: Problem) -> None:
    """Experts cut over ring and seq; tokens differ along the ring and are the same along seq."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ring", "seq"))
    group = SequenceGroup.of(mesh, problem.config)
    stock = make_block(problem)
    experts: Any = copy.deepcopy(stock).experts
    count = problem.experts // world
    held = slice(rank * count, (rank + 1) * count)
    for name in ("gate_up_proj", "down_proj"):
        local = getattr(experts, name).detach()[held].clone()
        setattr(experts, name, nn.Parameter(DTensor.from_local(local, mesh, [Shard(0), Shard(0)], run_check=False)))
    swap_class(experts, SplitTokensExperts)
    experts.sequence_group, experts.experts_spec = group, ExpertsSpec()
    x, grad = inputs(problem)
    half = x.shape[1] // 2
    rows = slice(group.ring_rank * half, (group.ring_rank + 1) * half)
    with torch.no_grad():
        _, weights, index = stock.gate(x)

    def run_experts(module: nn.Module, part: slice, dtype: torch.dtype) -> list[Tensor]:
        tokens, routing = (t[part].to(dtype, copy=True).requires_grad_() for t in (x[0], weights))
        y = module(tokens, index[part], routing)
        y.backward(grad[0, part].to(dtype))
        return [y.detach(), tokens.grad, routing.grad]

    actual = run_experts(experts, rows, x.dtype)
    truth = copy.deepcopy(stock.experts).double()
    expected = run_experts(truth, slice(None), torch.float64)
    for one, other in zip(actual, expected, strict=True):
        assert_close_to_truth(one.to(x.dtype), other[rows], dtype=x.dtype, terms=9 * 64)
    for name in ("gate_up_proj", "down_proj"):
        gradient = getattr(experts, name).grad.to_local()
        assert_close_to_truth(gradient, getattr(truth, name).grad[held], dtype=x.dtype, terms=9 * 64)


def errors_in_16_bits(rank: int, world: int, problem: Problem) -> dict[str, tuple[float, float]]:
    """Of each result on this rank: the error against fp64, and that of the stock experts in the same type."""
    group = SequenceGroup.of(init_device_mesh("cpu", (world,), mesh_dim_names=("seq",)), problem.config)
    stock: Any = make_block(problem)
    x, grad = inputs(problem)
    with torch.no_grad():
        _, weights, index = stock.gate(x)
    first = sum(problem.tokens[:rank])
    rows, whole = slice(first, first + problem.tokens[rank]), slice(None)
    count = problem.experts // world
    held = slice(rank * count, (rank + 1) * count)

    def run_experts(experts: Any, part: slice, dtype: torch.dtype) -> dict[str, Tensor]:
        tokens = x[0, part].to(dtype, copy=True).requires_grad_()
        y = experts(tokens, index[part], weights[part].to(dtype))
        y.backward(grad[0, part].to(dtype))
        named = {name: parameter.grad for name, parameter in experts.named_parameters()}
        return {"output": y.detach(), "input": tokens.grad, **named}

    truth = run_experts(copy.deepcopy(stock.experts).double(), whole, torch.float64)
    baseline = run_experts(copy.deepcopy(stock.experts), whole, x.dtype)
    distribute(stock, group, Zero3Experts, swap_router=False)
    actual = run_experts(stock.experts, rows, x.dtype)
    errors = {}
    for name, one in actual.items():
        part = rows if name in ("output", "input") else held
        local = one.to_local() if isinstance(one, DTensor) else one
        errors[name] = (
            relative_error(local, truth[name][part]),
            relative_error(baseline[name][part], truth[name][part]),
        )
    return errors


def router_logits(world: int, tokens: tuple[int, ...], dtype: torch.dtype, layers: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3 + world)
    shape = (sum(tokens), 6)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(layers)]


def padding_mask(tokens: tuple[int, ...]) -> Tensor:
    return (torch.arange(sum(tokens)) % 5 != 3).long()


def part_of_balancing_loss(
    rank: int, world: int, tokens: tuple[int, ...], dtype: str, masked: bool, shared: bool
) -> dict[str, Any]:
    """Loss and gradients of this rank; ``shared``: every rank has all tokens."""
    first = 0 if shared else sum(tokens[:rank])
    rows = slice(None) if shared else slice(first, first + tokens[rank])
    own = [one[rows].clone().requires_grad_() for one in router_logits(world, tokens, getattr(torch, dtype))]
    mask = padding_mask(tokens)[rows] if masked else None
    group = None if shared else dist.group.WORLD
    with ody.CommRecorder() as record:
        loss = load_balancing_loss(own, TOP_K, group=group, attention_mask=mask)
        (3 * loss).backward()
    assert record.bytes(phase="backward") == 0
    return {"loss": loss.detach(), "grads": [one.grad for one in own]}


def loss_of_nothing(rank: int, world: int) -> Tensor:
    mask = torch.zeros(4)
    return load_balancing_loss([torch.randn(4, 6)], TOP_K, group=dist.group.WORLD, attention_mask=mask)
