"""torch's own fused operators as a peer: how they are called, and what is said where there are none."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.operators.cases import Case
from benchmarks.operators.torch_fused import torch_fused

pytestmark = pytest.mark.without_ranks

_GATHER = Case("small", "all_gather_linear", 8, 4, (3, 2), False)
_SCATTER = Case("small", "linear_reduce_scatter", 8, 4, (3,), False)
_CPU = torch.device("cpu")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _stand_in(group: dist.ProcessGroup) -> Any:
    """The operators by the schemas that torch registers them with, for one rank."""

    def gather(a: Tensor, bs: list[Tensor], gather_dim: int, group_name: str, *, return_A: bool = True) -> Any:
        assert (gather_dim, group_name, return_A) == (0, group.group_name, False)
        return None, [a @ b for b in bs]

    def scatter(a: Tensor, b: Tensor, reduce_op: str, scatter_dim: int, group_name: str) -> Tensor:
        assert (reduce_op, scatter_dim, group_name) == ("sum", 0, group.group_name)
        return a @ b

    return types.SimpleNamespace(fused_all_gather_matmul=gather, fused_matmul_reduce_scatter=scatter)


@pytest.mark.parametrize("case", (_GATHER, _SCATTER), ids=lambda case: case.operator)
def test_results_are_those_of_the_products(case: Case, group: dist.ProcessGroup) -> None:
    x = torch.randn(case.tokens, case.inner, requires_grad=True)
    weights = [torch.randn(n, case.inner, requires_grad=True) for n in case.outer]
    run, reason = torch_fused(case, x, weights, _CPU, namespace=_stand_in(group), group=group)
    assert run is not None and reason == ""
    outputs = run()
    assert len(outputs) == len(weights)
    for output, weight in zip(outputs, weights, strict=True):
        torch.testing.assert_close(output, x.detach() @ weight.detach().t())
        assert not output.requires_grad


def test_calls_fit_the_operators_of_this_torch() -> None:
    for name, arguments in (
        ("fused_all_gather_matmul", ["A", "Bs", "gather_dim", "group_name", "return_A"]),
        ("fused_matmul_reduce_scatter", ["A", "B", "reduce_op", "scatter_dim", "group_name"]),
    ):
        schema = getattr(torch.ops.symm_mem, name).default._schema
        assert [argument.name for argument in schema.arguments] == arguments


def test_where_there_is_none_a_line_says_why(group: dist.ProcessGroup) -> None:
    x, weights = torch.zeros(8, 4), [torch.zeros(3, 4)]

    def fails(*arguments: Any, **others: Any) -> Any:
        raise RuntimeError("no multicast\nand much more")

    backward = Case("small", "linear_reduce_scatter", 8, 4, (3,), True)
    zero3 = Case("small", "zero3_linear", 8, 4, (3,), False)
    broken = types.SimpleNamespace(fused_matmul_reduce_scatter=fails)
    for case, namespace, said in (
        (zero3, None, "torch has no operator for zero3_linear"),
        (backward, None, "torch's operators have no derivative"),
        (_SCATTER, None, "torch's operators are for GPUs, not for cpu"),
        (_SCATTER, types.SimpleNamespace(), "this torch has no fused_matmul_reduce_scatter"),
        (_SCATTER, broken, "no multicast"),
    ):
        assert torch_fused(case, x, weights, _CPU, namespace=namespace, group=group) == (None, said)
