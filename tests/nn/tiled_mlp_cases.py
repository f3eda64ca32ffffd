"""What ranks run in the tests of feed-forward networks in tiles: stock networks of transformers, whole and cut."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, Starcoder2Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2MLP

import odysseus_kernels as ody
from benchmarks.common.memory import peak_of_others, record_allocations
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.mlp import MLPSpec, SequenceParallelMLP, TensorParallelMLP, Zero3MLP
from odysseus_kernels.nn.parameters import Cut, distribute_parameter
from odysseus_kernels.nn.swap import swap_class
from odysseus_kernels.testing.compare import assert_close_to_truth, nan_empty, relative_error

SPECS = {
    "gated": MLPSpec(gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn"),
    "plain": MLPSpec(gate=None, up="c_fc", down="c_proj", activation="act", dropout="residual_dropout"),
}
CLASSES = {"odysseus": Zero3MLP, "tp_sp": SequenceParallelMLP, "tp": TensorParallelMLP}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network and how it is run; ``tokens`` of each rank in each of ``batch`` sequences."""

    kind: str = "gated"
    strategy: str = "odysseus"
    tile_rows: int | None = 3
    tokens: int = 8
    batch: int = 2
    width: int = 12
    intermediate: int = 24
    dtype: torch.dtype = torch.float64
    mode: str = "fused"
    transport: str = "symmetric"
    frozen: tuple[str, ...] = ()
    checkpointed: bool = False
    ring: int = 1

    @property
    def config(self) -> ody.OverlapConfig:
        return ody.OverlapConfig(
            mode=self.mode,  # type: ignore[arg-type]
            transport=self.transport,  # type: ignore[arg-type]
            tile_rows=self.tile_rows,
            timeout_s=60,
        )


def make_block(problem: Problem) -> nn.Module:
    """A stock network with random weights, the same on every rank."""
    sizes = {"hidden_size": problem.width, "intermediate_size": problem.intermediate, "num_attention_heads": 1}
    block: nn.Module = (
        LlamaMLP(LlamaConfig(num_key_value_heads=1, **sizes, mlp_bias=True))
        if problem.kind == "gated"
        else Starcoder2MLP(Starcoder2Config(num_key_value_heads=1, **sizes, use_bias=True, residual_dropout=0.0))
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in block.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).mul_(0.3)
        parameter.requires_grad_(not any(part in name for part in problem.frozen))
    return block.to(problem.dtype)


