"""torch's own fused operators, as a peer: ``torch.ops.symm_mem.fused_all_gather_matmul`` and the like.

They exist for CUDA tensors, have no derivative and need GPUs that map one another's memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.operators.cases import Case

__all__ = ["TORCH_FUSED", "torch_fused"]

TORCH_FUSED = "torch fused"
"""Name of the variant."""

_NAMES = {
    "all_gather_linear": "fused_all_gather_matmul",
    "linear_reduce_scatter": "fused_matmul_reduce_scatter",
}
Run = Callable[[], tuple[Tensor, ...]]


def torch_fused(
    case: Case,
    x: Tensor,
    weights: Sequence[Tensor],
    device: torch.device,
    *,
    namespace: Any = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Run | None, str]:
    """torch's operator for ``case`` and an empty text, or None and why there is none.  All ranks call it together.

    Args:
        case: the row.
        x: this rank's input: [L/N, K] of all_gather_linear, [L, k] of linear_reduce_scatter.
        weights: [n, K] of this rank, one for each projection.
        device: of the tensors.
        namespace: where the operators are; ``torch.ops.symm_mem`` by default.
        group: the default group by default.
    """
    name = _NAMES.get(case.operator)
    if name is None:
        return None, f"torch has no operator for {case.operator}"
    if case.backward:
        return None, "torch's operators have no derivative"
    if device.type != "cuda" and namespace is None:
        return None, f"torch's operators are for GPUs, not for {device.type}"
    namespace = torch.ops.symm_mem if namespace is None else namespace
    group = dist.group.WORLD if group is None else group
    assert group is not None
    operator = getattr(namespace, name, None)
    failure = "" if operator is not None else f"this torch has no {name}"
    left, rights = x.detach(), [weight.detach().t() for weight in weights]

    def run() -> tuple[Tensor, ...]:
        assert operator is not None
        if name == "fused_all_gather_matmul":
            _, outputs = operator(left, rights, 0, group.group_name, return_A=False)
            return tuple(outputs)
        return (operator(left, rights[0], "sum", 0, group.group_name),)

    if not failure:
        try:
            _enable(group)
            run()
        except (RuntimeError, NotImplementedError) as error:
            failure = str(error).partition("\n")[0] or type(error).__name__
    failed = torch.tensor([int(bool(failure))])
    dist.all_reduce(failed, dist.ReduceOp.MAX, group)  # on the host: ranks agree to time it, or not to
    if failed.item():
        return None, failure or f"{name} failed on another rank"
    return run, ""


def _enable(group: dist.ProcessGroup) -> None:
    """Older versions of torch ask for it, newer ones warn that they no longer do."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    enable = getattr(symmetric_memory, "enable_symm_mem_for_group", None)
    if enable is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            enable(group.group_name)
