"""What ranks run in the tests of what no operator may get wrong, over the table of ``every_operator``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from every_operator import OPERATORS, Operator, cut, outputs
from torch import Tensor
from torch.autograd import forward_ad

import odysseus_kernels as ody
from odysseus_kernels.comm import functional
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.testing.compare import assert_close_to_truth

SEEDS = 8
# Exchanges are linear, and an attention function brings its own derivatives.
TWICE_DIFFERENTIABLE = ("ulysses_attention",)


def _floats(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor.is_floating_point()]


def _gradients(ys: tuple[Tensor, ...], grads: list[Tensor], wanted: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(ys, wanted, [g.reshape(y.shape) for g, y in zip(grads, ys, strict=True)]))


def _truth(operator: Operator, whole: dict[str, Tensor], world: int) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs of the whole inputs, with gradients to come, and leaves."""
    leaves = {name: t.double().requires_grad_() if t.is_floating_point() else t for name, t in whole.items()}
    ys = outputs(operator.whole(leaves, world))
    return ys, [leaves[name] for name in _floats(leaves)]


# ---- strides ---------------------------------------------------------------------------------------------------------


def _transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else _stepped(x)


def _stepped(x: Tensor) -> Tensor:
    """Every second element of a tensor whose others would be noticed."""
    wide = torch.full((*x.shape, 2), torch.nan if x.is_floating_point() else -7, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def _reversed(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def _sliced(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), torch.nan if x.is_floating_point() else -7, dtype=x.dtype)
    wide[..., 2:-3] = x
    return wide[..., 2:-3]


def _constant(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


def _same_rows(x: Tensor) -> Tensor:
    return x[..., :1, :].expand(x.shape) if x.ndim > 1 else x


# Those that repeat an element change what is computed: the truth is made from the same values.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "transposed": (_transposed, False),
    "stepped": (_stepped, False),
    "reversed": (_reversed, False),
    "sliced": (_sliced, False),
    "constant": (_constant, True),
    "same rows": (_same_rows, True),
}


def strides(
    rank: int, world: int, name: str, transport: str, mode: str, layouts: tuple[str, ...] = tuple(LAYOUTS)
) -> None:
    """Each tensor in each layout, and each gradient of an output: values of the dense ones."""
    operator, config = OPERATORS[name], ody.OverlapConfig(transport=transport, mode=mode, timeout_s=60)
    original = operator.inputs(world)
    for layout in layouts:
        change, repeats = LAYOUTS[layout]
        for target in (*original, "gradient"):
            whole = dict(original)
            repeated = repeats and target != "gradient" and whole[target].is_floating_point()
            if repeated:
                whole[target] = change(whole[target]).contiguous()
            ys, leaves = _truth(operator, whole, world)
            generator = torch.Generator().manual_seed(5)
            grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in ys]
            if target == "gradient" and repeats:
                grads = [change(g).contiguous() if g.ndim else g for g in grads]
            truths = [*ys, *_gradients(ys, grads, leaves)]

            own = {key: operator.part(key, value, rank, world) for key, value in whole.items()}
            if target != "gradient" and (repeated or not repeats):
                own[target] = change(own[target])
            wanted = _floats(own)
            own |= {key: own[key].detach().requires_grad_() for key in wanted}
            found = outputs(operator.call(own, group=None, config=config))
            own_grads = [cut(g, operator.out_cut, rank, world) for g in grads]
            if target == "gradient":
                own_grads = [change(g) if g.ndim else g for g in own_grads]
            results = [*found, *_gradients(found, own_grads, [own[key] for key in wanted])]
            cuts = [operator.out_cut] * len(ys) + [operator.cuts[key] for key in wanted]
            for index, (result, truth) in enumerate(zip(results, truths, strict=True)):
                expected = cut(truth, cuts[index], rank, world).detach().reshape(result.shape)
                what = f"{index} of {name} with {target} {layout}"
                # Numbers of size 1 in sums of at most a hundred products; equal rows make some of them cancel.
                torch.testing.assert_close(
                    result.detach(), expected, rtol=1e-12, atol=1e-12, msg=lambda text, what=what: f"{what}: {text}"
                )


