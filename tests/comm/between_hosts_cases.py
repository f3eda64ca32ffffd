"""What ranks run as if they were on several hosts, where shards are cut into tapered pieces from few rows on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm import functional
from odysseus_kernels.comm.collective import spans
from odysseus_kernels.comm.groups import group_transports

_PIECES = ((64, 6), (24, 4), (6, 2))


def operators(rank: int, world: int, dtype: torch.dtype, seed: int) -> None:
    """Outputs and gradients of whole numbers, exact in any order of sums, against those of one process; twice alike."""
    config = ody.OverlapConfig(mode="fused", transport="collective", timeout_s=20)
    functional.all_gather(torch.ones(1), config=config)
    collective = group_transports(dist.group.WORLD)._collective
    assert collective is not None and collective._lane is not None
    kept = spans._PIECES_OF_LINK, spans._LEAST_BYTES_OF_LINK
    spans._PIECES_OF_LINK, spans._LEAST_BYTES_OF_LINK = _PIECES, 0
    collective._lane.between_hosts = True
    try:
        draw = torch.Generator().manual_seed(seed)
        for rows, batch in ((1, 1), (3, 2), (7, 4), (33, 1), (67, 2)):
            first = _results(rank, world, dtype, rows, batch, draw.manual_seed(seed + rows))
            again = _results(rank, world, dtype, rows, batch, draw.manual_seed(seed + rows))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        collective._lane.between_hosts = False
        spans._PIECES_OF_LINK, spans._LEAST_BYTES_OF_LINK = kept


def _results(rank: int, world: int, dtype: torch.dtype, rows: int, batch: int, draw: torch.Generator) -> list[Tensor]:
    inner, outer = 5, 3

    def make(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=draw).double()

    whole, columns = make(batch, rows * world, inner), make(world * outer, inner)
    wide, mixed = make(world, batch, rows * world, outer), make(world, inner, outer)
    own = slice(rank * rows, (rank + 1) * rows)
    mine = slice(rank * outer, (rank + 1) * outer)
    config = ody.OverlapConfig(mode="fused", transport="collective", timeout_s=20)
    group = dist.group.WORLD

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).contiguous().requires_grad_()

    x, w = leaf(whole[:, own]), leaf(columns[mine])
    y = ody.all_gather_linear(x, w, group=group, config=config)
    y.sum().backward()
    found = [(y, whole @ columns[mine].T), (x.grad, columns.sum(0).expand(batch, rows, inner)),
             (w.grad, whole.sum((0, 1)).expand(outer, inner))]  # fmt: skip
    x, w = leaf(wide[rank]), leaf(mixed[rank])
    y = ody.linear_reduce_scatter(x, w, group=group, config=config)
    y.sum().backward()
    summed = sum(wide[peer] @ mixed[peer].T for peer in range(world))
    found += [(y, summed[:, own]), (x.grad, mixed[rank].sum(0).expand(batch, rows * world, outer)),
              (w.grad, wide[rank].sum((0, 1)).expand(inner, outer))]  # fmt: skip
    shards = make(world, rows, inner)
    x, w = leaf(whole[:, own]), leaf(shards[rank])
    y = ody.zero3_linear(x, w, group=group, config=config, prefetch=w, prefetch_backward=w)
    y.sum().backward()
    found += [(y, whole[:, own] @ shards.view(world * rows, inner).T), (x.grad, shards.sum((0, 1)).expand(x.shape)),
              (w.grad, whole.sum((0, 1)).expand(rows, inner))]  # fmt: skip
    results = []
    for actual, expected in found:
        assert actual is not None
        torch.testing.assert_close(actual.detach(), expected.to(dtype), rtol=0, atol=0)
        results.append(actual.detach())
    return results
