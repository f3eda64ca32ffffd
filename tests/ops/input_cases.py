"""Bad input on every rank: a ValueError with the expected and the given, before anything is sent."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import odysseus_kernels as ody


def _message(function: Callable[[], object]) -> str:
    with ody.CommRecorder() as record:
        try:
            function()
        except ValueError as error:
            assert record.bytes() == 0, "something was sent before the input was refused"
            return str(error)
    raise AssertionError("no ValueError")


def rs_output(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Whose gradient a switch is to bring."""
    return ody.linear_reduce_scatter(x, weight, group=None, config=ody.OverlapConfig(gather="nvls"))


def messages(rank: int, world: int) -> dict[str, str]:
    x, w = torch.randn(2, 4, 8), torch.randn(6, 8)
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("seq", "dp"))
    stores = rs_output(torch.randn(2, 4, 8, requires_grad=True), w)
    ag, rs, z3 = ody.all_gather_linear, ody.linear_reduce_scatter, ody.zero3_linear
    return {
        "inner": _message(lambda: ag(x, torch.randn(6, 7), group=None)),
        "inner rs": _message(lambda: rs(x, torch.randn(6, 7), group=None)),
        "inner z3": _message(lambda: z3(x, torch.randn(6, 7), group=None)),
        "dtype": _message(lambda: ag(x, w.double(), group=None)),
        "integers": _message(lambda: ag(x.int(), w.int(), group=None)),
        "device": _message(lambda: ag(x, w.to("meta"), group=None)),
        "bias": _message(lambda: ag(x, w, torch.randn(5), group=None)),
        "biases": _message(lambda: ag(x, (w, w), (None,), group=None)),
        "weight": _message(lambda: ag(x, torch.randn(8), group=None)),
        "dim": _message(lambda: ag(x, w, group=None, dim=-1)),
        "dim range": _message(lambda: ag(x, w, group=None, dim=5)),
        "vector": _message(lambda: ag(torch.randn(8), w, group=None)),
        "length": _message(lambda: rs(torch.randn(2, 2 * world + 1, 8), w, group=None)),
        "mesh": _message(lambda: ag(x, w, group=mesh)),
        "group": _message(lambda: ag(x, w, group="seq")),
        **{
            f"switch {name} {transport}": _message(
                functools.partial(operator, x, w, group=None, config=ody.OverlapConfig(**settings, transport=transport))
            )
            for transport in ("symmetric", "collective")
            for name, operator, settings in (
                ("rs", rs, {"reduce": "nvls"}),
                ("ar", ody.linear_all_reduce, {"reduce": "nvls"}),
                ("ag", ag, {"gather": "nvls"}),
                ("rs unfused", rs, {"reduce": "nvls", "mode": "unfused"}),
            )
        },
        "switch backward": _message(lambda: torch.autograd.backward(stores.sum())),
        "outsider": _message(lambda: ag(x, w, group=dist.GroupMember.NON_GROUP_MEMBER)),
    }