def one_element(rank: int, world: int) -> None:
    """A single element is contiguous whatever its stride, which its bytes must not inherit."""
    for transport in ("symmetric", "collective"):
        config = ody.OverlapConfig(transport=transport, timeout_s=60)  # type: ignore[arg-type]
        for dtype in (torch.float64, torch.bfloat16):
            shard = _stepped(torch.full((1,), rank, dtype=dtype))
            assert shard.is_contiguous() and shard.stride() == (2,)
            assert torch.equal(functional.all_gather(shard, config=config), torch.arange(world, dtype=dtype))
            y = ody.zero3_linear(torch.ones(1, 1, dtype=dtype), shard[:, None], shard, group=None, config=config)
            assert torch.equal(y[0], 2 * torch.arange(world, dtype=dtype))


# ---- derivatives -----------------------------------------------------------------------------------------------------


def second_derivatives(rank: int, world: int, name: str) -> None:
    """Of penalties on the gradients: the right ones, or an error."""
    operator, config = OPERATORS[name], ody.OverlapConfig(timeout_s=60)
    whole = operator.inputs(world)

    def penalty(ys: tuple[Tensor, ...], leaves: list[Tensor], square: bool) -> Tensor:
        total = sum(y.square().sum() if square else y.sum() for y in ys)
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        return sum(g.square().sum() for g in grads)  # type: ignore[return-value]

    for square in (True, False):
        own = {key: operator.part(key, value, rank, world).clone() for key, value in whole.items()}
        leaves = [own[key].requires_grad_() for key in _floats(own)]
        found = penalty(outputs(operator.call(own, group=None, config=config)), leaves, square)
        if name not in TWICE_DIFFERENTIABLE:
            with pytest.raises(RuntimeError, match="has no second derivative"):
                torch.autograd.grad(found, leaves)
            continue
        seconds = torch.autograd.grad(found, leaves)
        ys, whole_leaves = _truth(operator, whole, world)
        truths = torch.autograd.grad(penalty(ys, whole_leaves, square), whole_leaves)
        for key, second, truth in zip(_floats(own), seconds, truths, strict=True):
            expected = operator.part(key, truth, rank, world)
            assert_close_to_truth(second, expected, dtype=torch.float64, terms=1024, name=f"{key} of {name}")


def tangents(rank: int, world: int, name: str) -> None:
    """A forward-mode tangent on any one tensor is refused, whether or not others are frozen."""
    operator = OPERATORS[name]
    own = {key: operator.part(key, value, rank, world) for key, value in operator.inputs(world).items()}
    for frozen in (True, False):
        for target in _floats(own):
            with forward_ad.dual_level(), ody.CommRecorder() as record:
                arguments = {k: t.requires_grad_(not frozen) if k in _floats(own) else t for k, t in own.items()}
                arguments[target] = forward_ad.make_dual(own[target], torch.ones_like(own[target]))
                _refused(lambda a=arguments: operator.call(a, group=None), ValueError, "forward-mode tangent")
                assert record.bytes() == 0

    def of_first(x: Tensor) -> Tensor:
        return outputs(operator.call({**own, first: x}, group=None))[0]

    first = _floats(own)[0]
    own = {key: tensor.detach() for key, tensor in own.items()}
    _refused(lambda: torch.func.jvp(of_first, (own[first],), (own[first],)), ValueError, "torch.func.jvp")


def _refused(call: Callable[[], object], kind: type[Exception], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in {caught.value!r}"


# ---- autocast --------------------------------------------------------------------------------------------------------


def autocast(rank: int, world: int, name: str, dtype: str, transport: str) -> None:
    """fp32 tensors under autocast: no further from the truth than stock layers are, gradients in fp32."""
    operator, narrow = OPERATORS[name], getattr(torch, dtype)
    config = ody.OverlapConfig(transport=transport, timeout_s=60)

    def run(call: Callable[[dict[str, Tensor]], Any], tensors: dict[str, Tensor], grads: list[Tensor]) -> list[Tensor]:
        given = {k: t.clone().requires_grad_() if t.is_floating_point() else t for k, t in tensors.items()}
        with torch.autocast("cpu", narrow):
            found = outputs(call(given))
        grads = [g.to(y.dtype) for g, y in zip(grads, found, strict=True)]
        return [*found, *_gradients(found, grads, [given[key] for key in _floats(given)])]

    total = 0
    for seed in range(SEEDS):
        whole = operator.inputs(world, torch.float32, seed)
        ys, leaves = _truth(operator, whole, world)
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in ys]
        truths = [*ys, *_gradients(ys, grads, leaves)]
        stock = run(lambda t: operator.whole(t, world), whole, grads)
        own = {key: operator.part(key, value, rank, world) for key, value in whole.items()}
        own_grads = [cut(g, operator.out_cut, rank, world) for g in grads]
        results = run(lambda t: operator.call(t, group=None, config=config), own, own_grads)
        assert all(result.dtype == torch.float32 for result in results[len(ys) :])
        cuts = [operator.out_cut] * len(ys) + [operator.cuts[key] for key in _floats(own)]
        total = (
            total
            + torch.tensor(
                [
                    [
                        _square(result, cut(truth, dim, rank, world), share=1 if dim is not None else world),
                        _square(one, truth),
                    ]
                    for result, one, truth, dim in zip(results, stock, truths, cuts, strict=True)
                ]
            ).double()
        )
    # Of all ranks and some inputs together: a few dozen elements do not settle a ratio of norms.
    dist.all_reduce(total)
    ratios = (total[:, 0] * world / total[:, 1]).sqrt()
    assert (ratios <= 1.5).all(), f"{name}: {ratios}"


