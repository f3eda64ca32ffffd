"""Predictions for a mesh that is given are those of the plan that looks for one."""

from __future__ import annotations

import pytest

from odysseus_kernels.planner.formulas import STRATEGIES
from odysseus_kernels.planner.planning.choice import machine_of_device, on_mesh, split_on
from odysseus_kernels.planner.planning.plan import SplitPlan, plan
from odysseus_kernels.planner.planning.splits import Split


@pytest.mark.parametrize(("seq", "ring", "dp"), [(8, 1, 1), (4, 2, 1), (2, 2, 2)])
def test_equals_the_plan(seq: int, ring: int, dp: int) -> None:
    settings = {"hardware": "h100-nvlink", "checkpointing": True, "dtype": "bfloat16"}
    planned = plan("llama-3.1-8b", world_size=8, seq_len=40_000, batch=3 * dp, **settings)
    by_split = {one.split: one for one in planned.splits}
    found = on_mesh("llama-3.1-8b", seq=seq, ring=ring, dp=dp, seq_len=40_000, batch=3, **settings)
    assert tuple(found) == STRATEGIES
    for strategy, one in found.items():
        assert one == by_split[split_on(strategy, seq=seq, ring=ring, dp=dp)]


def test_one_ring_of_all() -> None:
    assert split_on("tsp", seq=4, ring=2, dp=3) == Split("tsp", 8, 1, 3)
    assert split_on("ulysses", seq=4, ring=2, dp=3) == Split("ulysses", 4, 2, 3)


def test_heads_that_ranks_do_not_divide() -> None:
    found = on_mesh("llama-3.1-8b", seq=64, seq_len=65_536, hardware="h100-nvlink")
    possible = [name for name, one in found.items() if isinstance(one, SplitPlan)]
    assert possible == ["tsp"]
    assert found["odysseus"] == "heads: 64 ranks of seq do not divide 32 query heads"


@pytest.mark.parametrize(
    ("device", "machine"),
    [
        ("cpu", "cpu"),
        ("NVIDIA H100 80GB HBM3", "h100-nvlink"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb-nvlink"),
        ("NVIDIA H200", "h200-nvlink"),
        ("NVIDIA L40S", "l40s-pcie"),
    ],
)
def test_machines_of_devices(device: str, machine: str) -> None:
    assert machine_of_device(device) == machine


@pytest.mark.parametrize("device", ["Quadro P400", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_devices_of_no_known_machine(device: str) -> None:
    with pytest.raises(ValueError, match=f"none is known with the device '{device}': one of a100-nvlink"):
        machine_of_device(device)
