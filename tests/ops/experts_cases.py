"""What ranks run in the tests of zero3_experts: all experts on all tokens in fp64, against what each rank gets."""

from __future__ import annotations

import dataclasses
import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from operator_cases import poison_windows
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import odysseus_kernels as ody
from odysseus_kernels.ops import zero3_experts
from odysseus_kernels.testing.compare import assert_close_to_truth, nan_empty

FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
NAMES = ("input", "routing", "gate_up", "down")


@dataclasses.dataclass
class Problem:
    """Sizes of one case; ``tokens`` of each rank, ``unused`` experts that no token is sent to."""

    experts: int
    tokens: tuple[int, ...]
    width: int = 12
    intermediate: int = 10
    top_k: int = 2
    unused: int = 0
    activation: str = "silu"
    routing_dtype: str = ""


@dataclasses.dataclass
class Data:
    """All ranks' tensors and this rank's slices of them."""

    x: Tensor
    index: Tensor
    routing: Tensor
    gate_up: Tensor
    down: Tensor
    grad: Tensor
    rows: slice
    held: slice

    @staticmethod
    def of(problem: Problem, rank: int, world: int, dtype: torch.dtype) -> Data:
        generator = torch.Generator().manual_seed(world)

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        tokens, experts, width, inner = sum(problem.tokens), problem.experts, problem.width, problem.intermediate
        scores = torch.rand(tokens, experts - problem.unused, generator=generator)
        routing, index = scores.topk(problem.top_k, dim=-1)
        first = sum(problem.tokens[:rank])
        count = experts // world
        routing_dtype = getattr(torch, problem.routing_dtype) if problem.routing_dtype else dtype
        return Data(
            make(tokens, width),
            index + problem.unused,
            routing.to(routing_dtype),
            make(experts, 2 * inner, width).mul_(0.5),
            make(experts, width, inner),
            make(tokens, width),
            slice(first, first + problem.tokens[rank]),
            slice(rank * count, (rank + 1) * count),
        )

    def own(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, index, routing and shards of this rank, those with gradients as leaves."""
        cuts = (
            (self.x, self.rows),
            (self.index, self.rows),
            (self.routing, self.rows),
            (self.gate_up, self.held),
            (self.down, self.held),
        )
        own = [tensor[part].clone() for tensor, part in cuts]
        for tensor in (own[0], *own[2:]):
            tensor.requires_grad_()
        return own[0], own[1], own[2], own[3], own[4]


def dense(x: Tensor, index: Tensor, routing: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Every expert on every token, weighted by zero where it was not chosen: no code in common with the operator."""
    experts = gate_up.shape[0]
    chosen = (F.one_hot(index, experts) * routing[..., None]).sum(1)
    gate, up = torch.einsum("td,eid->tei", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("te,tei,edi->td", chosen, FUNCTIONS[activation](gate) * up, down)


def truth(data: Data, activation: str) -> dict[str, Tensor]:
    wide = [t.to(torch.float64, copy=True).requires_grad_() for t in (data.x, data.routing, data.gate_up, data.down)]
    y = dense(wide[0], data.index, wide[1], wide[2], wide[3], activation)
    y.backward(data.grad.double())
    parts = (data.rows, data.rows, data.held, data.held)
    found = {name: one.grad[part] for name, one, part in zip(NAMES, wide, parts, strict=True)}
    return {"output": y[data.rows]} | found


def run(data: Data, activation: str, config: ody.OverlapConfig) -> dict[str, Tensor]:
    x, index, routing, gate_up, down = data.own()
    poison_windows()
    with nan_empty():
        y = zero3_experts(x, index, routing, gate_up, down, activation=activation, group=None, config=config)
        y.backward(data.grad[data.rows])
    return {"output": y.detach()} | {
        name: leaf.grad for name, leaf in zip(NAMES, (x, routing, gate_up, down), strict=True)
    }


def check(rank: int, world: int, problem: Problem, dtype: str, transport: str) -> None:
    """Output and every gradient in both modes."""
    kind = getattr(torch, dtype)
    data = Data.of(problem, rank, world, kind)
    expected = truth(data, problem.activation)
    # Errors of three products in a row add up, each over at most this many terms: thrice the error is nine times the
    # terms.  At least 64, as the error of a few terms is no random walk.
    terms = 9 * max(64, sum(problem.tokens), problem.width, 2 * problem.intermediate)
    # In 16 bits a weight's gradient is rounded most often: the products with gate and up, grad @ down, what it makes of
    # them, each rank's part, and the sum.
    roundings = 5
    for mode in ("unfused", "fused"):
        config = ody.OverlapConfig(mode=mode, transport=transport, timeout_s=30)
        for name, actual in run(data, problem.activation, config).items():
            if name == "routing":
                # In its own type, but no better than the products of x's type that it is made of.
                assert actual.dtype == data.routing.dtype
                actual = actual.to(kind)
            assert_close_to_truth(
                actual,
                expected[name],
                dtype=kind,
                terms=terms,
                roundings=roundings,
                name=f"{name} of {mode}, {transport}, {problem}",
            )


def unused_experts(rank: int, world: int) -> None:
    """An expert without tokens on any rank has a gradient of exact zeros, whatever memory held before."""
    problem = Problem(experts=3 * world, tokens=(8,) * world, unused=world)
    data = Data.of(problem, rank, world, torch.float32)
    for mode, transport in itertools.product(("fused", "unfused"), ("symmetric", "collective")):
        found = run(data, "silu", ody.OverlapConfig(mode=mode, transport=transport, timeout_s=30))
        for name in ("gate_up", "down"):
            for expert, gradient in zip(range(data.held.start, data.held.stop), found[name], strict=True):
                assert expert >= problem.unused or not gradient.any()


def traffic(rank: int, world: int, transport: str, mode: str, dtype: str) -> dict[str, int]:
    """Bytes by phase and collective; 4 experts a rank of 3 * 12 * 10 elements."""
    problem = Problem(experts=4 * world, tokens=tuple(range(3, 3 + world)))
    data = Data.of(problem, rank, world, getattr(torch, dtype))
    with ody.CommRecorder() as record:
        run(data, "silu", ody.OverlapConfig(mode=mode, transport=transport, timeout_s=30))
    assert record.bytes() == record.bytes(operator="zero3_experts")
    return {f"{row['phase']} {row['collective']}": int(row["bytes"]) for row in record.rows()}


def saved_elements(rank: int, world: int) -> int:
    """Elements kept for backward beside the arguments."""
    data = Data.of(Problem(experts=4 * world, tokens=(6,) * world), rank, world, torch.float32)
    x, index, routing, gate_up, down = data.own()
    arguments = {tensor.data_ptr() for tensor in (x, index, routing, gate_up, down)}
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        zero3_experts(x, index, routing, gate_up, down, group=None).sum().backward()
    with torch.no_grad():  # keeps nothing
        assert not zero3_experts(x, index, routing, gate_up, down, group=None).requires_grad
    return sum(tensor.numel() for tensor in saved if tensor.data_ptr() not in arguments)


def opcheck(rank: int, world: int) -> None:
    data = Data.of(Problem(experts=2 * world, tokens=(5,) * world), rank, world, torch.float32)
    name, key = dist.group.WORLD.group_name, ody.OverlapConfig(timeout_s=30).key()
    for keep in (True, False):
        # Without keeping there is nothing to go backward from: the public function keeps wherever gradients are wanted.
        tensors = [tensor.detach().requires_grad_(keep and tensor.is_floating_point()) for tensor in data.own()]
        torch.library.opcheck(torch.ops.odysseus.zero3_experts.default, (*tensors, "silu", name, key, keep, [], ""))


def compiled(rank: int, world: int) -> None:
    data = Data.of(Problem(experts=2 * world, tokens=(5,) * world), rank, world, torch.float32)
    config = ody.OverlapConfig(timeout_s=60)

    def layer(x: Tensor, index: Tensor, routing: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        y = zero3_experts(x.sin(), index, routing.softmax(-1), gate_up, down, group=None, config=config)
        return y.cos()

    def gradients(function: object) -> list[Tensor]:
        x, index, routing, gate_up, down = data.own()
        y = function(x, index, routing, gate_up, down)  # type: ignore[operator]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, routing, gate_up, down))]

    expected = gradients(layer)
    for actual in (
        gradients(torch.compile(layer, fullgraph=True, backend="aot_eager")),
        gradients(lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False)),
    ):
        for one, other in zip(actual, expected, strict=True):
            # The same operators on the same numbers; tracing may reorder the elementwise part.
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def some_gradients(rank: int, world: int) -> dict[tuple[bool, ...], int]:
    """Whatever subset wants gradients, those are right, the others None; returns bytes of backward for each."""
    data = Data.of(Problem(experts=2 * world, tokens=(5,) * world), rank, world, torch.float32)
    config = ody.OverlapConfig(timeout_s=30)
    expected = run(data, "silu", config)
    sent = {}
    for mask in itertools.product((False, True), repeat=4):
        if not any(mask):
            continue
        x, index, routing, gate_up, down = data.own()
        leaves = (x, routing, gate_up, down)
        for leaf, wanted in zip(leaves, mask, strict=True):
            leaf.requires_grad_(wanted)
        with ody.CommRecorder() as record:
            zero3_experts(x, index, routing, gate_up, down, group=None, config=config).backward(data.grad[data.rows])
        for leaf, name, wanted in zip(leaves, NAMES, mask, strict=True):
            assert torch.equal(leaf.grad, expected[name]) if wanted else leaf.grad is None
        sent[mask] = record.bytes(phase="backward")
    return sent


def messages(rank: int, world: int) -> dict[str, str]:
    """Bad input on every rank: what the error says, and that nothing was sent before it."""
    x, index, routing = torch.randn(3, 8), torch.zeros(3, 2, dtype=torch.int64), torch.rand(3, 2)
    gate_up, down = torch.randn(2, 12, 8), torch.randn(2, 8, 6)

    def message(*arguments: object, **keywords: object) -> str:
        with ody.CommRecorder() as record:
            try:
                zero3_experts(*arguments, **({"group": None} | keywords))  # type: ignore[arg-type]
            except ValueError as error:
                assert record.bytes() == 0, "something was sent before the input was refused"
                return str(error)
        raise AssertionError("no ValueError")

    return {
        "width": message(torch.randn(3, 7), index, routing, gate_up, down),
        "down": message(x, index, routing, gate_up, torch.randn(2, 8, 5)),
        "odd": message(x, index, routing, torch.randn(2, 11, 8), down),
        "dimensions": message(x[None], index, routing, gate_up, down),
        "tensor": message(x, [[0, 1]], routing, gate_up, down),
        "tokens": message(x, index[:2], routing, gate_up, down),
        "routing": message(x, index, routing[:, :1], gate_up, down),
        "index type": message(x, index.float(), routing, gate_up, down),
        "type": message(x, index, routing, gate_up.double(), down),
        "integers": message(x.long(), index, routing, gate_up, down),
        "device": message(x, index, routing, gate_up, down.to("meta")),
        "range": message(x, index + 2 * world, routing, gate_up, down),
        "negative": message(x, index - 1, routing, gate_up, down),
        "activation": message(x, index, routing, gate_up, down, activation="tanh"),
        "tiles": message(x, index, routing, gate_up, down, config=ody.OverlapConfig(mode="tiles")),
    }
