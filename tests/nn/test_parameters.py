"""Parameters as DTensors, and stock modules on local tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.checkpoint import checkpoint

from odysseus_kernels.nn.attention import local_heads
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.parameters import Cut, distribute_parameter, head_parameter, local_parameter, sharded_parameter
from odysseus_kernels.nn.replicated import Replicated
from odysseus_kernels.nn.swap import swap_class


def _group(world_size: int) -> SequenceGroup:
    return SequenceGroup.of(init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",)))


def distributed(rank: int, world_size: int) -> dict[str, Any]:
    group = _group(world_size)
    full = nn.Parameter(torch.arange(72.0).view(6, 12), requires_grad=False)
    out = {}
    for name, cut in {"rows": Cut(0), "columns": Cut(1), "whole": Cut()}.items():
        parameter = distribute_parameter(full, group, cut)
        assert isinstance(parameter, nn.Parameter)
        assert isinstance(parameter, DTensor)
        assert parameter.shape == full.shape
        assert not parameter.requires_grad
        assert torch.equal(parameter.full_tensor(), full)
        local = local_parameter(parameter)
        if name != "whole":
            assert local.untyped_storage().nbytes() == full.nbytes // world_size, "a shard must not keep the whole"
        out[name] = local
    return out


def test_distribute_parameter(ranks):
    full = torch.arange(72.0).view(6, 12)
    results = ranks(3).run(distributed)
    assert torch.equal(torch.cat([result["rows"] for result in results]), full)
    assert torch.equal(torch.cat([result["columns"] for result in results], dim=1), full)


def crossed(rank: int, world_size: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("ring", "seq"))
    group = SequenceGroup.of(mesh)
    full = nn.Parameter(torch.arange(96.0).view(8, 12))
    out = {}
    for name, cut in {"all": Cut(0, "everyone"), "rows": Cut(0), "columns": Cut(1), "whole": Cut()}.items():
        parameter = distribute_parameter(full, group, cut)
        assert torch.equal(parameter.full_tensor(), full)
        local = sharded_parameter(parameter, group) if cut.over == "seq" else local_parameter(parameter)
        (local * (rank + 1)).sum().backward()
        assert parameter.grad.placements == parameter.placements
        out[name] = (local.detach(), parameter.grad.to_local())
    return out


def test_parameters_crossed_with_a_ring(ranks):
    """ZeRO-3 cuts over all ranks, in their order; what is cut over seq is added over the ring."""
    full = torch.arange(96.0).view(8, 12)
    results = ranks(4).run(crossed)
    assert torch.equal(torch.cat([result["all"][0] for result in results]), full)
    for rank, result in enumerate(results):
        assert torch.equal(result["rows"][0], full.chunk(2, 0)[rank % 2])
        assert torch.equal(result["columns"][0], full.chunk(2, 1)[rank % 2])
        assert (result["all"][1] == rank + 1).all()
        # Ranks 0 and 2, and 1 and 3, hold the same.
        assert (result["rows"][1] == (4 if rank % 2 == 0 else 6)).all()


def rows_gradient(rank: int, world_size: int) -> torch.Tensor:
    group = _group(world_size)
    parameter = distribute_parameter(nn.Parameter(torch.zeros(4, 2)), group, Cut())
    rows = head_parameter(parameter, group, (2 * (rank // 2), 2))
    assert rows.shape == (2, 2)
    (rows * (rank + 1)).sum().backward()
    assert parameter.grad.placements == (Replicate(),)
    return parameter.grad.to_local()


def test_gradient_of_rows_is_added_over_the_ranks(ranks):
    expected = torch.tensor([3.0, 3.0, 7.0, 7.0])[:, None].expand(4, 2)  # ranks 0 and 1, ranks 2 and 3
    for gradient in ranks(4).run(rows_gradient):
        assert torch.equal(gradient, expected)


def replicated_norm(rank: int, world_size: int, recompute: bool) -> dict[str, torch.Tensor]:
    group = _group(world_size)
    module = nn.LayerNorm(4)
    for name in ("weight", "bias"):
        setattr(module, name, distribute_parameter(getattr(module, name), group, Cut()))
    swap_class(module, Replicated)
    module.sequence_group = group
    assert isinstance(module, nn.LayerNorm)
    assert type(module).__name__ == "ReplicatedLayerNorm"
    x = torch.arange(8.0).view(2, 4).mul(rank + 1).sin().requires_grad_()
    out = checkpoint(module, x, use_reentrant=False) if recompute else module(x)
    assert set(dict(module.named_parameters())) == {"weight", "bias"}
    out.pow(2).sum().backward()
    with pytest.raises(RuntimeError):
        module(torch.zeros(3))
    assert not {"weight", "bias"} & module.__dict__.keys()
    return {"weight": module.weight.grad.to_local(), "bias": module.bias.grad.to_local()}


@pytest.mark.parametrize("recompute", [False, True])
def test_replicated_module(ranks, recompute):
    module = nn.LayerNorm(4)
    x = torch.cat([torch.arange(8.0).view(2, 4).mul(rank + 1).sin() for rank in range(3)])
    module(x).pow(2).sum().backward()
    for result in ranks(3).run(replicated_norm, recompute):
        for name in ("weight", "bias"):
            torch.testing.assert_close(result[name], getattr(module, name).grad)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(12, 12, 4), (12, 4, 4), (12, 4, 2), (12, 2, 4), (12, 1, 3), (8, 2, 8), (6, 3, 1)]
)
def test_local_heads_keep_every_query_with_its_key(heads, kv_heads, size):
    for rank in range(size):
        count, first, kv_count = local_heads(heads, kv_heads, rank, size)
        assert count == heads // size
        for local in range(count):
            head_of_query = (rank * count + local) // (heads // kv_heads)
            assert head_of_query == first + local // (count // kv_count)
