"""What ranks run in the tests of Ulysses' operators beside their numbers: bytes, memory, messages and graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from ulysses_cases import groups

import odysseus_kernels as ody
from benchmarks.common.memory import peak_of_others, record_allocations


def traffic(
    rank: int, world: int, mode: str, transport: str, dtype: str, kv_heads: int, rings: int
) -> dict[str, dict[str, int]]:
    """Bytes by operator and collective: x [2, 6, 24], heads of 12, no biases."""
    kind, head_dim, features = getattr(torch, dtype), 12, 24
    config = ody.OverlapConfig(mode=mode, transport=transport, timeout_s=30)
    group, everyone = groups(rings)
    size = world // rings
    counts = (2 * size, kv_heads, kv_heads)
    x = torch.randn(2, 6, features, dtype=kind, requires_grad=True)
    weights = [torch.randn(n * head_dim // world, features, dtype=kind, requires_grad=True) for n in counts]
    out = torch.randn(features, 2 * head_dim * size // world, dtype=kind, requires_grad=True)
    found: dict[str, dict[str, int]] = {}
    with ody.CommRecorder() as record:
        q, k, v = ody.linear_all_to_all(x, weights, group=group, heads=counts, zero3_group=everyone, config=config)
        y = q * k.sum(-1, keepdim=True) * v.sum(-1, keepdim=True)
        y = ody.all_to_all_linear(y, out, group=group, zero3_group=everyone, config=config)
        y.sum().backward()
    for row in record.rows():
        name = f"{row['phase']} {row['collective']}"
        found.setdefault(str(row["operator"]), {})[name] = int(row["bytes"])
    return found


def attention_traffic(rank: int, world: int, kv_heads: int) -> dict[str, int]:
    q = torch.randn(2, 2 * world, 6, 12, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 6, 12, requires_grad=True) for _ in range(2))
    with ody.CommRecorder() as record:
        ody.ulysses_attention(q, k, v, group=None).sum().backward()
    return {f"{row['operator']} {row['phase']} {row['collective']}": int(row["bytes"]) for row in record.rows()}


def saved(rank: int, world: int) -> tuple[list[int], list[int]]:
    """Elements of what is kept for backward and is neither x nor a parameter: of the first projections, and of both."""
    x = torch.randn(2, 6, 24, requires_grad=True)
    weights = [torch.randn(rows // world, 24, requires_grad=True) for rows in (24 * world, 12 * world, 12 * world)]
    out = torch.randn(24, 24, requires_grad=True)
    known = {tensor.data_ptr() for tensor in (x, out, *weights)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():  # beside a flag
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor.detach()  # itself, it would hold the graph where a node saves its own output

    q, *_ = ody.linear_all_to_all(x, weights, group=None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ody.linear_all_to_all(x, weights, group=None)
        first = [count for address, count in kept.items() if address not in known]
        ody.all_to_all_linear(q, out, group=None)
    return first, [count for address, count in kept.items() if address not in known]


def largest_allocation(rank: int, world: int, operator: str, mode: str) -> float:
    """The largest single allocation of forward and backward beside results, in shards of a weight [1024, 256]."""
    config = ody.OverlapConfig(mode=mode, transport="symmetric", timeout_s=60)
    first = operator == "linear_all_to_all"
    x = torch.randn(4 if first else 4 * world, 256 if first else 1024 // world, requires_grad=True)
    w = torch.randn(*((1024 // world, 256) if first else (256, 1024 // world)), requires_grad=True)

    def call() -> list[Tensor]:
        y = getattr(ody, operator)(x, w, group=None, config=config)
        return [y, *torch.autograd.grad(y.sum(), (x, w))]

    for _ in range(3):  # until the transport's windows have been used in turn
        call()
    dist.barrier()
    results, events = record_allocations(call)
    _, largest = peak_of_others(events, {result.untyped_storage().data_ptr() for result in results})
    return largest / w.nbytes


def messages(rank: int, world: int) -> dict[str, str]:
    from input_cases import _message

    x, w, o = torch.randn(2, 4, 8), torch.randn(6, 8), torch.randn(8, 6)
    qkv, a2al, attend = ody.linear_all_to_all, ody.all_to_all_linear, ody.ulysses_attention
    seven = dist.group.WORLD
    tiles = ody.OverlapConfig(mode="tiles")

    def heads(*counts: int) -> list[Tensor]:
        return [torch.randn(1, count, 4, 8) for count in counts]

    return {
        "inner": _message(lambda: qkv(x, torch.randn(6, 7), group=None)),
        "bias": _message(lambda: qkv(x, w, torch.randn(5), group=None)),
        "biases": _message(lambda: qkv(x, (w, w), (None,), group=None)),
        "vector": _message(lambda: qkv(torch.randn(8), w, group=None)),
        "heads": _message(lambda: qkv(x, (w, w), heads=(6, 3), group=None)),
        "head counts": _message(lambda: qkv(x, (w, w), heads=(4,), group=None)),
        "head rows": _message(lambda: qkv(x, (w, w), heads=(8, 2), group=None)),
        "no heads": _message(lambda: qkv(x, w, heads=0, group=None)),
        "tiles": _message(lambda: qkv(x, w, group=None, config=tiles)),
        "out inner": _message(lambda: a2al(x, torch.randn(6, 7), group=None)),
        "out length": _message(lambda: a2al(torch.randn(2, 3, 6), o, group=None)),
        "out bias": _message(lambda: a2al(x[..., :6], o, torch.randn(8), group=None)),
        "out dtype": _message(lambda: a2al(x[..., :6], o.double(), group=None)),
        "zero3 group": _message(lambda: a2al(x[..., :6], o, group=None, zero3_group=groups(2)[0])),
        "attention dims": _message(lambda: attend(x, x, x, group=seven)),
        "attention heads": _message(lambda: attend(*heads(3, 3, 3), group=None)),
        "attention kv": _message(lambda: attend(*heads(4, 3, 3), group=None)),
        "attention dtype": _message(lambda: attend(*heads(2, 2), heads(2)[0].double(), group=None)),
    }


def odd_rank(rank: int, world: int, what: str, transport: str, mode: str) -> str:
    """The error of a step in which rank 1 has a bias, or wants a gradient, of another projection of the same shape."""
    config = ody.OverlapConfig(transport=transport, mode=mode, timeout_s=30)  # type: ignore[arg-type]
    x, weights = torch.randn(2, 6, 24), [torch.randn(12, 24) for _ in range(3)]
    biases = [torch.randn(12) for _ in range(3)]
    index = 1 if rank == 1 else 2
    given: list[Tensor | None] = list(biases)
    if what == "bias":
        given[index] = None
    else:
        (weights if what == "frozen" else biases)[index].requires_grad_()
    try:
        q, k, v = ody.linear_all_to_all(x, weights, given, group=None, config=config)
        (q + k + v).sum().backward()
    except ody.RankMismatchError as error:
        return str(error)
    return "no error"


def attention_that_returns_nonsense(rank: int, world: int) -> str:
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    try:
        ody.ulysses_attention(q, k, v, group=None, attention=lambda q, k, v: q.transpose(1, 2))
    except ValueError as error:
        return str(error)
    raise AssertionError("no ValueError")


def opcheck(rank: int, world: int) -> None:
    name, key = dist.group.WORLD.group_name, ody.OverlapConfig(timeout_s=30).key()

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    operators = torch.ops.odysseus
    weights, biases = [tensor(4, 8), tensor(3, 8)], [tensor(4)]
    sharers = [1, world]
    arguments = (tensor(2, 3, 8), weights, biases, [True, False], sharers, name, name, key, [], "")
    torch.library.opcheck(operators.linear_all_to_all.default, arguments)
    for keep in (False, True):
        arguments = (tensor(2, 3 * world, 4), tensor(2 * world, 4), tensor(2), name, name, key, keep, [], "")
        # Without what was received there is no gradient of the weight, and the operator is not called so.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(
            operators.all_to_all_linear.default,
            arguments if keep else tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments),
            **({} if keep else {"test_utils": tests}),
        )
    torch.library.opcheck(operators.tokens_to_heads.default, ([tensor(2, 2 * world, 3, 4)], name, key, "forward"))
    torch.library.opcheck(operators.heads_to_tokens.default, ([tensor(2, 2, 3 * world, 4)], name, key, "forward"))


def compiled(rank: int, world: int) -> None:
    """Projections, attention by heads, output projection: one graph, or recomputed, and the same numbers."""
    torch.manual_seed(rank)
    config = ody.OverlapConfig(timeout_s=60)

    def layer(x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, last: Tensor) -> Tensor:
        counts = (2 * world, 1, 1)
        query, key, value = ody.linear_all_to_all(
            x, (q, k, v), (bias, None, None), group=None, heads=counts, config=config
        )
        y = ody.all_to_all_linear(
            query * key.mean(-1, keepdim=True) + value.mean(-1, keepdim=True), out, last, group=None, config=config
        )
        split = y.unflatten(-1, (2 * world, -1)).transpose(1, 2)
        return ody.ulysses_attention(split, split, split, group=None, config=config).cos()

    shapes = ((2, 3, 8), (8, 8), (4 // world, 8), (4 // world, 8), (8,), (8 * world, 8), (8,))
    inputs = [torch.randn(*shape, requires_grad=True) for shape in shapes]

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(*inputs)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]

    expected = results(layer)
    recomputed = results(lambda *tensors: checkpoint(layer, *tensors, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(recomputed, expected, strict=True))
    for one, other in zip(results(torch.compile(layer, fullgraph=True, backend="aot_eager")), expected, strict=True):
        # The compiler may reorder the elementwise part: rounding in fp32, on sums of a few dozen terms.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