def make_mesh(world: int, ring: int) -> DeviceMesh:
    if ring == 1:
        return init_device_mesh("cpu", (world,), mesh_dim_names=("seq",))
    return init_device_mesh("cpu", (ring, world // ring), mesh_dim_names=("ring", "seq"))


def distribute(block: Any, problem: Problem, mesh: DeviceMesh) -> SequenceGroup:
    """Cuts the network in place."""
    tokens = "replicated" if problem.strategy == "tp" else "sharded"
    group = dataclasses.replace(SequenceGroup.of(mesh, problem.config), tokens=tokens)
    spec = SPECS[problem.kind]
    for name in (spec.gate, spec.up, spec.down):
        if name is None:
            continue
        layer = getattr(block, name)
        if problem.strategy == "odysseus":
            weight = bias = Cut(0, "everyone")
        elif name == spec.down:
            weight, bias = Cut(1), Cut()
        else:
            weight = bias = Cut(0)
        layer.weight = distribute_parameter(layer.weight, group, weight)
        layer.bias = distribute_parameter(layer.bias, group, bias)
    swap_class(block, CLASSES[problem.strategy])
    block.sequence_group, block.mlp_spec = group, spec
    return group


def inputs(problem: Problem, world: int) -> tuple[Tensor, Tensor]:
    """x and the output's gradient [B, all tokens, d]."""
    generator = torch.Generator().manual_seed(2)
    shape = (problem.batch, problem.tokens * world, problem.width)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(problem.dtype), grad.to(problem.dtype)


def run(block: nn.Module, problem: Problem, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and all gradients, whole."""
    x = x.detach().clone().requires_grad_("x" not in problem.frozen)
    y = checkpoint(block, x, use_reentrant=False) if problem.checkpointed else block(x)
    y.backward(grad)
    found = {"output": y.detach()} | ({} if x.grad is None else {"input": x.grad})
    for name, parameter in block.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found


def part_of(problem: Problem, tensor: Tensor, rank: int, world: int) -> Tensor:
    """This rank's tokens; under TP those of its ring rank."""
    parts = problem.ring if problem.strategy == "tp" else world
    return tensor.chunk(parts, 1)[rank * parts // world]


def check(rank: int, world: int, problems: list[Problem]) -> None:
    """Tiles give what the whole network gives in fp64, output and all gradients."""
    for problem in problems:
        stock = make_block(problem)
        x, grad = inputs(problem, world)
        truth = run(copy.deepcopy(stock).double(), problem, x.double(), grad.double())
        block = copy.deepcopy(stock)
        distribute(block, problem, make_mesh(world, problem.ring))
        with nan_empty():
            actual = run(block, problem, *(part_of(problem, one, rank, world) for one in (x, grad)))
        assert actual.keys() == truth.keys()
        for name, result in actual.items():
            expected = truth[name]
            if name in ("output", "input"):
                expected = part_of(problem, expected, rank, world)
            # Three products in a row: three times the error of one is nine times the terms, of which the longest sum
            # has as many as there are tokens.
            terms = 9 * max(problem.intermediate, problem.batch * problem.tokens * world)
            assert_close_to_truth(result, expected, dtype=problem.dtype, terms=terms, name=f"{name} of {problem}")


def errors_in_16_bits(rank: int, world: int, problem: Problem) -> dict[str, tuple[float, float]]:
    """Errors against fp64 of each result with tiles, and without."""
    stock = make_block(problem)
    x, grad = inputs(problem, world)
    truth = run(copy.deepcopy(stock).double(), problem, x.double(), grad.double())
    found = []
    for rows in (problem.tile_rows, None):
        block, own = copy.deepcopy(stock), dataclasses.replace(problem, tile_rows=rows)
        distribute(block, own, make_mesh(world, 1))
        found.append(run(block, own, *(part_of(own, one, rank, world) for one in (x, grad))))
    errors = {}
    for name in truth:
        one = part_of(problem, truth[name], rank, world) if name in ("output", "input") else truth[name]
        errors[name] = (relative_error(found[0][name], one), relative_error(found[1][name], one))
    return errors


def peaks(rank: int, world: int, problem: Problem) -> dict[str, int]:
    """Most bytes held in forward and in backward, results included."""
    block = make_block(problem)
    distribute(block, problem, make_mesh(world, problem.ring))
    x, grad = (part_of(problem, one, rank, world).contiguous() for one in inputs(problem, world))
    x.requires_grad_()
    block(x).backward(grad)  # buffers and gradients are there
    for tensor in (x, *block.parameters()):
        tensor.grad = None
    (y,), events = record_allocations(lambda: [block(x)])
    found = {"forward": peak_of_others(events, set())[0]}

    def backward() -> list[Tensor]:
        y.backward(grad)
        return []

    _, events = record_allocations(backward)
    return {**found, "backward": peak_of_others(events, set())[0]}


def refused_derivative(rank: int, world: int) -> None:
    for strategy in CLASSES:
        problem = Problem(strategy=strategy)
        block: Any = make_block(problem)
        distribute(block, problem, make_mesh(world, 1))
        x = part_of(problem, inputs(problem, world)[0], rank, world).requires_grad_()
        (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            gradient.square().sum().backward()


def under_autocast(rank: int, world: int) -> None:
    """What travels and what comes back have the types that they have without tiles."""
    problem = Problem(dtype=torch.float32)
    block = make_block(problem)
    distribute(block, problem, make_mesh(world, 1))
    x, grad = (part_of(problem, one, rank, world) for one in inputs(problem, world))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), ody.CommRecorder() as record:
        y = block(x)
        assert y.dtype == torch.bfloat16
        y.backward(grad.bfloat16())
    assert x.grad is not None and x.grad.dtype == torch.float32
    weights = 3 * problem.width * problem.intermediate // world * 2
    biases = 2 * problem.intermediate // world * 2
    assert record.bytes(phase="forward") == weights + biases + problem.width // world * 2
    assert record.bytes(phase="backward", collective="all_gather") == weights + biases