def _square(result: Tensor, truth: Tensor, share: int = 1) -> float:
    return (result.double() - truth.reshape(result.shape)).square().sum().item() / share


def autocast_of_mixed_types(rank: int, world: int) -> None:
    """Under autocast types may differ, as a stock layer's may; fp64 and integers are left alone."""
    x, weight = torch.randn(2, 4, 8, dtype=torch.bfloat16), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = ody.all_gather_linear(x, weight, group=None)
        wide = ody.all_gather_linear(x.double(), weight.double(), group=None)
    assert y.dtype == torch.bfloat16 and wide.dtype == torch.float64
    _refused(lambda: ody.all_gather_linear(x, weight, group=None), ValueError, "bfloat16", "float32")


# ---- refusals --------------------------------------------------------------------------------------------------------


def refusals(rank: int, world: int, name: str) -> None:
    """Odd configurations and tensors: errors that name the argument, before anything is sent."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    operator = OPERATORS[name]
    own = {key: operator.part(key, value, rank, world) for key, value in operator.inputs(world, torch.float32).items()}
    mesh = init_device_mesh("cpu", (world,))
    with ody.CommRecorder() as record:
        for config in ({}, {"mode": "fused"}, "fused", 0):
            _refused(lambda c=config: operator.call(own, group=None, config=c), TypeError, "config", "OverlapConfig")
        for key, tensor in own.items():
            bad = {
                "layout": tensor.to_sparse(),
                "nested": torch.nested.nested_tensor([tensor, tensor]),
                "to_local()": DTensor.from_local(tensor, mesh, run_check=False),
                "NoneType" if key in ("x", "hidden", "q") else "str": None if key in ("x", "hidden", "q") else "text",
            }
            for part, value in bad.items():
                call = lambda k=key, v=value: operator.call({**own, k: v}, group=None)  # noqa: E731
                _refused(call, ValueError, name.split()[-1], "expected", part)
        assert record.bytes() == 0


def more_refusals(rank: int, world: int) -> None:
    x, weight = torch.randn(2, 2 * world, 8), torch.randn(6, 8)
    for dim in (1.0, "1", None, True):
        for call in (ody.all_gather_linear, ody.linear_reduce_scatter):
            _refused(lambda c=call, d=dim: c(x, weight, group=None, dim=d), TypeError, "dim", "whole number", repr(dim))
    q = torch.randn(2, 4, 6, 8)
    for heads, kv_heads in ((0, 2), (4, 0), (0, 0)):
        call = lambda a=heads, b=kv_heads: ody.ulysses_attention(q[:, :a], q[:, :b], q[:, :b], group=None)  # noqa: E731
        _refused(call, ValueError, "at least one head")
        call = lambda a=heads, b=kv_heads: ody.ring_attention(q[:, :a], q[:, :b], q[:, :b], group=None)  # noqa: E731
        _refused(call, ValueError, "without empty dimensions")
    for heads in (0, 2.0, "2", True):
        call = lambda h=heads: ody.linear_all_to_all(x, weight, group=None, heads=h)  # noqa: E731
        _refused(call, (TypeError, ValueError), "heads")  # type: ignore[arg-type]


# ---- nothing to do ---------------------------------------------------------------------------------------------------


def no_rows(rank: int, world: int, name: str, transport: str, mode: str) -> None:
    """Batches of nothing and sequences of nothing: empty results, zero gradients, and the group stays in step."""
    operator, config = OPERATORS[name], ody.OverlapConfig(transport=transport, mode=mode, timeout_s=30)
    for dim in (0, -2):
        whole = operator.inputs(world)
        weights = [key for key in _floats(whole) if key in ("weight", "second", "bias", "gate_up", "down")]
        for key in whole.keys() - set(weights):
            tensor = whole[key]
            whole[key] = tensor[:0] if dim == 0 or tensor.ndim < 3 else tensor[..., :0, :]
        ys, leaves = _truth(operator, whole, world)
        truths = torch.autograd.grad(sum(y.sum() for y in ys), leaves)  # type: ignore[arg-type]
        own = {key: operator.part(key, value, rank, world).clone() for key, value in whole.items()}
        own = {key: value.requires_grad_() if key in _floats(own) else value for key, value in own.items()}
        found = outputs(operator.call(own, group=None, config=config))
        grads = torch.autograd.grad(sum(y.sum() for y in found), [own[key] for key in _floats(own)])  # type: ignore
        for y, truth in zip(found, ys, strict=True):
            assert y.shape == (() if y.ndim == 0 else cut(truth, operator.out_cut, rank, world).shape)
        for key, grad, truth in zip(_floats(own), grads, truths, strict=True):
            assert torch.equal(grad, operator.part(key, truth, rank, world)), key
    whole = operator.inputs(world)
    own = {key: operator.part(key, value, rank, world) for key, value in whole.items()}
    for y, truth in zip(
        outputs(operator.call(own, group=None, config=config)), _truth(operator, whole, world)[0], strict=True
    ):
        expected = cut(truth, operator.out_cut, rank, world).detach().reshape(y.shape)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


# ---- ranks that differ -----------------------------------------------------------------------------------------------


def differs(rank: int, world: int, transport: str, name: str, what: str) -> str:
    """The last rank passes something else than the others: all are told, whatever it is that they rely on."""
    operator, last = OPERATORS[name], rank == world - 1
    own = {key: operator.part(key, value, rank, world) for key, value in operator.inputs(world).items()}
    settings: dict[str, Any] = {}
    if what == "bias":
        own["bias"] = None if last else own["bias"]
    elif what in own:
        own[what] = own[what][: own[what].shape[0] - last]
        if what == "weight":
            own["bias"] = own["bias"][: own["weight"].shape[0]]
        if "targets" in own and what == "weight":
            own["targets"] = own["targets"] % 4  # in everybody's vocabulary
    else:
        settings[what] = {"ignore_index": -1 - last, "activation": "gelu" if last else "silu"}[what]
    group = dist.new_group()
    config = ody.OverlapConfig(transport=transport, timeout_s=30)
    try:
        operator.call(own, group=group, config=config, **settings)
    except ody.RankMismatchError as error:
        return str(error)
    finally:
        group_transports(group).close()
        dist.destroy_process_group(group)
    raise AssertionError(f"{name}, {what}: no RankMismatchError")


# ---- vocabularies that ranks hold unequal parts of -------------------------------------------------------------------


def uneven_vocabulary(rank: int, world: int, tokens: str, transport: str, counts: tuple[int, ...]) -> None:
    from odysseus_kernels.ops import vocab_parallel_linear_cross_entropy as loss_of

    generator = torch.Generator().manual_seed(0)
    rows, vocabulary = 6, sum(counts)
    hidden = torch.randn(rows * world, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.arange(rows * world) % vocabulary
    first = sum(counts[:rank])
    tokens_here = slice(rank * rows, (rank + 1) * rows) if tokens == "sharded" else slice(None)
    columns = slice(first, first + counts[rank])

    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    each = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*leaves), targets, reduction="none")
    each.sum().backward()
    own = [t.clone().requires_grad_() for t in (hidden[tokens_here], weight[columns], bias[columns])]
    config = ody.OverlapConfig(transport=transport, timeout_s=30)  # type: ignore[arg-type]
    value = loss_of(
        own[0], targets[tokens_here], *own[1:], group=None, tokens=tokens, vocabulary_rows=counts, config=config
    )
    value.backward()
    torch.testing.assert_close(value.detach(), each[tokens_here].sum().detach(), rtol=1e-12, atol=0)
    parts = (tokens_here, columns, columns)
    for mine, leaf, part in zip(own, leaves, parts, strict=True):
        torch.testing.assert_close(mine.grad, leaf.grad[part], rtol=1e-10, atol=1e-12)

    for bad, message in (((5,), "for each of"), ([counts[rank] + 1] * world, "for rank"), ([0] * world, "for each of")):
        _refused(
            lambda b=bad: loss_of(own[0], targets[tokens_here], own[1], group=None, tokens=tokens, vocabulary_rows=b),
            ValueError, "vocabulary_rows", message,
        )  # fmt: skip
