"""A ZeRO-3 weight gathered whole, while some rows are multiplied by what has arrived.

For operators that use a weight for many tiles of rows: it travels once, hidden behind the first tile's product.  Below
autograd; nothing here is differentiable.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from odysseus_kernels.comm.arguments import autocasts
from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.groups import dispatch
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.comm.transport import Call, Gather, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops._ahead import Shards
from odysseus_kernels.ops._products import add_wide

__all__ = ["gathered_product"]


def gathered_product(
    lines: Tensor,
    weight_shard: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup,
    config: OverlapConfig,
    operator: str,
    phase: str,
    transposed: bool = False,
    following: Shards = None,
) -> tuple[Tensor, Tensor]:
    """``lines @ W.T + bias``, or with ``transposed`` ``lines @ W``, and W = AG(weight_shard) itself.

    Args:
        lines: [rows, K], or with ``transposed`` [rows, n]; rows may differ from rank to rank.
        weight_shard: [n/N, K], contiguous or not.
        bias: [n], whole, or None; not with ``transposed``.
        group, config: as operators take them.
        operator, phase: how it is counted, and how errors name it.
        following: what this group gathers next, sent ahead meanwhile: a weight shard, or all that an exchange shares.

    Returns:
        [rows, n], or [rows, K]; and [n, K].
    """
    features, width = weight_shard.shape
    whole = weight_shard.new_empty((features * group.size(), width))
    wide = accumulator_dtype(lines.dtype) if transposed else lines.dtype
    product = lines.new_empty((lines.shape[0], width if transposed else whole.shape[0]), dtype=wide)
    ahead = _prefetch(following) if not autocasts(lines.device) else None  # else what travels is made in each call
    started = False

    def consume(source: int, start: int, stop: int, block: Tensor) -> None:
        nonlocal started
        arrived = slice(source * features + start, source * features + stop)
        whole[arrived].copy_(block[0])
        if not transposed:
            _project(product[:, arrived], lines, whole[arrived], None if bias is None else bias[arrived])
        else:
            _add(product if started else product.zero_(), lines[:, arrived], whole[arrived])
        started = True

    def run(transport: Transport, settled: OverlapConfig) -> None:
        nonlocal started
        started = False
        gather = Gather(weight_shard.contiguous().unsqueeze(0), consume)
        call = Call(operator, phase, settled, gather, prefetch=ahead)  # type: ignore[arg-type]
        if settled.mode != "unfused":
            transport.execute(call)
            return
        transport.all_gather(call, whole.view(group.size(), 1, features, width))
        if transposed:
            _add(product.zero_(), lines, whole)
        else:
            _project(product, lines, whole, bias)

    work = Phase(
        operator=operator,
        phase=phase,
        shapes=f"weight_shard {list(weight_shard.shape)}, kept whole, transposed={transposed}",
        own="",
        dtype=weight_shard.dtype,
        flops=2 * lines.shape[0] * whole.numel(),
        gathered_bytes=weight_shard.nbytes,
    )
    dispatch(group, config, lines.device, run, work)
    return product.to(lines.dtype), whole


def _prefetch(following: Shards) -> Prefetch | None:
    if following is None:
        return None
    if isinstance(following, Tensor):
        return Prefetch.of_gather(following.detach().unsqueeze(0))
    return Prefetch.of_shared([one.detach() for one in following])


def _project(out: Tensor, lines: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(lines, weight.t(), out=out)
    else:
        torch.addmm(bias, lines, weight.t(), out=out)


def _add(total: Tensor, lines: Tensor, weight: Tensor) -> None:
    if total.dtype == lines.dtype:
        torch.addmm(total, lines, weight, out=total)
    else:
        add_wide(total, lines, weight)
